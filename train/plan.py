"""Estimate what a recipe needs of each GPU under every strategy, and recommend a strategy and a batch.

python train/plan.py [RECIPE.yaml] --gpus 8 --memory 24 [--machines 1] [--data DIR | --sites 168 --classes 64]
    [--section.key value ...]
"""

import sys

from data_prep.common.errors import BadInput, run_command
from train.planning.options import Plan
from train.run.recipe import Recipe
from train.run.recipe_command import parse_with_recipe

EXAMPLES = (
    "train/recipes/resnet50.yaml --gpus 8 --memory 24",
    "--backbone.name resnet152 --gpus 16 --memory 80 --machines 2 --data data/it",
)


def parse_command_line(words: list[str]) -> tuple[Plan, Recipe]:
    """The options, and the recipe in them.

    Raises:
        BadInput: an option is unknown, out of bounds, or contradicts another.
    """
    options, recipe = parse_with_recipe(Plan, Recipe, words, EXAMPLES)
    if options.gpus % options.machines:
        raise BadInput(f"machines: {options.gpus} GPUs cannot be divided evenly among {options.machines} machines")
    if options.data is not None and (options.sites or options.classes):
        raise BadInput("sites and classes come from --data; leave out --sites and --classes, or --data")
    return options, recipe


def main() -> None:
    """Parse, measure, print."""
    words = sys.argv[1:]
    options, recipe = parse_command_line(words)

    from train.models.timm_networks import check_network_name
    from train.planning.tables import plan

    check_network_name(recipe.backbone.name)
    plan(options, recipe, words)


if __name__ == "__main__":
    run_command(main)
