"""Packing a recording into a shard folder with several processes, completely or not at all."""

import multiprocessing
import re
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import numpy as np

from data_prep.common.errors import BadInput, CannotWrite, RunFailed
from data_prep.common.progress import Progress
from data_prep.common.safe_reading import is_name
from data_prep.common.worker_processes import serve_parent
from data_prep.recording import SPLITS, Recording, Stimulus
from data_prep.shards.copies import first_copies_in
from data_prep.shards.folder import ShardFolder
from data_prep.shards.image_rules import DEFAULT_RULES, ImageRules
from data_prep.shards.new_folder import new_folder
from data_prep.shards.packed_manifest import PackedShard, PackedShards, StimulusNotes, ceiling_of, manifest_of
from data_prep.shards.reindexing import write_tables
from data_prep.shards.writer import write_shard
from data_prep.splits import grouping_facts, merged_groups

PRELOADED = ["data_prep.shards.packing", "webdataset"]  # slow to import: once for all processes


def pack(
    recording: Recording, out: Path, stimuli_per_shard: int, workers: int, rules: ImageRules = DEFAULT_RULES
) -> ShardFolder:
    """Write `recording` as a shard folder and open it.

    Args:
        recording: to pack.
        out: the folder to create.
        stimuli_per_shard: stimuli in one tar.
        workers: number of packing processes.
        rules: for its images.

    Raises:
        BadInput: `out` exists, the recording contradicts itself, or one of its stimuli cannot be read.
        RunFailed: the disk is full, or a packing process was killed.
    """
    _check_recording(recording)
    with new_folder(out) as folder:
        jobs = shard_jobs(recording.splits, stimuli_per_shard)
        packed = _write_shards(recording, folder, jobs, workers, rules)
        dealt = recording if rules.copies == "as-dealt" else _with_copies_together(recording, jobs, packed)
        if dealt is not recording:
            for job in jobs:
                (folder / job.file).unlink()
            recording, jobs = dealt, shard_jobs(dealt.splits, stimuli_per_shard)
            packed = _write_shards(recording, folder, jobs, workers, rules)
        manifest = manifest_of(recording, packed, rules)
        try:
            write_tables(folder, manifest, packed.split_indexes(), ceiling_of)
        except CannotWrite as error:
            raise RunFailed(f"{out}: {error.reason}; nothing was packed") from None
    return ShardFolder(out)


def _check_recording(recording: Recording) -> None:
    """Refuse a recording that contradicts itself.

    Raises:
        BadInput: naming the recording and the fault.
    """
    ids, splits = recording.stimulus_ids, recording.splits
    if not ids:
        raise BadInput(f"{recording.name} has no stimuli")
    _check_names(recording)
    stimulus_id, count = Counter(ids).most_common(1)[0]
    if count > 1:
        raise BadInput(
            f"{recording.name}: stimulus id {stimulus_id!r} occurs more than once; each stimulus needs its own"
        )
    wrong = next((name for name in ids if not re.fullmatch(r"[A-Za-z0-9_-]+", name)), None)
    if wrong is not None:
        raise BadInput(f"{recording.name}: stimulus id {wrong!r} must consist of letters, digits, _ and - only")
    if len(splits) != len(ids) or not set(splits) <= set(SPLITS):
        raise BadInput(f"{recording.name}: every stimulus needs a split, one of {', '.join(SPLITS)}")
    if "train" not in splits:
        raise BadInput(f"{recording.name} has no stimulus in train, so no model can be fitted")


def _check_names(recording: Recording) -> None:
    names_of = {
        "the name of the recording": [recording.name],
        "the id of a site": [str(site["id"]) for site in recording.sites],
        "an object": sorted(set(recording.objects or ())),
        "the units": [recording.units],
    }
    for owner, names in names_of.items():
        for name in names:
            if not is_name(name):
                raise BadInput(f"{recording.name}: {owner} is {name[:100]!r}; it must be one printable line")


# ------------------------------------------------------------------------------------------------------ processes


@dataclass(frozen=True)
class ShardJob:
    """A shard to write: its split, its file name, and the positions of its stimuli in the recording."""

    split: str
    file: str
    positions: list[int]


def shard_jobs(splits: Sequence[str], stimuli_per_shard: int) -> list[ShardJob]:
    """All shards of a recording, in the source's order within a split.

    Args:
        splits: of each stimulus.
        stimuli_per_shard: stimuli in one tar.
    """
    jobs = []
    for split in SPLITS:
        positions = [position for position, name in enumerate(splits) if name == split]
        for number, start in enumerate(range(0, len(positions), stimuli_per_shard)):
            jobs.append(ShardJob(split, f"{split}-{number:06d}.tar", positions[start : start + stimuli_per_shard]))
    return jobs


def _with_copies_together(recording: Recording, jobs: Sequence[ShardJob], packed: PackedShards) -> Recording:
    """The recording, dealt again if its splits were dealt without knowing which stimuli show the same image.

    Copies show when the images are read. Few recordings have any, so all others are packed in one go.
    """
    first = first_copies_in(packed.split_indexes())
    if recording.deal is None or first is None:
        return recording
    positions = np.array([position for job in jobs for position in job.positions])
    number = np.empty(len(positions), np.int64)
    number[positions] = first
    splits = recording.deal(merged_groups(number))
    return recording if splits == recording.splits else recording.dealt_again(splits)


def _write_shards(
    recording: Recording, folder: Path, jobs: list[ShardJob], workers: int, rules: ImageRules
) -> PackedShards:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    counter = context.Value("q", 0)
    with (
        Progress(len(recording.stimulus_ids), "packing") as progress,
        ProcessPoolExecutor(min(workers, len(jobs)), context, _start_process, (recording, counter, rules)) as pool,
    ):
        with _ctrl_c_ignored():  # by the starting processes; one that is interrupted while starting prints a traceback
            futures = [pool.submit(write_one_shard, folder, job) for job in jobs]
        try:
            _watch(futures, counter, progress)
        except BrokenProcessPool:
            raise RunFailed("a packing process was killed (out of memory?); nothing was packed") from None
        finally:
            for future in futures:
                future.cancel()
    packed = PackedShards()
    for job, future in zip(jobs, futures, strict=True):
        packed.of_split.setdefault(job.split, []).append(future.result())
    return packed


@contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _watch(futures: list[Future[PackedShard]], counter: "Synchronized[int]", progress: Progress) -> None:
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()  # raises the exception of the process
        progress.advance(counter.value - progress.done)


# The work of a packing process: set when it starts, so that the recording is sent once rather than with each shard.
_recording: Recording
_counter: "Synchronized[int]"
_rules: ImageRules


def _start_process(recording: Recording, counter: "Synchronized[int]", rules: ImageRules) -> None:
    set_work(recording, counter, rules)
    serve_parent()


def set_work(recording: Recording, counter: "Synchronized[int]", rules: ImageRules = DEFAULT_RULES) -> None:
    """Set the recording that `write_one_shard` packs in this process, and the counter of finished stimuli."""
    global _recording, _counter, _rules
    _recording, _counter, _rules = recording, counter, rules


def write_one_shard(folder: Path, job: ShardJob) -> PackedShard:
    """Write a shard of the recording given to `set_work`.

    Raises:
        BadInput: a stimulus cannot be read.
        RunFailed: the disk is full.
    """
    notes = StimulusNotes(len(_recording.sites), grouping_facts(_recording.group_by), _rules)
    try:
        shard, index = write_shard(folder / job.file, _noted(_recording.read(job.positions), notes))
    except OSError as error:
        raise RunFailed(f"{error.filename or job.file}: {error.strerror}; nothing was packed") from None
    index = replace(index, pixel_hash=notes.pixel_hashes())
    return PackedShard(
        shard=shard,
        index=index,
        rates=notes.rates(),
        image_sizes=notes.image_sizes,
        image_notes=notes.image_notes,
        rounding_error=notes.rounding_error,
        trial_ends=notes.trial_ends,
        groups=notes.groups,
    )


def _noted(stimuli: Iterator[Stimulus], notes: StimulusNotes) -> Iterator[Stimulus]:
    """Yield the stimuli as they go into the shard, after noting and counting them."""
    for stimulus in stimuli:
        shown = notes.add(stimulus)
        with _counter.get_lock():
            _counter.value += 1
        yield shown
