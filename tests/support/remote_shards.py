"""Open, fetch and read shards behind a URL, and inspect their cache."""

from pathlib import Path

import torch

from data_prep.remote.cache import FetchSettings
from data_prep.shards.folder import ShardFolder
from train.data.loader import TrainLoader
from train.data.stimuli import RecordingStimuli


def opened(url, cache: Path, gib: float | None = None, timeout: float = 5.0) -> ShardFolder:
    return ShardFolder(url, FetchSettings(cache, gib, timeout))


def loader_of(shards: ShardFolder, rank=0, ranks=1, workers=0, block_shards=None, **options) -> TrainLoader:
    stimuli = RecordingStimuli(shards.split("train"), 32, **options)
    common = {"seed": 3, "global_size": 8, "per_device": None, "workers": workers, "pin": False}
    return TrainLoader(stimuli, rank=rank, ranks=ranks, block_shards=block_shards, **common)


def read(loader: TrainLoader, epoch: int = 0, first_step: int = 0) -> list[tuple[torch.Tensor, ...]]:
    steps = loader.epoch(epoch, first_step)
    return [(batch.positions, batch.images.clone(), batch.rates.nan_to_num(-1)) for step in steps for batch in step]


def assert_same(one: list, other: list) -> None:
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def train_shard(shards: ShardFolder, number: int = 0):
    return shards.manifest.splits["train"].shards[number]


def fetch(shards: ShardFolder, number: int = 0) -> bytes:
    """The bytes of a train shard."""
    with shards.split("train").files.local(train_shard(shards, number)) as path:
        return path.read_bytes()


def cached_files(cache: Path) -> dict[str, int]:
    """The files in a cache and their sizes."""
    return {path.name: path.stat().st_size for path in cache.iterdir() if path.name != "lock"}
