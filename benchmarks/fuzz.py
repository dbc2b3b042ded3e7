"""Fuzz the readers of untrusted files: manifest, index, tar, npy, images, recipe, checkpoint, weights.

    python benchmarks/fuzz.py [--seconds 60] [--engine hypothesis|atheris] [--target NAME ...] [--keep DIR]

Whole files are damaged at random: hypothesis changes bytes, and values in JSON; atheris (pip install atheris) is guided
by the lines that an input reaches. Whatever an input is, its reader must end within 10 seconds and 2 GiB, with what it
read or with the one clear error, and nothing in it may be executed: the whole files are joined by pickles that would
make a file, the canary. Inputs that break this are written to --keep.
"""

import argparse
import io
import json
import pickle
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import types
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import ROOT
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from data_prep.common.errors import BadInput
from data_prep.common.image_decoding import decode, image_size, raw_pixels
from data_prep.shards.derived_manifest import read_tar
from data_prep.shards.image_identity import ImageIdentities
from data_prep.shards.image_rules import DEFAULT_RULES
from data_prep.shards.index import load_index
from data_prep.shards.manifest import Manifest, parse_manifest
from data_prep.shards.members import read_array, read_json
from data_prep.shards.packing import pack
from data_prep.shards.response_table import load_response_table
from data_prep.shards.shown_images import as_shown
from data_prep.shards.storage import LocalFiles
from data_prep.sources.files.image_files import ImageFiles
from data_prep.sources.folder import Folder
from data_prep.sources.responses.response_arrays import open_npy
from train.data.seen import FITTED, SeenImages, SeenRecord, record_of
from train.evaluation.predictions_file import read_predictions
from train.models.weights import read_weights
from train.run.checkpoint import CHECKSUMS, checksum, load_progress, load_tensors, newest_intact
from train.run.progress import Progress
from train.run.recipe import ProbeRecipe, Recipe, load_recipe
from train.sweeping.sweep_settings import SweepSettings

SECONDS_AN_INPUT = 10
GIB_AN_INPUT = 2
INSTRUMENTED = ("data_prep", "train", "tarfile", "zipfile", "yaml")  # modules whose lines guide atheris
BATCH = 50  # inputs that hypothesis makes in one go
RELATIVES = 20  # of each of them


@dataclass(frozen=True)
class Target:
    """A reader and valid inputs for it.

    Attributes:
        read: reads an input; it may raise BadInput.
        seeds: whole inputs.
    """

    read: Callable[[bytes], Any]
    seeds: list[bytes]


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "executed")


# ---- whole files ---------------------------------------------------------------------------------------------------


def small_recording(folder: Path) -> Path:
    """Twelve stimuli of 3 sites, packed."""
    draw = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    lines = ["stimulus_id,image,object,split"]
    for row in range(12):
        image = Image.fromarray(draw.integers(0, 256, (16, 16, 3), np.uint8))
        name = f"images/s{row}.{('jpg', 'png')[row % 2]}"
        image.save(folder / name)
        lines.append(f"s{row},{name},{'ab'[row % 2]},{('train', 'train', 'val')[row % 3]}")
    (folder / "stimuli.csv").write_text("\n".join(lines))
    np.save(folder / "trials.npy", draw.normal(size=(12, 2, 3)).astype(np.float32))
    source = Folder(source=folder, trial_axes="repetitions-sites")
    pack(source.open(), folder / "shards", stimuli_per_shard=4, workers=1)
    return folder / "shards"


class _Table(LocalFiles):
    """A folder's files of which one table is read, whose bytes are the input."""

    def __init__(self, folder: Path, data: bytes):
        super().__init__(folder)
        self._data = data

    def table(self, file: str, manifest: Manifest) -> io.BytesIO:
        """The input, whichever table is asked for."""
        return io.BytesIO(self._data)


def _npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _torch(content: Any, **how: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **how)
    return file.getvalue()


def targets(folder: Path) -> dict[str, Target]:
    """All readers; `folder` is written to."""
    shards, scratch, canary = small_recording(folder / "recording"), folder / "scratch", Canary(folder / "canary")
    scratch.mkdir()
    code, objects = pickle.dumps(canary), np.array([canary], dtype=object)
    manifest_bytes = (shards / "manifest.json").read_bytes()
    manifest = parse_manifest(manifest_bytes, "manifest.json")
    images = [(folder / "recording" / "images" / name).read_bytes() for name in ("s0.jpg", "s1.png")]
    tensors = {"heads.weight": torch.zeros(3, 4), "net.bias": torch.ones(2)}
    hashes = np.zeros((1, 16), np.uint8)
    fitted = SeenImages(FITTED, "made_up", "", ImageIdentities(hashes, hashes), ["s0"])
    progress = Progress(
        recording="0" * 64,
        selection_metric="r2",
        selection_split="inner",
        site_ids=["a", "b"],
        classes=["x"],
        image_size=32,
    )

    def in_file(name: str, read: Callable[[Path], Any]) -> Callable[[bytes], Any]:
        def run(data: bytes) -> None:
            (scratch / name).write_bytes(data)
            read(scratch / name)

        return run

    def safetensors(data: bytes) -> None:
        (scratch / "network.safetensors").write_bytes(data)
        (scratch / CHECKSUMS).write_text(json.dumps({"network.safetensors": checksum(scratch / "network.safetensors")}))
        load_tensors(scratch, "network")

    def sums(data: bytes) -> None:
        (scratch / "step_1").mkdir(exist_ok=True)
        (scratch / "step_1" / CHECKSUMS).write_bytes(data)
        newest_intact(scratch)

    def image(data: bytes) -> None:
        readers: list[Callable[[bytes], Any]] = [
            image_size,
            partial(as_shown, encoding="other", rules=DEFAULT_RULES),
            partial(decode, encoding="jpg"),
            partial(decode, encoding="png"),
        ]
        for read in readers:
            with suppress(ValueError):
                read(data)

    def array(data: bytes) -> None:
        readers: list[Callable[[bytes], Any]] = [
            partial(read_array, location="x"),
            raw_pixels,
            in_file("rates.npy", open_npy),
        ]
        for read in readers:
            with suppress(ValueError, BadInput):
                read(data)

    recipes = [json.dumps(model().model_dump(mode="json")).encode() for model in (Recipe, ProbeRecipe)]
    run = f"seed: !!python/object/apply:os.system ['touch {canary.path}']".encode()
    index = (shards / "index.npz").read_bytes()
    with (shards / "index.npz").open("rb") as file:
        read_index = dict(np.load(file))
    return {
        "manifest": Target(lambda data: parse_manifest(data, "m"), [manifest_bytes, _without_sums(manifest)]),
        "index": Target(
            lambda data: load_index(folder, _Table(folder, data), manifest),
            [index, _npz(**read_index), _npz(a=objects), code],
        ),
        "targets": Target(
            lambda data: load_response_table(io.BytesIO(data), "targets.npz", manifest),
            [(shards / "targets.npz").read_bytes(), _npz(a=objects), code],
        ),
        "tar": Target(
            in_file("a.tar", lambda path: read_tar(scratch, path)),
            [path.read_bytes() for path in sorted(shards.glob("*.tar"))[:2]],
        ),
        "npy": Target(array, [_npy(np.zeros((2, 3), np.float32)), _npy(np.zeros((4, 4, 3), np.uint8)), _npy(objects)]),
        "json": Target(lambda data: read_json(data, "x"), [b'{"object": "face", "x": [1, 2.5, null]}']),
        "image": Target(image, images),
        "zip": Target(in_file("images.zip", _all_images), [_zipped(images)]),
        "recipe": Target(
            in_file("recipe.yaml", lambda path: load_recipe(path, Recipe)), [recipes[0], b"a: &a [1]\nb: [*a, *a]", run]
        ),
        "probe": Target(in_file("probe.yaml", lambda path: load_recipe(path, ProbeRecipe)), [recipes[1], run]),
        "sweep": Target(
            in_file("sweep.yaml", lambda path: load_recipe(path, SweepSettings)),
            [b"recipe: a.yaml\ngrid: {optimizer.lr: [1.0e-3, 1.0e-2]}\nset: {epochs: 3}", run],
        ),
        "progress": Target(
            in_file("progress.json", lambda path: load_progress(path.parent)), [progress.model_dump_json().encode()]
        ),
        "sums": Target(sums, [b'{"network.safetensors": "00", "progress.json": "11"}']),
        "checkpoint": Target(safetensors, [save(tensors), code]),
        "weights": Target(
            in_file("weights.pth", read_weights),
            [
                _torch(tensors),
                _torch({"state_dict": tensors}, _use_new_zipfile_serialization=False),
                _torch({"a": canary}),
                _torch({"a": canary}, _use_new_zipfile_serialization=False),
                code,
            ],
        ),
        "predictions": Target(
            in_file("predictions.npz", read_predictions),
            [_npz(stimulus_id=np.array(["a"]), site_id=np.array(["b"]), prediction=np.zeros((1, 1))), _npz(a=objects)],
        ),
        "seen": Target(
            in_file("seen.npz", lambda path: record_of(path.parent)),
            [SeenRecord((fitted,), ("weights",)).content(), _npz(a=objects)],
        ),
    }


def _without_sums(manifest: Manifest) -> bytes:
    """With which what is changed does not fail by its checksum alone."""
    return manifest.model_copy(update={"checksum": None, "files": {}}).model_dump_json().encode()


def _zipped(images: list[bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, image in enumerate(images):
            archive.writestr(f"a/s{number}.png", image)
    return file.getvalue()


def _all_images(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        return
    files = ImageFiles(path)
    names = [files.find([name]) for name in ("s0", "s1", "a/s0.png")]
    with files.reading() as load:
        for name in filter(None, names):
            load(name)


# ---- one input -----------------------------------------------------------------------------------------------------


class TookTooLong(Exception):
    """An input took too long to read."""


class Judge:
    """Reads inputs and stores those that break the rules.

    Args:
        name, target: what reads them.
        canary: the file that must never be.
        keep: folder for inputs that break the rules.
    """

    def __init__(self, name: str, target: Target, canary: Path, keep: Path):
        self.name, self.target, self._canary, self._keep = name, target, canary, keep
        self.tried = self.refused = 0
        self.faults: dict[str, Path] = {}
        signal.signal(signal.SIGALRM, self._late)

    @staticmethod
    def _late(*_: object) -> None:
        raise TookTooLong

    def __call__(self, data: bytes) -> None:
        """Read an input."""
        self.tried += 1
        signal.alarm(SECONDS_AN_INPUT)
        try:
            self.target.read(data)
        except BadInput:
            self.refused += 1
        except Exception as error:
            self._note(f"{type(error).__name__}: {str(error)[:200]}", data)
        finally:
            signal.alarm(0)
        if self._canary.exists():
            self._canary.unlink()
            self._note("EXECUTED", data)

    def _note(self, what: str, data: bytes) -> None:
        kind = what.partition(":")[0]
        if kind not in self.faults:
            self._keep.mkdir(parents=True, exist_ok=True)
            self.faults[kind] = self._keep / f"{self.name}-{kind}"
            self.faults[kind].write_bytes(data)
            print(f"{self.name}: {what} -> {self.faults[kind]}", flush=True)


# ---- hypothesis ----------------------------------------------------------------------------------------------------

_NUMBERS = st.sampled_from([0, -1, 1, 2**31, 2**63, 10**12, 10**30, 1e308, 0.5]) | st.integers() | st.floats()
_VALUES = st.recursive(
    st.none() | st.booleans() | _NUMBERS | st.text(max_size=20) | st.sampled_from(["../x", "\x1b[2J", "a" * 5000]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
_BYTES = st.binary(max_size=8) | st.sampled_from(
    [b"\xff" * 8, bytes(8), b"[" * 2000, b"\x80\x02", b"(1000000000000,)", b"99999999999", b"*a, ", b"!!python/name:"]
)


@st.composite
def damaged(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A valid input with some bytes, or JSON values, changed."""
    data = draw(st.sampled_from(seeds))
    with suppress(ValueError):
        if draw(st.booleans()):
            return json.dumps(_changed(draw, json.loads(data)), allow_nan=True).encode()
    changed = bytearray(data)
    for _ in range(draw(st.integers(0, 4))):
        offset, length = draw(st.integers(0, len(changed))), draw(st.sampled_from([0, 1, 1, 2, 8, 512, 5000]))
        changed[offset : offset + length] = draw(_BYTES)
    return bytes(changed[: draw(st.integers(0, len(changed)))] if draw(st.integers(0, 5)) == 0 else changed)


def relative(data: bytes) -> bytes:
    """A copy of an input with a few bytes changed; faster than hypothesis."""
    changed = bytearray(data)
    for _ in range(random.randint(1, 6)):
        offset = random.randrange(len(changed) + 1)
        match random.randrange(4):
            case 0:
                changed[offset : offset + 1] = random.randbytes(1)
            case 1:
                changed[offset : offset + random.randint(1, 16)] = b""
            case 2:
                changed[offset:offset] = changed[offset : offset + random.randint(1, 600)]
            case 3:
                digits = b"0123456789.-eE[]{}*&!"
                changed[offset : offset + 1] = bytes([random.choice(digits)])
    return bytes(changed)


def _changed(draw: st.DrawFn, document: Any) -> Any:
    if isinstance(document, dict | list) and document and draw(st.integers(0, 4)):
        keys = list(document) if isinstance(document, dict) else range(len(document))
        key = draw(st.sampled_from(keys))
        document[key] = _changed(draw, document[key])
        return document
    return draw(_VALUES)


def with_hypothesis(judge: Judge, seconds: float, derandomize: bool = False) -> None:
    """Damage whole inputs for so long, or, for a test that repeats, one batch of them."""
    inputs = damaged(judge.target.seeds)

    @settings(
        max_examples=BATCH,
        deadline=None,
        database=None,
        derandomize=derandomize,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def batch(data: bytes) -> None:
        judge(data)
        for _ in range(0 if derandomize else RELATIVES):
            judge(relative(data))

    until = time.monotonic() + seconds
    for data in judge.target.seeds:
        judge(data)
    batch()
    while time.monotonic() < until and not derandomize:
        batch()


# ---- atheris -------------------------------------------------------------------------------------------------------


def with_atheris(name: str, seconds: int, keep: Path) -> int:
    """Fuzz a target in a process of its own, guided by coverage; returns how many inputs were tried."""
    words = [sys.executable, __file__, "--atheris-target", name, "--seconds", str(seconds), "--keep", str(keep)]
    done = subprocess.run(words, capture_output=True, text=True)
    sys.stdout.write("".join(line + "\n" for line in done.stdout.splitlines() if line.startswith(f"{name}: ")))
    counts = [line.split()[-1] for line in done.stderr.splitlines() if "number_of_executed_units" in line]
    if not counts:
        print(f"{name}: atheris ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return int(counts[-1]) if counts else 0


def _functions_of(module: Any, name: str) -> Iterator[types.FunctionType]:
    """The functions that a module defines, and the methods of its classes."""
    for value in list(vars(module).values()):
        if getattr(value, "__module__", None) == name:
            members = list(vars(value).values()) if isinstance(value, type) else [value]
            yield from (member for member in members if isinstance(member, types.FunctionType))


def fuzz_here(judge: Judge, seconds: int, folder: Path) -> None:
    """Be the process that `with_atheris` starts; libFuzzer ends it."""
    import atheris

    seeds = folder / "seeds"
    seeds.mkdir()
    for number, data in enumerate(judge.target.seeds):
        (seeds / str(number)).write_bytes(data)
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in INSTRUMENTED:
            for function in _functions_of(module, name):
                atheris.instrument_func(function)
    longest = max(map(len, judge.target.seeds)) * 2
    options = [f"-max_total_time={seconds}", "-print_final_stats=1", f"-max_len={longest}", "-rss_limit_mb=8192"]
    atheris.Setup([sys.argv[0], *options, "-verbosity=0", str(seeds)], lambda data: judge(bytes(data)))
    atheris.Fuzz()


# ---- the command ---------------------------------------------------------------------------------------------------


def limit_memory() -> None:
    """Limit memory, so that absurd allocations fail."""
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + GIB_AN_INPUT * 2**30, resource.RLIM_INFINITY))


def main() -> int:
    """Fuzz, and print the number of inputs per target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="budget, divided among the targets")
    parser.add_argument("--engine", choices=("hypothesis", "atheris"), default="hypothesis")
    parser.add_argument("--target", nargs="*", default=[], help="readers to fuzz; default: all")
    parser.add_argument("--keep", type=Path, default=ROOT / "fuzz", help="folder for inputs that break the rules")
    parser.add_argument("--atheris-target", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        by_name = targets(folder)
        if options.atheris_target:
            judge = Judge(options.atheris_target, by_name[options.atheris_target], folder / "canary", options.keep)
            fuzz_here(judge, int(options.seconds), folder)
        chosen = options.target or list(by_name)
        seconds, faults = options.seconds / len(chosen), 0
        limit_memory()
        warnings.simplefilter("ignore")  # of torch, about the pickles it refuses
        print("| reader | inputs | refused |\n| --- | ---: | ---: |")
        for target in chosen:
            judge = Judge(target, by_name[target], folder / "canary", options.keep)
            if options.engine == "atheris":
                before = set(options.keep.glob("*"))
                print(f"| {target} | {with_atheris(target, max(int(seconds), 1), options.keep):,} | |", flush=True)
                faults += len(set(options.keep.glob("*")) - before)
                continue
            with_hypothesis(judge, seconds)
            faults += len(judge.faults)
            print(f"| {target} | {judge.tried:,} | {judge.refused / judge.tried:.0%} |", flush=True)
    print(f"{faults} inputs ended otherwise than they may" if faults else "every input was read, or refused clearly")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
