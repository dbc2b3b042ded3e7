"""Shards -> batches: which stimulus goes to which rank and when, decoded, with its responses and label.

The order comes from `train/data/order.py`; this file only reads what it says. Images leave the workers as uint8;
everything else happens on the device, in the network.
"""

import hashlib
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data_prep.ceiling import TrialStatistics
from data_prep.common.errors import BadInput, RunFailed
from data_prep.common.worker_processes import serve_parent
from data_prep.shards.folder import ShardSplit
from train.data.batch_buffers import BatchMemory
from train.data.batches import Batch, Group, StimulusSet, Work
from train.data.decoding import decode_at
from train.data.image_cache import ImageCaches
from train.data.order import (
    Blocks,
    Layout,
    accumulation,
    augmentation_draws,
    evaluation_batches,
    global_batch,
    micro_batches,
    share,
    steps_per_epoch,
    stimuli_of_epoch,
)

MAX_WORKERS = 8


class Stimuli(StimulusSet):
    """The stimuli of a split, or of a part of it, with their responses and labels in memory and images on disk.

    Args:
        split: opened shards.
        size: side in pixels of the images to deliver.
        subset: positions in the split that are used, int64; all of them by default. Everything below counts within it.
        responses: whether to read the responses.
        classes: whether to read the labels.
        caches: where decoded images are kept; by default none are.
        apart: keep the subset's images apart from the split's others: what is read in every epoch, though little of
            the split, then stays where not all of them fit in.
        columns: which of a network's outputs are for its sites; by default all.
    """

    def __init__(
        self,
        split: ShardSplit,
        size: int,
        subset: np.ndarray | None = None,
        responses: bool = True,
        classes: bool = False,
        caches: ImageCaches | None = None,
        apart: bool = False,
        columns: slice = slice(None),
    ):
        self._split = split
        self._memory = BatchMemory()
        self.size, self.columns = size, columns
        self.subset = np.arange(len(split)) if subset is None else subset
        self._kept_as = np.arange(len(self.subset)) if apart else self.subset
        self._cache = None if caches is None else caches.of(split, size, self.subset if apart else None)
        self.stimulus_ids = [split.stimulus_ids[position] for position in self.subset]
        self.rates = split.rates(self.subset) if responses else None
        self.labels = split.labels(self.subset) if classes else None
        self.observed = None if self.rates is None else (~np.isnan(self.rates)).sum(axis=1)

    @property
    def parts(self) -> tuple["Stimuli"]:
        """Itself: one recording is the case of one."""
        return (self,)

    @property
    def split(self) -> ShardSplit:
        """Where they lie."""
        return self._split

    @property
    def recording(self) -> str:
        """The name of their recording."""
        return self._split.manifest.name

    def fingerprint(self) -> str:
        """A hash of the stimuli's ids and responses: it tells whether two scores rest on the same data."""
        return fingerprint(self.stimulus_ids, self.rates)

    def noise_of_rates(self) -> np.ndarray | None:
        """The noise variance of each response that is an average over trials: float64 (stimuli, sites).

        None where there are no responses or no single trials, or where the responses are no average of the trials.
        """
        statistics = None if self.rates is None else self.trial_statistics()
        if statistics is None:
            return None
        same = np.isclose(statistics.average, self.rates, rtol=1e-4, atol=1e-5, equal_nan=True).all()
        return statistics.noise_of_average() if same else None

    def trial_statistics(self) -> TrialStatistics | None:
        """What ceilings need to know of the single trials of these stimuli; None where there are none."""
        trials = [self._split.array(int(position), "trials.npy") for position in self.subset]
        return None if any(part is None for part in trials) else TrialStatistics.from_trials(trials)

    def rates_of(self, positions: np.ndarray) -> torch.Tensor | None:
        """See `StimulusSet.rates_of`."""
        return None if self.rates is None else torch.from_numpy(self.rates[positions])

    def groups_of(self, batch: np.ndarray) -> tuple[Group, ...]:
        """See `StimulusSet.groups_of`."""
        return () if self.rates is None else (Group(self.rates.shape[1], int(self.observed[batch].sum())),)

    def images(self, positions: np.ndarray) -> torch.Tensor:
        """See `StimulusSet.images`."""
        images = self._memory.take((len(positions), self.size, self.size, 3))
        pixels, kept_as = images.numpy(), self._kept_as[positions]
        missing = range(len(positions)) if self._cache is None else self._cache.read(kept_as, pixels)
        decoded: dict[int, int] = {}
        for row in missing:
            position = int(positions[row])
            if position in decoded:  # padding repeats a stimulus
                pixels[row] = pixels[decoded[position]]
                continue
            decode_at(self._split, int(self.subset[position]), pixels[row])
            decoded[position] = row
            if self._cache is not None:
                self._cache.write(int(kept_as[row]), pixels[row])
        return images

    def names(self) -> list[str]:
        """What each stimulus shows, or its id where nothing tells."""
        found = zip(self.subset, self.stimulus_ids, strict=True)
        return [self._split.label(int(place)) or name for place, name in found]

    def blocks(self, together: int) -> Blocks:
        """How the stimuli lie in shards, for an order that mixes `together` of these at a time."""
        shards = self._split.shards_of(self.subset)
        if (np.diff(shards) < 0).any():
            raise ValueError("stimuli that are read shard by shard must be in the order in which they are stored")
        return Blocks(tuple(np.unique(shards, return_counts=True)[1].tolist()), together)

    def layout(self, block_shards: int | None) -> Layout:
        """See `StimulusSet.layout`."""
        return None if block_shards is None else self.blocks(block_shards)

    def shards_to_fetch(self, positions: np.ndarray) -> np.ndarray:
        """See `StimulusSet.shards_to_fetch`; shards whose images are kept are left out."""
        if not self._split.is_remote:
            return np.empty(0, np.int64)
        if self._cache is not None:
            positions = positions[~self._cache.holds(self._kept_as[positions])]
        return np.unique(self._split.shards_of(self.subset[positions]))

    def shuffle_responses(self, seed: int) -> None:
        """See `StimulusSet.shuffle_responses`."""
        circle = np.random.default_rng([seed, len(self)]).permutation(len(self))
        shuffled = np.empty_like(self.rates)
        shuffled[circle] = self.rates[np.roll(circle, 1)]
        self.replace_responses(shuffled)

    def replace_responses(self, rates: np.ndarray) -> None:
        """Put others in place of the recorded responses: float (stimuli, sites), NaN = none."""
        self.rates = rates.astype(np.float32)
        self.observed = (~np.isnan(self.rates)).sum(axis=1)


def fingerprint(stimulus_ids: list[str], rates: np.ndarray | None) -> str:
    """A hash of stimuli's ids and responses."""
    found = hashlib.sha256("\n".join(stimulus_ids).encode())
    if rates is not None:
        found.update(rates.tobytes())
    return found.hexdigest()


class TrainLoader:
    """The training batches of one rank.

    Args:
        stimuli: to train on.
        seed, global_size, per_device: see `train/data/order.py`.
        rank, ranks: which share of each global batch is this process's.
        workers: decoding processes.
        pin: page-lock the batches.
        draws: random numbers per stimulus, for augmentation.
        block_shards: shards that are mixed at a time; by default all stimuli are shuffled.
    """

    def __init__(
        self,
        stimuli: StimulusSet,
        *,
        seed: int,
        global_size: int,
        per_device: int | None,
        rank: int,
        ranks: int,
        workers: int,
        pin: bool,
        draws: int = 0,
        block_shards: int | None = None,
    ):
        self.stimuli, self.seed, self.rank, self.ranks = stimuli, seed, rank, ranks
        self.draws = draws
        self._layout = stimuli.layout(block_shards)
        of_epoch = stimuli_of_epoch(len(stimuli), self._layout)
        self.global_size = min(global_size, of_epoch)
        if self.global_size < ranks:
            raise BadInput(
                f"{ranks} processes cannot share a global batch of {self.global_size} stimuli; "
                "raise batch.global_size or start fewer processes"
            )
        self.pieces = accumulation(self.global_size, ranks, per_device)
        self.largest_piece = -(-self.global_size // (ranks * self.pieces))
        self.steps = steps_per_epoch(of_epoch, self.global_size)
        self._open(workers, pin)

    def _open(self, workers: int, pin: bool) -> None:
        self._schedule = _Schedule()
        self._batches = data_loader(self.stimuli, self._schedule, workers, pin)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[list[Batch]]:
        """Yield each global step's micro-batches, `pieces` of them, from `first_step` on."""
        self._schedule.items = self._work(epoch, first_step)
        batches = iter(self._batches)
        for _ in range(first_step, self.steps):
            yield [next(batches) for _ in range(self.pieces)]

    def _work(self, epoch: int, first_step: int) -> list[Work]:
        work = []
        for step in range(first_step, self.steps):
            batch = global_batch(self.seed, epoch, step, self.global_size, len(self.stimuli), self._layout)
            draws = augmentation_draws(self.seed, epoch, step, len(batch), self.draws) if self.draws else None
            work += [
                self.stimuli.work(micro, batch, draws)
                for micro in micro_batches(batch, self.rank, self.ranks, self.pieces)
            ]
        return work


def evaluation_loader(
    stimuli: StimulusSet, *, size: int, rank: int, ranks: int, workers: int, pin: bool, skip: int = 0
) -> "DataLoader[Batch]":
    """A rank's share of a split, every stimulus once over all ranks; batches of `size`, the last one padded.

    The first `skip` batches are left out.
    """
    batches = evaluation_batches(len(stimuli), rank, ranks, size)[skip:]
    work = [stimuli.work(micro, micro.positions[micro.weight > 0]) for micro in batches]
    return data_loader(stimuli, work, workers, pin)


class _Batches(DataLoader):
    """Raises what a worker found wrong with the input, which torch would wrap in the worker's traceback.

    Raises:
        RunFailed: a worker was killed.
    """

    def __iter__(self):
        with self._fetched_ahead() as passed:
            try:
                for batch in super().__iter__():
                    if isinstance(batch, BadInput | RunFailed):
                        batch.alone = True
                        raise batch
                    passed()
                    yield batch
            except (RuntimeError, OSError, EOFError) as error:
                if self.num_workers == 0 or not _tells_of_a_death(error):
                    raise
                raise _worker_killed() from None

    def _fetched_ahead(self) -> AbstractContextManager[Callable[[], None]]:
        """As of `StimulusSet`; a stream says nothing of what it is going to read."""
        if isinstance(self.dataset, StimulusSet):
            return self.dataset.fetched_ahead(self.sampler)
        return nullcontext(lambda: None)


def _tells_of_a_death(error: Exception) -> bool:
    """Torch's word that a worker is gone, or what becomes of fetching a batch's memory from one."""
    said = str(error)
    if said.startswith("Caught "):  # by a worker that lives
        return False
    lost = isinstance(error, ConnectionError | EOFError | FileNotFoundError) or "ancdata" in said
    return lost or said.startswith("DataLoader worker (pid")


def _worker_killed() -> RunFailed:
    failure = RunFailed("a decoding process was killed (out of memory?); lower loader.workers or loader.cache_gib")
    failure.alone = True
    return failure


class _Schedule:
    """What the loader's workers do next; exchanged before each epoch, so that the workers can live on."""

    items: list[Work]

    def __init__(self):
        self.items = []

    def __iter__(self):
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


def data_loader(source: Dataset, work, workers: int, pin: bool) -> "DataLoader[Batch]":
    """Batches that workers read from `source`, as `work` tells; None where the source tells itself."""
    # Workers are forked from a server that has imported torch, so that starting some takes no seconds.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["train.data.loader"])
    return _Batches(
        source,
        batch_size=None,  # an item is a whole batch
        sampler=work,
        num_workers=workers,
        pin_memory=pin,
        persistent_workers=workers > 0,
        multiprocessing_context="forkserver" if workers else None,  # forking a process that has threads is unsafe
        prefetch_factor=4 if workers else None,
        generator=torch.Generator(),  # or starting workers would draw from the one that dropout draws from
        worker_init_fn=serve_parent if workers else None,
    )


def workers_per_rank(setting: int | None, ranks_on_machine: int, cores: int) -> int:
    """Decoding processes per rank: as set, else the cores each rank has beyond its first, at most 8."""
    return min(max(cores // ranks_on_machine - 1, 0), MAX_WORKERS) if setting is None else setting


def rank_positions(stimuli: int, rank: int, ranks: int) -> np.ndarray:
    """The positions a rank evaluates, in the order of `evaluation_loader`."""
    return share(np.arange(stimuli), rank, ranks)
