"""Recording -> shard folder, on several processes, whole or not at all.

Everything is written into a hidden folder beside the target, which gets the target's name only when manifest and index
are complete. A killed pack leaves at most that hidden folder; the next pack to the same target removes it.
"""

import glob
import multiprocessing
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.ceiling import estimate_ceiling
from data_prep.common import locks
from data_prep.common.errors import BadInput, CannotWrite, RunFailed
from data_prep.common.image_decoding import image_size
from data_prep.common.progress import Progress
from data_prep.common.safe_reading import is_name
from data_prep.common.worker_processes import serve_parent
from data_prep.recording import SPLITS, Recording, Stimulus
from data_prep.shards.folder import ShardFolder, ShardSplit
from data_prep.shards.index import SplitIndex
from data_prep.shards.manifest import Ceiling, Image, Manifest, Rates, Shard, Split
from data_prep.shards.reindexing import write_tables
from data_prep.shards.writer import write_shard
from data_prep.splits import grouping_facts, straddling

CEILING_BYTES = 64 * 2**20  # of trials whose ceilings are estimated at once, which takes about four times as much
NEVER_UINT8 = 0.1  # a rounding error above this part of a grey level is no float16 noise: the image was resampled


def pack(recording: Recording, out: Path, stimuli_per_shard: int, workers: int) -> ShardFolder:
    """Write `recording` as a shard folder and open it.

    Args:
        recording: what to pack.
        out: the folder to make.
        stimuli_per_shard: stimuli in one tar.
        workers: packing processes.

    Raises:
        BadInput: `out` exists, the recording contradicts itself, or a stimulus of it cannot be read.
        RunFailed: the disk is full, or a packing process was killed.
    """
    _check_recording(recording)
    with _whole_or_nothing(out) as folder:
        packed = _write_shards(recording, folder, stimuli_per_shard, workers)
        manifest = _manifest(recording, packed)
        try:
            write_tables(folder, manifest, packed.split_indexes(), _ceiling)
        except CannotWrite as error:
            raise RunFailed(f"{out}: {error.reason}; nothing was packed") from None
    return ShardFolder(out)


def _check_recording(recording: Recording) -> None:
    ids, splits = recording.stimulus_ids, recording.splits
    if not ids:
        raise BadInput(f"{recording.name}: holds no stimuli")
    for what, names in (
        ("the name of the recording", [recording.name]),
        ("the id of a site", [str(site["id"]) for site in recording.sites]),
        ("an object", sorted(set(recording.objects or ()))),
        ("the units", [recording.units]),
    ):
        if (odd := next((name for name in names if not is_name(name)), None)) is not None:
            raise BadInput(f"{recording.name}: {what} is {odd[:100]!r}; it must be one printable line")
    if len(set(ids)) != len(ids):
        seen: set[str] = set()
        twice = next(name for name in ids if name in seen or seen.add(name))
        raise BadInput(f"{recording.name}: stimulus id {twice!r} occurs more than once; each stimulus needs its own")
    if wrong := [name for name in ids if not re.fullmatch(r"[A-Za-z0-9_-]+", name)]:
        raise BadInput(f"{recording.name}: stimulus id {wrong[0]!r} must consist of letters, digits, _ and - only")
    if len(splits) != len(ids) or not set(splits) <= set(SPLITS):
        raise BadInput(f"{recording.name}: splits must name one of {', '.join(SPLITS)} for every stimulus")
    if "train" not in splits:
        raise BadInput(f"{recording.name}: has no stimulus in the split 'train'; a model needs some to be fitted on")


@contextmanager
def _whole_or_nothing(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that becomes `out` if the block ends well and is removed if it does not."""
    if out.exists():
        raise BadInput(f"{out} exists already; choose another --out, or remove it first to pack again")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        hidden, lock = _claim(out)
    except OSError as error:
        raise BadInput(f"{out} cannot be made ({error.strerror}); choose another --out") from None
    try:
        yield hidden
        hidden.chmod(0o755)
        try:
            hidden.rename(out)
        except OSError:
            raise BadInput(f"{out} was made by someone else while packing; choose another --out") from None
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        os.close(lock)


def _claim(out: Path) -> tuple[Path, int]:
    """A hidden folder beside `out`, and its lock, which tells a living pack's folder from a dead one's."""
    with locks.exclusive(out.parent):  # a folder that is not locked yet must not pass for a leftover
        _remove_leftovers(out)
        hidden = Path(tempfile.mkdtemp(prefix=f".{out.name}.packing-", dir=out.parent))
        lock = locks.open_lock(hidden)
        locks.lock(lock)
        return hidden, lock


def _remove_leftovers(out: Path) -> None:
    for leftover in out.parent.glob(f".{glob.escape(out.name)}.packing-*"):
        try:
            in_use = locks.is_locked(leftover)
        except FileNotFoundError:  # it was finished or removed just now
            continue
        if in_use:
            raise BadInput(f"another pack to {out} is under way; wait for it, or choose another --out")
        shutil.rmtree(leftover, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------ processes


@dataclass
class _PackedShard:
    """What a packing process tells of the shard it wrote."""

    shard: Shard
    index: SplitIndex
    rates: np.ndarray | None
    image_sizes: set[tuple[int, int, str]]
    rounding_error: float | None
    groups: dict[str, set[str]]


@dataclass
class _Packed:
    shards: dict[str, list[_PackedShard]] = field(default_factory=dict)

    def all(self) -> list[_PackedShard]:
        """The shards of all splits."""
        return [shard for shards in self.shards.values() for shard in shards]

    def split_indexes(self) -> dict[str, SplitIndex]:
        """The index of each split."""
        return {split: SplitIndex.joined([packed.index for packed in shards]) for split, shards in self.shards.items()}


_recording: Recording
_finished: Any


def _start_process(recording: Recording, finished: Any) -> None:
    _prepare(recording, finished)
    serve_parent()


def _prepare(recording: Recording, finished: Any) -> None:
    """Tell this process what it packs, and where to count."""
    global _recording, _finished
    _recording, _finished = recording, finished


def _write_shards(recording: Recording, folder: Path, stimuli_per_shard: int, workers: int) -> _Packed:
    jobs = _shard_jobs(recording.splits, stimuli_per_shard)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["data_prep.shards.packing", "webdataset"]
    )  # whose import takes seconds: once for all
    finished = context.Value("q", 0)
    with (
        Progress(len(recording.stimulus_ids), "packing") as progress,
        ProcessPoolExecutor(min(workers, len(jobs)), context, _start_process, (recording, finished)) as pool,
    ):
        with _ctrl_c_ignored():  # by the processes that are started here; a half-started one would die noisily
            futures = [pool.submit(_write_one, folder / name, indices) for _, name, indices in jobs]
        try:
            _watch(futures, finished, progress)
        except BrokenProcessPool:
            raise RunFailed("a packing process was killed (out of memory?); nothing was packed") from None
        finally:
            for future in futures:
                future.cancel()
    packed = _Packed()
    for (split, _, _), future in zip(jobs, futures, strict=True):
        packed.shards.setdefault(split, []).append(future.result())
    return packed


@contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _shard_jobs(splits: Sequence[str], stimuli_per_shard: int) -> list[tuple[str, str, list[int]]]:
    """(split, file name, stimulus positions) of every shard, in the source's order within a split."""
    jobs = []
    for split in SPLITS:
        positions = [position for position, name in enumerate(splits) if name == split]
        for number, start in enumerate(range(0, len(positions), stimuli_per_shard)):
            jobs.append((split, f"{split}-{number:06d}.tar", positions[start : start + stimuli_per_shard]))
    return jobs


def _watch(futures: list[Future], finished: Any, progress: Progress) -> None:
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()  # raises what the process raised
        progress.advance(finished.value - progress.done)


def _write_one(path: Path, indices: list[int]) -> _PackedShard:
    watcher = _Watcher(len(_recording.sites), grouping_facts(_recording.group_by))
    try:
        shard, index = write_shard(path, watcher.watch(_recording.read(indices)))
    except OSError as error:
        raise RunFailed(f"{error.filename or path.name}: {error.strerror}; nothing was packed") from None
    return _PackedShard(shard, index, watcher.rates(), watcher.image_sizes, watcher.rounding_error, watcher.groups)


class _Watcher:
    """Looks at the stimuli on their way into a shard and keeps what the manifest has to say of them."""

    def __init__(self, sites: int, facts: Iterable[str]):
        self.sites = sites
        self.groups: dict[str, set[str]] = {fact: set() for fact in facts}
        self.image_sizes: set[tuple[int, int, str]] = set()
        self.rounding_error: float | None = None
        self._rates: list[np.ndarray | None] = []

    def watch(self, stimuli: Iterator[Stimulus]) -> Iterator[Stimulus]:
        """Pass the stimuli on, checked and counted."""
        for stimulus in stimuli:
            self._check(stimulus)
            self.image_sizes.add(image_size(stimulus.image))
            self._rates.append(stimulus.rates)
            for fact, seen in self.groups.items():
                if fact in stimulus.meta:
                    seen.add(str(stimulus.meta[fact]))
            if (error := stimulus.meta.get("uint8_rounding_error")) is not None:
                self.rounding_error = max(error, self.rounding_error or 0.0)
            with _finished.get_lock():
                _finished.value += 1
            yield stimulus

    def _check(self, stimulus: Stimulus) -> None:
        for name, array, ndim in (("rates", stimulus.rates, 1), ("trials", stimulus.trials, 2)):
            if array is not None and (array.ndim != ndim or array.shape[-1] != self.sites):
                raise BadInput(f"{stimulus.id}: {name} of shape {array.shape}; the recording has {self.sites} sites")
            if array is not None and np.isinf(array).any():
                raise BadInput(f"{stimulus.id}: {name} holds an infinite value; NaN stands for what was not recorded")

    def rates(self) -> np.ndarray | None:
        """float32 (stimuli, sites), or None where no stimulus of the shard has responses."""
        missing = [rates is None for rates in self._rates]
        if any(missing) and not all(missing):
            raise BadInput("some stimuli of one split have responses and others have none; use NaN for missing ones")
        return None if all(missing) else np.stack(self._rates)


# ------------------------------------------------------------------------------------------------------- manifest


def _manifest(recording: Recording, packed: _Packed) -> Manifest:
    train = [shard.rates for shard in packed.shards["train"]]
    if any(rates is None for rates in train):
        raise BadInput(f"{recording.name}: the split 'train' has no responses to fit a model on")
    return Manifest(
        name=recording.name,
        simulated=recording.simulated,
        provenance=_findings(recording, packed),
        splits={split: _split(shards) for split, shards in packed.shards.items()},
        sites=recording.sites,
        classes=sorted(set(recording.objects)) if recording.objects else None,
        image=Image.of(set().union(*(shard.image_sizes for shard in packed.all()))),
        rates=_rates(recording, np.concatenate(train)),
        response_window_ms=recording.response_window_ms,
        group_by=recording.group_by,
        truth=recording.truth,
    )


def _split(shards: list[_PackedShard]) -> Split:
    return Split(
        stimuli=sum(packed.shard.stimuli for packed in shards),
        responses=all(packed.rates is not None for packed in shards),
        shards=[packed.shard for packed in shards],
    )


def _findings(recording: Recording, packed: _Packed) -> dict[str, Any]:
    """The recording's provenance with what was found while it was packed."""
    provenance = {"split": {"method": "source"}} | recording.provenance
    if shared := straddling({split: [shard.groups for shard in shards] for split, shards in packed.shards.items()}):
        provenance["straddling"] = shared
    if "val" not in packed.shards:
        absent = (
            f"no stimulus fell to val (of {len(recording.stimulus_ids)}), which evaluate and probe score by default"
        )
        provenance["warnings"] = [*provenance.get("warnings", []), absent]
    errors = [shard.rounding_error for shard in packed.all() if shard.rounding_error is not None]
    if not errors:
        return provenance
    provenance["largest_uint8_rounding_error"] = max(errors)
    warnings = provenance.get("warnings", [])
    if max(errors) > NEVER_UINT8 and not any("uint8" in warning for warning in warnings):
        found = (
            f"rounding to uint8 moved a pixel by {max(errors):.3f} of a grey level: "
            "the source's images never were uint8 (they were resampled after decoding)"
        )
        provenance["warnings"] = [*warnings, found]
    return provenance


def _rates(recording: Recording, train: np.ndarray) -> Rates:
    if np.isnan(train).all():
        raise BadInput(f"{recording.name}: every train rate is NaN; there is nothing to fit a model on")
    return Rates.of(train, recording.units)


def _ceiling(folder: ShardFolder) -> Ceiling | None:
    """The ceiling of each site over all stimuli that have single trials, whatever their split."""
    splits = [folder.split(name) for name in folder.manifest.splits]
    sites, size = len(folder.manifest.sites), sum(split.trials_bytes for split in splits)
    if not size:
        return None
    width = max(1, sites * CEILING_BYTES // size)
    with Progress(sites, "noise ceilings", "sites") as progress:
        estimate = estimate_ceiling(_blocks_of_sites(splits, sites, width, progress))
    return None if estimate is None else Ceiling.from_estimate(estimate)


def _blocks_of_sites(splits: Sequence[ShardSplit], sites: int, width: int, progress: Progress) -> Iterator[np.ndarray]:
    for first in range(0, sites, width):
        yield _trials(splits, slice(first, first + width))
        progress.advance(min(width, sites - first))


def _trials(splits: Sequence[ShardSplit], sites: slice) -> np.ndarray:
    parts = [trials for split in splits if (trials := split.trials(sites)) is not None]
    depth = max(part.shape[1] for part in parts)
    padded = [np.pad(part, ((0, 0), (0, depth - part.shape[1]), (0, 0)), constant_values=np.nan) for part in parts]
    return np.concatenate(padded)
