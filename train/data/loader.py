"""Shards -> batches: which stimulus goes to which rank and when, decoded, with its responses and label.

The order comes from `train/data/order.py`; this file only reads what it says. Images leave the workers as uint8;
everything else happens on the device, in the network.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data_prep.common.errors import BadInput, RunFailed
from data_prep.common.worker_processes import serve_parent
from train.data.batches import Batch, Work
from train.data.order import (
    accumulation,
    augmentation_draws,
    evaluation_batches,
    global_batch,
    micro_batches,
    share,
    steps_per_epoch,
    stimuli_of_epoch,
)
from train.data.stimuli import StimulusSet

MAX_WORKERS = 8


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
        self.accumulation_steps = accumulation(self.global_size, ranks, per_device)
        self.largest_micro_batch = -(-self.global_size // (ranks * self.accumulation_steps))
        self.steps = steps_per_epoch(of_epoch, self.global_size)
        self._open(workers, pin)

    def _open(self, workers: int, pin: bool) -> None:
        self._schedule = _Schedule()
        self._batches = data_loader(self.stimuli, self._schedule, workers, pin)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[list[Batch]]:
        """Yield each global step's micro-batches, `accumulation_steps` of them, from `first_step` on."""
        self._schedule.items = self._work(epoch, first_step)
        batches = iter(self._batches)
        for _ in range(first_step, self.steps):
            yield [next(batches) for _ in range(self.accumulation_steps)]

    def _work(self, epoch: int, first_step: int) -> list[Work]:
        work = []
        for step in range(first_step, self.steps):
            batch = global_batch(self.seed, epoch, step, self.global_size, len(self.stimuli), self._layout)
            draws = augmentation_draws(self.seed, epoch, step, len(batch), self.draws) if self.draws else None
            work += [
                self.stimuli.work(micro, batch, draws)
                for micro in micro_batches(batch, self.rank, self.ranks, self.accumulation_steps)
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
            return self.dataset.prefetching(self.sampler)
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
    multiprocessing.get_context("forkserver").set_forkserver_preload(["train.data.stimuli"])
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
