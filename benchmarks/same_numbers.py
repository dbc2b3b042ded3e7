"""Compare the numbers of the same runs in two checkouts, bit for bit.

    python benchmarks/same_numbers.py BEFORE AFTER --out DIR

BEFORE and AFTER are checkouts of the repository. Each packs a small simulated recording, probes and fine-tunes on it
with one and two processes, under DDP and ZeRO-2, evaluates, searches and reports; then every number that they left
(metrics.json, loss curves, predictions, tables) is compared. What a checkout has computed in DIR already is kept.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

import numpy as np
from harness import run_checked

PACK = ["simulated", "--sites", "12", "--repetitions", "6", "--image-size", "48"]
SMALL = [
    *("--backbone.name", "test_convnext", "--backbone.weights", "random", "--precision", "fp32"),
    *("--epochs", "2", "--batch.global-size", "32", "--images.size", "32", "--optimizer.lr", "3e-3"),
    *("--loader.workers", "0"),
]
HYBRID = [
    *("--backbone.cut", "stages.1", "--task.kind", "hybrid", "--task.weighting", "uncertainty", "--ema", "0.9"),
    *("--readout.kind", "factorised", "--readout.start", "ridge", "--augment.shift", "0.1", "--augment.flip"),
]
PROBE = [
    "--backbone.name",
    "test_convnext",
    "--backbone.weights",
    "random",
    "--images.size",
    "32",
    "--loader.workers",
    "0",
]
ZERO2 = ["--strategy", "ds_configs/zero2.json"]
SWEEP = "recipe: base.yaml\ngrid:\n  optimizer.lr: [1e-3, 3e-3]\n"
BASE = """\
backbone: {name: test_convnext, weights: random}
precision: fp32
epochs: 1
batch: {global_size: 32}
images: {size: 32}
loader: {workers: 0}
"""
NUMBERS = ("metrics.json", "history.jsonl", "predictions.npz", "table.csv", "manifest.json")
# Keys, or ends of keys, that tell of one run's time and place.
OF_ONE_RUN = {"seconds", "second", "trained_on", "provenance", "checksum", "command", "commit", "files"}


def commands(out: Path) -> list[tuple[str, list[str]]]:
    """The runs in order: the name of the output, and the command line after `launch/local.sh`."""
    data, other = str(out / "data"), str(out / "other")

    def finetune(name: str, *words: str) -> tuple[str, list[str]]:
        return name, ["train/finetune.py", "--data", data, "--out", str(out / name), *SMALL, *words]

    def evaluate(*names: str, words: tuple[str, ...] = ()) -> tuple[str, list[str]]:
        return f"eval of {names}", ["train/evaluate.py", *(str(out / name) for name in names), "--split", "val", *words]

    def probe(name: str, *words: str) -> tuple[str, list[str]]:
        return name, ["train/probe.py", "--data", data, "--out", str(out / name), *PROBE, *words]

    two = ("-n", "2")
    runs = [finetune("one"), finetune("ddp"), finetune("zero2", *ZERO2), finetune("hybrid", *HYBRID)]
    runs += [
        finetune("classifier", "--task.kind", "classification"),
        finetune("poisson", "--loss.responses", "poisson"),
    ]
    runs += [finetune("correlation", "--loss.responses", "correlation")]
    two_recordings = (
        "several",
        ["train/finetune.py", "--data", data, other, "--out", str(out / "several"), *SMALL],
    )
    processes = {"ddp": two, "zero2": two, "probe_two": two, "several": two}
    listed = [
        *runs,
        two_recordings,
        *(evaluate(name) for name, _ in runs),
        evaluate("several"),
        probe("pixels", "--layers", "pixels"),
        probe("probe_one", "--layers", "stages.*"),
        probe("probe_two", "--layers", "stages.*"),
        probe("windows", "--layers", "stages.1", "stages.2", "--field", "gaussian"),
        probe("pls", "--layers", "stages.1", "--readout", "pls"),
        evaluate("one", "ddp", words=("--out", str(out / "ensemble"))),
    ]
    return [(name, [*processes.get(name, ("-n", "1")), *words]) for name, words in listed]


def run_all(checkout: Path, out: Path) -> None:
    """Run everything in a checkout, into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    environment = {"PYTHON": sys.executable, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}

    def call(name: str, words: list[str]) -> None:
        mark = out / f".{''.join(letter if letter.isalnum() else '_' for letter in name)}.done"
        if mark.exists():
            return
        print(f"{checkout.name}: {name}", flush=True)
        run_checked(words, checkout, **environment)
        mark.touch()

    for name, stimuli in (("data", "240"), ("other", "180")):
        words = [sys.executable, "data_prep/pack.py", *PACK, "--stimuli", stimuli, "--out", str(out / name)]
        call(name, words)
    for name, words in commands(out):
        call(name, ["bash", "launch/local.sh", *words])
    (out / "base.yaml").write_text(BASE)
    (out / "sweep.yaml").write_text(SWEEP)
    data, sweep = str(out / "data"), [sys.executable, "train/sweep.py", str(out / "sweep.yaml")]
    call("sweep", [*sweep, "--data", data, "--out", str(out / "sweep")])
    runs = [str(out / name) for name in ("pixels", "probe_one", "one", "ddp", "zero2", "hybrid")]
    call("report", [sys.executable, "train/report.py", *runs, "--out", str(out / "report")])


def numbers_in(folder: Path, file: Path) -> object:
    """The content of a file as plain data, without what is specific to one run and without the path of its folder."""
    path = folder / file
    if path.suffix == ".npz":
        return arrays_in(path)
    text = path.read_text().replace(str(folder), "")
    if path.suffix == ".json":
        return without(json.loads(text))
    if path.suffix == ".jsonl":
        return [without(json.loads(line)) for line in text.splitlines()]
    return without(list(csv.DictReader(text.splitlines())))


def arrays_in(path: Path) -> dict[str, list]:
    """The arrays of an .npz file, as lists."""
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name].tolist() for name in arrays.files}


def without(value: object) -> object:
    """Nested data without the keys for time and place of a run."""
    if isinstance(value, dict):
        return {key: without(part) for key, part in value.items() if not OF_ONE_RUN & {key, key.rsplit("_")[-1]}}
    return [without(part) for part in value] if isinstance(value, list) else value


def differences(before: object, after: object, path: str = "") -> list[str]:
    """A line for each difference between two nested values. NaN equals NaN."""
    if isinstance(before, dict) and isinstance(after, dict):
        missing = [f"{path}.{key}: only in one" for key in sorted(before.keys() ^ after.keys())]
        both = [key for key in before if key in after]
        return missing + [line for key in both for line in differences(before[key], after[key], f"{path}.{key}")]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [
            line
            for i, pair in enumerate(zip(before, after, strict=True))
            for line in differences(*pair, f"{path}[{i}]")
        ]
    same = before == after or (before != before and after != after)
    return [] if same else [f"{path}: {before} before, {after} after"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    for checkout, name in ((options.before, "before"), (options.after, "after")):
        run_all(checkout.resolve(), options.out.resolve() / name)
    out = options.out.resolve()
    before, after = out / "before", out / "after"
    files = sorted(path.relative_to(before) for name in NUMBERS for path in before.rglob(name))
    wrong = 0
    for file in files:
        different = (
            differences(numbers_in(before, file), numbers_in(after, file)) if (after / file).exists() else ["missing"]
        )
        wrong += bool(different)
        print(
            f"{file}: {'the same' if not different else f'{len(different)} differences'}", *different[:5], sep="\n    "
        )
    print(f"{len(files)} files compared, {wrong} differ")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
