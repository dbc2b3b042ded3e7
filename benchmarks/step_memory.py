"""Peak memory and time of one full training step of a recipe: forward, backward, optimizer.

    python benchmarks/step_memory.py train/recipes/efficientnet_b6_528.yaml --batch 4 [--plain] [--sites 168]

Synthetic pictures, random weights. On a GPU the memory is what torch allocated, on a CPU the largest resident set of
the process, and what it was before the step. `--plain` switches gradient checkpointing off.
"""

import argparse
import resource
import time
from pathlib import Path

import numpy as np
import torch

from data_prep.manifest import Image, Manifest, Rates, Shard, Split
from train.loader import Batch
from train.recipe import Recipe, load_recipe
from train.schedule import build_optimizer
from train.tasks import Network, parameter_groups

GIB = 2**30


def manifest_of(sites: int, side: int) -> Manifest:
    """A recording that exists on paper only."""
    shard = Shard(file="train-000000.tar", stimuli=1, bytes=1, sha256="0" * 64)
    return Manifest(
        name="synthetic",
        simulated=True,
        provenance={},
        splits={"train": Split(stimuli=1, responses=True, shards=[shard])},
        sites=[{"id": str(site)} for site in range(sites)],
        classes=None,
        image=Image(width=side, height=side, mode="RGB"),
        rates=Rates(units="1", mean=[0.0] * sites, std=[1.0] * sites),
        response_window_ms=None,
    )


def synthetic_batch(size: int, side: int, sites: int, device: torch.device) -> Batch:
    """Random pictures and responses."""
    draw = np.random.default_rng(0)
    images = torch.from_numpy(draw.integers(0, 256, (size, 3, side, side), np.uint8))
    return Batch(
        images=images.contiguous(memory_format=torch.channels_last),
        positions=torch.arange(size),
        weight=torch.ones(size),
        rates=torch.from_numpy(draw.normal(size=(size, sites)).astype(np.float32)),
        labels=None,
        draws=None,
        stimuli=size,
        observed=size * sites,
    ).to(device)


def peak_bytes(device: torch.device) -> int:
    """The most memory so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def step(recipe: Recipe, batch: int, sites: int) -> str:
    """Build everything, do two steps (the first makes the optimizer's state) and describe them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    side = recipe.images.size or 224
    network = Network(recipe, manifest_of(sites, side), side).to(device, memory_format=torch.channels_last).train()
    optimizer = build_optimizer(recipe.optimizer, parameter_groups(network, recipe), device)
    data, before = synthetic_batch(batch, side, sites, device), peak_bytes(device)
    seconds = []
    for _ in range(2):
        started = time.monotonic()
        network.objective.parts(network(data.images), data, lambda own: own)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - started)
    checkpointing = "on" if recipe.backbone.gradient_checkpointing else "off"
    return (
        f"{recipe.backbone.name}, {batch} pictures of {side} px, {recipe.precision}, gradient checkpointing "
        f"{checkpointing}, {device.type}: peak {peak_bytes(device) / GIB:.1f} GiB ({before / GIB:.1f} before the "
        f"step), {seconds[-1]:.1f} s a step"
    )


def main() -> None:
    """Read the recipe, do the step, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sites", type=int, default=168)
    parser.add_argument("--plain", action="store_true")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe)
    change = {"weights": "random"} | ({"gradient_checkpointing": False} if options.plain else {})
    recipe = recipe.model_copy(update={"backbone": recipe.backbone.model_copy(update=change)})
    print(step(recipe, options.batch, options.sites))


if __name__ == "__main__":
    main()
