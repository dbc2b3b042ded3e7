"""Recordings and training runs that the benchmarks are measured on."""

import csv
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import simplejpeg
import torch
from harness import ROOT, run_checked
from PIL import Image

from train.data.batches import Batch
from train.run.recipe import Recipe

if TYPE_CHECKING:
    from train.finetuning.loop import Training

STRATEGIES = ("ddp", "zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
GIB = 2**30
GRAIN, NOISE = 10, 10  # pixels between the knots of the smooth part; amplitude of the rest, grey levels


def pack_simulated(out: Path, side: int, stimuli: int = 240) -> Path:
    """A small simulated recording of 12 sites, made by the real command.

    Args:
        out: shard folder to make.
        side: of its images, in pixels.
        stimuli: of all splits together.
    """
    simulated = ["--stimuli", stimuli, "--sites", 12, "--repetitions", 6, "--image-size", side]
    words = [sys.executable, "data_prep/pack.py", "simulated", "--out", out, *simulated]
    run_checked(words)
    return out


def pack_jpegs(out: Path, images: int, stimuli: int, side: int = 256) -> Path:
    """A recording of smooth random JPEGs, at 256 px about 20 kB each, of 12 sites that respond at random.

    Args:
        out: shard folder to make.
        images: that differ; they are drawn and encoded, which takes time.
        stimuli: as which they are packed, in turns, which takes little.
        side: of the images, in pixels.
    """
    source, draw = out.with_name(f"{out.name}_source"), np.random.default_rng(0)
    source.mkdir()
    for index in range(images):
        coarse = Image.fromarray(draw.integers(0, 256, (32, 32, 3), np.uint8)).resize(
            (side, side), Image.Resampling.BICUBIC
        )
        noisy = np.asarray(coarse, np.float32) + draw.normal(0, 3, (side, side, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(source / f"{index}.jpg", quality=90)
    rows = [f"s{index},{index % images}.jpg,o{index % 8}" for index in range(stimuli)]
    (source / "stimuli.csv").write_text("\n".join(["stimulus_id,image,object", *rows]) + "\n")
    np.save(source / "rates.npy", draw.gamma(2, 5, (stimuli, 12)).astype(np.float32))
    words = [sys.executable, "data_prep/pack.py", "folder", source, "--out", out, "--val-fraction", 0.05]
    words += ["--test-fraction", 0.05, "--stimuli-per-shard", 2048]
    run_checked(words)
    return out


def write_images(folder: Path, stimuli: int, size: int, sites: int = 4, held_out: float = 0.0) -> None:
    """A recording for the source `folder`; its images also lie as torchvision's ImageFolder wants them.

    Args:
        folder: to make.
        stimuli: number of images.
        size: side of the images in pixels.
        sites: number of sites, which respond at random.
        held_out: share of the stimuli, the last ones, that are val; the others are train.
    """
    draw = np.random.default_rng(0)
    (folder / "images" / "only_class").mkdir(parents=True)
    names = [f"images/only_class/{number:05d}.jpg" for number in range(stimuli)]
    for name in names:
        knots = draw.integers(0, 256, (size // GRAIN, size // GRAIN, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(knots).resize((size, size), Image.Resampling.BICUBIC), np.int16)
        image = (smooth + draw.integers(-NOISE, NOISE + 1, smooth.shape, np.int16)).clip(0, 255).astype(np.uint8)
        (folder / name).write_bytes(simplejpeg.encode_jpeg(image, quality=90, colorsubsampling="420"))
    with (folder / "stimuli.csv").open("w", newline="") as file:
        first_val = stimuli - round(held_out * stimuli)
        rows = [[Path(name).stem, name, "train" if row < first_val else "val"] for row, name in enumerate(names)]
        csv.writer(file).writerows([["stimulus_id", "image", "split"], *rows])
    np.save(folder / "rates.npy", draw.normal(size=(stimuli, sites)).astype(np.float32))


def setting_of(strategy: str) -> str:
    """The setting of a strategy in a recipe."""
    return strategy if strategy == "ddp" else str(ROOT / "ds_configs" / f"{strategy}.json")


def recipe_of(network: str, side: int, stimuli: int, **sections) -> Recipe:
    """A recipe with random weights and more epochs than any benchmark runs.

    Args:
        network: timm's name.
        side: of the images it sees, in pixels.
        stimuli: per optimizer step.
        sections: of the recipe, over the above.
    """
    given = {
        "backbone": {"name": network, "weights": "random"},
        "images": {"size": side},
        "batch": {"global_size": stimuli},
        "epochs": 10**6,
    }
    recipe = Recipe(**given | sections)
    recipe.check()
    return recipe


@contextmanager
def training(recipe: Recipe, data: Path | Sequence[Path | str], out: Path) -> Iterator["Training"]:
    """A run as train/finetune.py builds it, in training mode, before its first step.

    Args:
        recipe: of the run.
        data: shard folder, or several, or their URLs.
        out: run folder to make.
    """
    # Imported late: it is hundreds of MiB that not every benchmark's process should hold.
    from train.distributed.runtime import start_runtime
    from train.finetuning.setup.assembly import build
    from train.finetuning.setup.preparation import prepare
    from train.finetuning.setup.resume import starting_point

    job = prepare(recipe, [data] if isinstance(data, Path) else data, out, resume=False)
    with start_runtime(job.deepspeed, recipe.precision, recipe.deterministic) as runtime:
        built = build(job, starting_point(job, runtime), runtime)
        built.network.train()
        try:
            yield built
        finally:
            built.monitor.close()


def first_step(run: "Training") -> list[Batch]:
    """The micro-batches of a run's first optimizer step, on its device."""
    return [micro.to(run.runtime.device) for micro in next(run.loader.epoch(0))]


def synthetic_batch(size: int, side: int, sites: int, device: torch.device) -> Batch:
    """A batch of random images and responses."""
    draw = np.random.default_rng(0)
    images = torch.from_numpy(draw.integers(0, 256, (size, 3, side, side), np.uint8))
    return Batch(
        images=images.contiguous(memory_format=torch.channels_last),
        positions=torch.arange(size),
        weight=torch.ones(size),
        rates=torch.from_numpy(draw.normal(size=(size, sites)).astype(np.float32)),
        labels=None,
        draws=None,
        global_stimuli=size,
        global_observed=size * sites,
    ).to(device)


def peak_bytes(device: torch.device) -> int:
    """The most memory so far: of a GPU what torch allocated, of a CPU the largest resident set of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def finish(device: torch.device) -> None:
    """Wait until the GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
