"""Pictures per second on one core: our loader cold and warm, its limits, and what others reach on the same pictures.

    python benchmarks/loader.py [--stimuli 3200] [--size 256] [--batch 64] [--repeats 5] [--json FILE]

The pictures are JPEGs of smooth noise, quality 90, about 20 kB each, written as a shard folder and as a folder of
files; all are delivered in batches, at their own size. Everything runs in one thread of this process, with the files
in the page cache, and is counted per second of processor time, which what else runs on the machine disturbs less. All
sides take turns, so that a change of the machine's speed meets all of them; medians over the repeats. The two limits
are the bare JPEG decoder and a copy of decoded pictures in memory.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import simplejpeg
import torch
import torchvision
import webdataset
from synthetic import write_pictures
from torch.utils.data import DataLoader

from data_prep.packing import pack
from data_prep.shards import ShardFolder
from data_prep.sources.folder import Folder
from train.loader import Stimuli, TrainLoader
from train.picture_cache import PictureCaches
from train.recipe import Loader

DECODE, DEFAULT = "bare JPEG decode", "WebDataset, its default (pil)"


def count(batches: Iterable[torch.Tensor]) -> int:
    """Read everything; returns how many pictures there were."""
    return sum(len(images) for images in batches)


class Ours:
    """Our loader, in the order in which it trains.

    Args:
        shards: opened.
        size, batch: of pictures and batches.
        cache: as in a recipe.
    """

    def __init__(self, shards: ShardFolder, size: int, batch: int, cache: str):
        self._new = lambda: self._open(shards, size, batch, cache)
        self._loader = self._new()
        self._epoch = 0

    @staticmethod
    def _open(shards: ShardFolder, size: int, batch: int, cache: str) -> TrainLoader:
        stimuli = Stimuli(shards.split("train"), size, responses=False, caches=PictureCaches(Loader(cache=cache)))
        return TrainLoader(stimuli, seed=0, global_size=batch, per_device=None, rank=0, ranks=1, workers=0, pin=False)

    def forget(self) -> None:
        """Begin anew, with nothing kept."""
        self._loader = None  # first, or the new loader would share what the old one keeps
        self._loader = self._new()

    def __call__(self) -> int:
        self._epoch += 1
        return count(batch.images for step in self._loader.epoch(self._epoch) for batch in step)


def webdataset_of(shards: ShardFolder, batch: int, *decoders) -> Callable[[], int]:
    """WebDataset's pipeline as in its documentation; float32 from `pil`, uint8 from a decoder of one's own."""
    urls = [str(path) for path in sorted(shards.folder.glob("train-*.tar"))]
    change = torchvision.transforms.ToTensor() if decoders == ("pil",) else torch.from_numpy

    def read() -> int:
        dataset = webdataset.WebDataset(urls, shardshuffle=False).decode(*decoders).to_tuple("jpg").map_tuple(change)
        return count(images for (images,) in dataset.batched(batch))

    return read


def quick_decoder(key: str, data: bytes) -> np.ndarray | None:
    """A decoder for WebDataset."""
    return simplejpeg.decode_jpeg(data) if key.endswith("jpg") else None


def contenders(folder: Path, shards: ShardFolder, size: int, batch: int) -> dict[str, Callable[[], int]]:
    """What is compared: each reads all pictures once and returns how many it has read."""
    split = shards.split("train")
    encoded = [bytes(split.image(position)[0]) for position in range(len(split))]
    decoded = np.ones((len(split), size, size, 3), np.uint8)
    room = np.empty((batch, size, size, 3), np.uint8)
    # Other files, as far as our loader can tell: or it would find the pictures that `warm` keeps.
    filling = Ours(ShardFolder(shutil.copytree(shards.folder, folder / "again")), size, batch, "ram")

    def copy() -> int:
        whole = len(decoded) // batch * batch
        for start in range(0, whole, batch):
            np.copyto(room, decoded[start : start + batch])
        return whole

    def fill() -> int:
        filling.forget()
        return filling()

    files = torchvision.datasets.ImageFolder(folder / "images", torchvision.transforms.ToTensor())
    return {
        DECODE: lambda: count(simplejpeg.decode_jpeg(data)[None] for data in encoded),
        "copy in memory": copy,
        "ours, cold (cache off)": Ours(shards, size, batch, "off"),
        "ours, cold, filling the cache": fill,
        "ours, warm": Ours(shards, size, batch, "ram"),
        DEFAULT: webdataset_of(shards, batch, "pil"),
        "WebDataset + simplejpeg": webdataset_of(shards, batch, quick_decoder),
        "torchvision ImageFolder (PIL)": lambda: count(images for images, _ in DataLoader(files, batch)),
    }


def measure(sides: dict[str, Callable[[], int]], repeats: int) -> dict[str, list[float]]:
    """Pictures per second of every side, in turns; the first turn, which fills caches, does not count."""
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, read in sides.items():
            started = time.process_time()
            pictures = read()
            if turn:
                speeds[name].append(pictures / (time.process_time() - started))
    return speeds


def table(speeds: dict[str, list[float]]) -> str:
    """Medians, ranges, and ratios to the bare decoder and to WebDataset's default, each within its own turn."""
    lines = [f"{'':34}{'images/s':>10}{'range':>19}{'of decode':>11}{'of default':>12}"]
    for name, found in speeds.items():
        ratios = [
            statistics.median(mine / other for mine, other in zip(found, speeds[base], strict=True))
            for base in (DECODE, DEFAULT)
        ]
        spread = f"{min(found):,.0f}-{max(found):,.0f}"
        lines.append(f"{name:34}{statistics.median(found):10,.0f}{spread:>19}{ratios[0]:11.2f}{ratios[1]:12.1f}")
    return "\n".join(lines)


def main() -> None:
    """Make the pictures, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stimuli", type=int, default=3200)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_pictures(folder, options.stimuli, options.size)
        shards = pack(Folder(source=folder).open(), folder / "shards", stimuli_per_shard=1000, workers=1)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        speeds = measure(contenders(folder, shards, options.size, options.batch), options.repeats)
    print(table(speeds))
    if options.json:
        options.json.write_text(json.dumps({"options": vars(options) | {"json": None}, "images_per_second": speeds}))


if __name__ == "__main__":
    main()
