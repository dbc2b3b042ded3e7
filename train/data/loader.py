"""The batches of one rank, read by worker processes in the order that `train/data/order.py` gives.

Images leave the workers as uint8; everything else happens on the device, in the network.
"""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data_prep.common.errors import BadInput, RunFailed
from data_prep.common.worker_processes import serve_parent
from train.data.batches import Batch, BatchRequest
from train.data.order import (
    MicroBatch,
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
from train.data.worker_limits import PREFETCHED

MAX_WORKERS = 16  # more would rather take memory, for the batches that each reads ahead, than help


class TrainLoader:
    """The training batches of one rank.

    Args:
        stimuli: to train on.
        seed: of the order.
        global_size: stimuli in a global batch; fewer where an epoch has fewer.
        per_device: the most stimuli in a micro-batch; by default a rank's whole share.
        rank, ranks: which share of each global batch is this process's.
        workers: decoding processes.
        pin: page-lock the batches.
        draws: number of random numbers per stimulus, for augmentation.
        block_shards: shards that are mixed at a time; by default all stimuli are shuffled.

    Attributes:
        accumulation_steps: micro-batches per global step.
        largest_micro_batch, smallest_micro_batch: the most and the fewest stimuli in one, over all ranks.
        steps: global steps per epoch.

    Raises:
        BadInput: there are more ranks than stimuli in a global batch.
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
        epoch_size = stimuli_of_epoch(len(stimuli), self._layout)
        self.global_size = min(global_size, epoch_size)
        if self.global_size < ranks:
            raise BadInput(
                f"{ranks} processes cannot share a global batch of {self.global_size} stimuli; "
                "raise batch.global_size or start fewer processes"
            )
        self.accumulation_steps = accumulation(self.global_size, ranks, per_device)
        self.largest_micro_batch = -(-self.global_size // (ranks * self.accumulation_steps))
        # Where there are fewer stimuli than micro-batches, those without any repeat one.
        self.smallest_micro_batch = max(self.global_size // ranks // self.accumulation_steps, 1)
        self.steps = steps_per_epoch(epoch_size, self.global_size)
        self._open(workers, pin)

    def _open(self, workers: int, pin: bool) -> None:
        self._schedule = _Schedule()
        self._batches = data_loader(self.stimuli, self._schedule, workers, pin)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[list[Batch]]:
        """Yield each global step's micro-batches, `accumulation_steps` of them, from `first_step` on."""
        self._schedule.requests = self._requests(epoch, first_step)
        batches = iter(self._batches)
        for _ in range(first_step, self.steps):
            yield [next(batches) for _ in range(self.accumulation_steps)]

    def stimuli_of_epoch(self, epoch: int) -> np.ndarray:
        """The positions of all ranks' stimuli of an epoch, in order, int64."""
        return np.concatenate([self._global_batch(epoch, step) for step in range(self.steps)])

    def own_stimuli(self, epoch: int) -> np.ndarray:
        """The positions of this rank's stimuli of an epoch, in order, int64."""
        parts = [
            micro_batch.positions[micro_batch.weight > 0]
            for step in range(self.steps)
            for micro_batch in self._micro_batches(self._global_batch(epoch, step))
        ]
        return np.concatenate(parts)

    def _global_batch(self, epoch: int, step: int) -> np.ndarray:
        return global_batch(self.seed, epoch, step, self.global_size, len(self.stimuli), self._layout)

    def _micro_batches(self, batch: np.ndarray) -> list[MicroBatch]:
        return micro_batches(batch, self.rank, self.ranks, self.accumulation_steps)

    def _requests(self, epoch: int, first_step: int) -> list[BatchRequest]:
        requests = []
        for step in range(first_step, self.steps):
            batch = self._global_batch(epoch, step)
            draws = augmentation_draws(self.seed, epoch, step, len(batch), self.draws) if self.draws else None
            requests += [self.stimuli.request(micro_batch, batch, draws) for micro_batch in self._micro_batches(batch)]
        return requests


def evaluation_loader(
    stimuli: StimulusSet, *, size: int, rank: int, ranks: int, workers: int, pin: bool, skip: int = 0
) -> "DataLoader[Batch]":
    """A rank's share of a split, every stimulus once over all ranks.

    Args:
        stimuli: of the split.
        size: stimuli in a batch; the last one is padded.
        rank, ranks: whose share.
        workers: decoding processes.
        pin: page-lock the batches.
        skip: batches to leave out at the start.
    """
    batches = evaluation_batches(len(stimuli), rank, ranks, size)[skip:]
    requests = [stimuli.request(batch, batch.positions[batch.weight > 0]) for batch in batches]
    return data_loader(stimuli, requests, workers, pin)


class _BatchLoader(DataLoader):
    """Raises the workers' errors about the input unchanged; torch would wrap them in the worker's traceback.

    Raises:
        RunFailed: a worker was killed.
    """

    def __iter__(self):
        with self._prefetching() as advance:
            try:
                for batch in super().__iter__():
                    if isinstance(batch, BadInput | RunFailed):
                        batch.on_one_rank = True
                        raise batch
                    advance()
                    is_in_files = self.num_workers > 0 and not self.pin_memory
                    yield batch.with_copied_facts() if is_in_files else batch
            except (RuntimeError, OSError, EOFError) as error:
                if (exhausted := _exhausted(error)) is not None:
                    raise exhausted from None
                if self.num_workers == 0 or not _shows_dead_worker(error):
                    raise
                raise _worker_killed() from None

    def _prefetching(self) -> AbstractContextManager[Callable[[], None]]:
        """See `StimulusSet.prefetching`; a stream does not know what it will read."""
        if isinstance(self.dataset, StimulusSet):
            return self.dataset.prefetching(self.sampler)
        return nullcontext(lambda: None)


def _shows_dead_worker(error: Exception) -> bool:
    """Whether torch reports a dead worker, or fetching a batch's memory failed as it does after one has died."""
    message = str(error)
    if message.startswith("Caught "):  # by a worker that is alive
        return False
    lost = isinstance(error, ConnectionError | EOFError | FileNotFoundError) or "ancdata" in message
    return lost or message.startswith("DataLoader worker (pid")


def _exhausted(error: Exception) -> RunFailed | None:
    """The failure to report where the system has no room for the batches any more; None for another error."""
    message = str(error)
    if "unable to allocate shared memory" in message:
        failure = RunFailed(
            "no room for a batch in /dev/shm: lower loader.workers, or give it more (docker --shm-size)"
        )
    elif "Too many open files" in message:
        failure = RunFailed("too many open files for the decoding processes: raise `ulimit -n` or lower loader.workers")
    else:
        return None
    failure.on_one_rank = True
    return failure


def _worker_killed() -> RunFailed:
    failure = RunFailed("a decoding process was killed (out of memory?); lower loader.workers or loader.cache_gib")
    failure.on_one_rank = True
    return failure


class _Schedule:
    """The workers' next requests, replaced before each epoch so that the workers can persist."""

    def __init__(self):
        self.requests: list[BatchRequest] = []

    def __iter__(self) -> Iterator[BatchRequest]:
        return iter(self.requests)

    def __len__(self) -> int:
        return len(self.requests)


def data_loader(
    source: Dataset, schedule: "Sequence[BatchRequest] | _Schedule | None", workers: int, pin: bool
) -> "DataLoader[Batch]":
    """Batches that workers read from `source`: those that `schedule` requests, or where None the source's choice."""
    # Workers are forked from a server that has imported torch; otherwise each would take seconds to start.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["train.data.stimuli"])
    return _BatchLoader(
        source,
        batch_size=None,  # an item is a whole batch
        sampler=schedule,
        num_workers=workers,
        pin_memory=pin,
        persistent_workers=workers > 0,
        multiprocessing_context="forkserver" if workers else None,  # forking a process that has threads is unsafe
        prefetch_factor=PREFETCHED if workers else None,
        generator=torch.Generator(),  # otherwise starting workers would draw from the generator of dropout
        worker_init_fn=serve_parent if workers else None,
    )


def workers_per_rank(setting: int | None, cores: int) -> int:
    """Decoding processes per rank: the setting, or by default all but one of a rank's cores, at most 16."""
    return min(cores - 1, MAX_WORKERS) if setting is None else setting


def rank_positions(stimuli: int, rank: int, ranks: int) -> np.ndarray:
    """The positions a rank evaluates, in the order of `evaluation_loader`."""
    return share(np.arange(stimuli), rank, ranks)
