"""Peak memory and time of one full training step of a recipe: forward, backward, optimizer.

    python benchmarks/step_memory.py train/recipes/efficientnet_b6_528.yaml --batch 4 [--plain] [--sites 168]

Synthetic images, random weights. On a GPU the memory is what torch allocated, on a CPU the largest resident set of
the process, and what it was before the step. `--plain` switches gradient checkpointing off.
"""

import argparse
import time
from pathlib import Path

import torch
from synthetic import GIB, finish, peak_bytes, synthetic_batch

from train.finetuning.schedule import build_optimizer
from train.models.network import Network, parameter_groups
from train.planning.step_cost import paper_manifest
from train.run.recipe import Recipe, load_recipe


def step(recipe: Recipe, batch: int, sites: int) -> str:
    """Build everything, do two steps (the first makes the optimizer's state) and describe them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    side = recipe.images.size or 224
    manifest = paper_manifest(sites, 0, side)
    network = Network(recipe, manifest, side).to(device, memory_format=torch.channels_last).train()
    optimizer = build_optimizer(recipe.optimizer, parameter_groups(network, recipe), device)
    data, before = synthetic_batch(batch, side, sites, device), peak_bytes(device)
    seconds = []
    for _ in range(2):
        started = time.monotonic()
        network.objective.parts(network(data.images), data, lambda own: own)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        finish(device)
        seconds.append(time.monotonic() - started)
    checkpointing = "on" if recipe.backbone.gradient_checkpointing else "off"
    return (
        f"{recipe.backbone.name}, {batch} images of {side} px, {recipe.precision}, gradient checkpointing "
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
