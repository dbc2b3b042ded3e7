"""The weights of a kit, for launch/offline.py: where they are kept is set by environment variables.

python launch/offline_weights.py collect RECIPE|NETWORK ...    download; prints what is where, as JSON
python launch/offline_weights.py check NETWORK ...             check that a run will find them
"""

import contextlib
import json
import os
import sys
from pathlib import Path

from data_prep.common.errors import BadInput, run_command
from train.models.timm_networks import WEIGHT_PACKAGES, check_network_name, create_network
from train.run.recipe import ProbeRecipe, Recipe, load_recipe


def networks_of(word: str) -> list[str]:
    """The network whose pretrained weights a recipe names, if it does, or a network by its own name.

    Raises:
        BadInput: no such recipe, or no such network.
    """
    path = Path(word)
    if path.suffix not in (".yaml", ".yml"):
        check_network_name(word)
        return [word]
    try:
        recipe: Recipe | ProbeRecipe = load_recipe(path, Recipe)
    except BadInput as error:
        try:
            recipe = load_recipe(path, ProbeRecipe)
        except BadInput:
            raise error from None
    return [recipe.backbone.name] if recipe.backbone.weights == "pretrained" else []


def collect(words: list[str]) -> None:
    """Download the weights, and print which networks' are from the hub and which packages bring the others.

    Raises:
        BadInput: a name is unknown, or weights cannot be had.
    """
    networks = list(dict.fromkeys(name for word in words for name in networks_of(word)))
    packages = [WEIGHT_PACKAGES[name][0].replace("_", "-") for name in networks if name in WEIGHT_PACKAGES]
    hub = [name for name in networks if name not in WEIGHT_PACKAGES]
    with contextlib.redirect_stdout(sys.stderr):
        for name in hub:
            create_network(name, pretrained=True)
    print(json.dumps({"hub": hub, "packages": packages}))


def check(names: list[str]) -> None:
    """Create the networks from what was collected.

    Raises:
        BadInput: weights are not found.
    """
    for name in names:
        create_network(name, pretrained=True)
    print(f"{len(names)} networks")


def main() -> None:
    """Do what is asked for."""
    task, words = sys.argv[1], sys.argv[2:]
    os.makedirs(os.environ["HF_HUB_CACHE"], exist_ok=True)
    {"collect": collect, "check": check}[task](words)


if __name__ == "__main__":
    run_command(main)
