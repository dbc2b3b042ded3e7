"""Images per second of a run: on a batch that stays on the device, and fed by the loader, cold and warm."""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import count, islice, repeat
from pathlib import Path

import torch
from synthetic import finish, synthetic_batch

from data_prep.shards.folder import ShardFolder
from train.data.batches import Batch
from train.data.loader import TrainLoader
from train.data.recordings import Recordings
from train.data.worker_limits import PREFETCHED
from train.finetuning.loop import Training
from train.finetuning.setup.preparation import training_stimuli
from train.run.recipe import Recipe

WARM_UP = 5  # steps, in which cuDNN and the allocator settle
TIMED = 3  # steps that tell how many there are in some seconds


def seconds_for(run: Training, steps: Iterable[list[Batch]]) -> tuple[float, int]:
    """Take optimizer steps; how long they took on the device, and how many images they saw."""
    finish(run.runtime.device)
    started, images = time.perf_counter(), 0
    for micros in steps:
        run.step(micros, 0)
        images += sum(len(micro.images) for micro in micros)
    finish(run.runtime.device)
    return time.perf_counter() - started, images


def images_per_second(run: Training, batches: Iterator[list[Batch]], seconds: float) -> float:
    """Train for about `seconds`, after a warm-up, all ranks the same number of steps; the slowest rank's images."""
    seconds_for(run, islice(batches, WARM_UP))
    step_seconds = max(of_all_ranks(run, seconds_for(run, islice(batches, TIMED))[0] / TIMED))
    took, images = seconds_for(run, islice(batches, max(math.ceil(seconds / step_seconds), TIMED)))
    return min(of_all_ranks(run, images / took))


def of_all_ranks(run: Training, value: float) -> list[float]:
    """The values of all ranks."""
    return run.runtime.all_gather(torch.tensor(value, dtype=torch.float64, device=run.runtime.device)).tolist()


def resident_batch(size: int, side: int, sites: int, device: torch.device) -> Batch:
    """A batch of random images and responses that stays on the device.

    What the loop reads on the host, which stimuli the batch consists of, stays there; reading it from a GPU would make
    every step wait.
    """
    batch = synthetic_batch(size, side, sites, device)
    positions, weight = batch.positions.cpu(), batch.weight.cpu()
    if device.type == "cuda":
        positions, weight = positions.pin_memory(), weight.pin_memory()
    return replace(batch, positions=positions, weight=weight)


def synthetic_rate(run: Training, batch: Batch, seconds: float) -> float:
    """Images per second with one batch that stays on the device: as if a loader cost nothing."""
    return images_per_second(run, repeat([batch]), seconds)


def fed_rate(run: Training, loader: TrainLoader, seconds: float) -> float:
    """Images per second with the batches of a loader."""
    return images_per_second(run, endless(loader), seconds)


def endless(loader: TrainLoader) -> Iterator[list[Batch]]:
    """The batches of a loader, epoch after epoch."""
    for epoch in count():
        yield from loader.epoch(epoch)


def loader_of(recipe: Recipe, data: Path, cache: str, *, workers: int = 0, pin: bool = False) -> TrainLoader:
    """A new loader of a recipe's training stimuli for one process.

    Args:
        recipe: of the run.
        data: shard folder.
        cache: of decoded images, see `loader.cache`.
        workers: decoding processes.
        pin: page-lock the batches.
    """
    settings = recipe.loader.model_copy(update={"cache": cache})
    recordings, recipe = Recordings([ShardFolder(data)]), recipe.model_copy(update={"loader": settings})
    fit, _ = training_stimuli(recordings, recordings.divide(recipe), recipe)
    size = recipe.batch.global_size
    return TrainLoader(fit, seed=0, global_size=size, per_device=None, rank=0, ranks=1, workers=workers, pin=pin)


def loader_rate(loader: TrainLoader, seconds: float, workers: int) -> float:
    """Images per second of a loader alone, with nobody who uses its batches.

    Batches that its workers have read ahead by the time the first one arrives do not count.
    """
    batches = endless(loader)
    for _ in islice(batches, 1 + PREFETCHED * workers):
        pass
    started, images = time.perf_counter(), 0
    while (took := time.perf_counter() - started) < seconds:
        images += sum(len(micro.images) for micro in next(batches))
    return images / took


def fill_cache(loader: TrainLoader) -> None:
    """Read an epoch, after which its images are cached; those that it leaves out are read in the next."""
    for _ in loader.epoch(0):
        pass
