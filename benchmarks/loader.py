"""Images per second on one core: our loader cold and warm, its limits, and other libraries on the same images.

    python benchmarks/loader.py [--stimuli 3200] [--size 256] [--batch 64] [--repeats 5] [--json FILE] [--figure PNG]

The images are JPEGs of smooth noise, quality 90, about 20 kB each, written as a shard folder and as a folder of
files; all are delivered in batches, at their own size. Everything runs in one thread of this process, with the files
in the page cache, and is counted per second of processor time, which what else runs on the machine disturbs less. All
sides take turns, so that a change of the machine's speed meets all of them; medians over the repeats. The two limits
are the bare JPEG decoder and a copy of decoded images in memory. Whatever says PIL delivers normalised float32 as its
documentation does; all others uint8, to be normalised on the device. Libraries that are not installed are named; see
benchmarks/rivals.py.
"""

import contextlib
import importlib.metadata
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import simplejpeg
import torch
from harness import Side, Turns, measure_in_turns, options_of, write_json
from rivals import DEFAULT, Read, count, rivals
from synthetic import write_images

from data_prep.shards.folder import ShardFolder
from data_prep.shards.packing import pack
from data_prep.sources.folder import Folder
from train.data.image_cache import ImageCaches
from train.data.loader import TrainLoader
from train.data.stimuli import RecordingStimuli
from train.run.recipe import Loader

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DECODE, COPY = "bare JPEG decode", "copy in memory"
LIMITS = (DECODE, COPY)


class Ours:
    """Our loader, in the order in which it trains.

    Args:
        shards: opened.
        size, batch: of images and batches.
        cache: as in a recipe.
    """

    def __init__(self, shards: ShardFolder, size: int, batch: int, cache: str):
        self._new = lambda: self._open(shards, size, batch, cache)
        self._loader = self._new()
        self._epoch = 0

    @staticmethod
    def _open(shards: ShardFolder, size: int, batch: int, cache: str) -> TrainLoader:
        stimuli = RecordingStimuli(
            shards.split("train"), size, responses=False, caches=ImageCaches(Loader(cache=cache))
        )
        return TrainLoader(stimuli, seed=0, global_size=batch, per_device=None, rank=0, ranks=1, workers=0, pin=False)

    def forget(self) -> None:
        """Start over with an empty cache."""
        del self._loader  # first, or the new loader would share the old one's images
        self._loader = self._new()

    def __call__(self) -> int:
        self._epoch += 1
        return count(batch.images for step in self._loader.epoch(self._epoch) for batch in step)


def ours_and_limits(packed: Path, size: int, batch: int) -> dict[str, Read]:
    """Our loader and the two limits on a shard folder; each reads all images once and returns their number."""
    shards = ShardFolder(packed)
    split = shards.split("train")
    encoded = [bytes(split.image(position)[0]) for position in range(len(split))]
    decoded = np.ones((len(split), size, size, 3), np.uint8)
    room = np.empty((batch, size, size, 3), np.uint8)
    # Other files, as far as our loader can tell: or it would find the images that `warm` keeps.
    filling = Ours(ShardFolder(shutil.copytree(packed, packed.with_name("again"))), size, batch, "ram")

    def copy() -> int:
        whole = len(decoded) // batch * batch
        for start in range(0, whole, batch):
            np.copyto(room, decoded[start : start + batch])
        return whole

    def fill() -> int:
        filling.forget()
        return filling()

    return {
        DECODE: lambda: count(simplejpeg.decode_jpeg(data)[None] for data in encoded),
        COPY: copy,
        "ours, cold (cache off)": Ours(shards, size, batch, "off"),
        "ours, cold, filling the cache": fill,
        "ours, warm": Ours(shards, size, batch, "ram"),
    }


def timed(read: Read) -> Side:
    """A side of the comparison: images per second of processor time."""

    def side() -> dict[str, float]:
        started = time.process_time()
        images = read()
        return {"images/s": images / (time.process_time() - started)}

    return side


def versions() -> str:
    """Versions of the compared libraries."""
    installed = []
    for package in ("torch", "webdataset", "torchvision", "simplejpeg", "mosaicml-streaming", "litdata", "ffcv"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(installed)


def chart(speeds: Turns, title: str) -> "Figure":
    """A bar for every side, as long as its median, with its range; ours stand out."""
    from matplotlib.figure import Figure

    names = sorted(speeds.values, key=speeds.median)
    medians = [speeds.median(name) for name in names]
    below = [speeds.median(name) - min(speeds.values[name]) for name in names]
    above = [max(speeds.values[name]) - speeds.median(name) for name in names]
    figure = Figure(figsize=(8, 0.34 * len(names) + 1.2), layout="constrained")
    axes = figure.subplots()
    colours = [colour_of(name) for name in names]
    axes.barh(names, medians, xerr=[below, above], color=colours, error_kw={"elinewidth": 1, "ecolor": "0.3"})
    for row, name in enumerate(names):
        axes.text(max(speeds.values[name]) * 1.12, row, f"{speeds.median(name):,.0f}", va="center", fontsize=8)
    axes.set(xscale="log", xlabel="images/s on one core (logarithmic)", title=title)
    axes.set_xlim(100, axes.get_xlim()[1] * 2)
    return figure


def colour_of(side: str) -> str:
    """Grey for a limit, one colour for ours and one for everybody else's."""
    if side in LIMITS:
        return "0.6"
    return "#d55e00" if side.startswith("ours") else "#0072b2"


def main() -> None:
    """Make the images, measure, print."""
    parser = options_of(__doc__, repeats=5)
    parser.add_argument("--stimuli", type=int, default=3200)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--figure", type=Path, help="draw a bar chart, .png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_images(folder, options.stimuli, options.size)
        packed = folder / "shards"
        pack(Folder(source=folder).open(), packed, stimuli_per_shard=1000, workers=1)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        sides = ours_and_limits(packed, options.size, options.batch)
        others, missing = rivals(folder / "images", sorted(packed.glob("*.tar")), folder, options.batch)
        measured = measure_in_turns({name: timed(read) for name, read in (sides | others).items()}, options.repeats)
        speeds = measured["images/s"]
    print(f"load average {os.getloadavg()[0]:.1f}, {versions()}")
    print(speeds.table("images/s", {"of bare decode": DECODE, "of WebDataset's default": DEFAULT}))
    for name, reason in missing.items():
        print(f"{name}: {reason}")
    write_json(options, {"images_per_second": speeds.values, "missing": missing})
    if options.figure:
        title = f"Reading {options.stimuli:,} JPEGs of {options.size} px in batches of {options.batch}"
        chart(speeds, title).savefig(options.figure, dpi=130)


if __name__ == "__main__":
    main()
