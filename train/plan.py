"""Estimate what a recipe needs of each GPU under every strategy, and recommend a strategy and a batch.

python train/plan.py [RECIPE.yaml] --gpus 8 --memory 24 [--machines 1] [--data DIR | --sites 168 --classes 64]
    [--section.key value ...]
"""

import sys

import tyro

from data_prep.common.command_line import parse
from data_prep.common.errors import BadInput, run_command
from train.planning.options import Plan
from train.run.recipe import Recipe, leading_recipe


def parse_command_line(words: list[str]) -> tuple[Plan, Recipe]:
    """A command line, whose first word may be a recipe, as options and as the recipe they amount to.

    Raises:
        BadInput: anything in it that is unknown, out of bounds or contradictory.
    """
    before, words = leading_recipe(words, Recipe)
    missing = dict.fromkeys(("gpus", "memory"), tyro.MISSING)
    own = {"machines": 1, "sites": None, "classes": None}
    before = before or Recipe()
    given = dict(before) | {"data": before.places or None}
    options = parse(Plan, args=words, default=Plan.model_construct(**given, **missing, **own))
    recipe = Recipe(**{name: getattr(options, name) for name in Recipe.model_fields})
    recipe.check()
    if options.gpus % options.machines:
        raise BadInput(f"machines: {options.gpus} GPUs cannot be divided evenly among {options.machines} machines")
    if options.data is not None and (options.sites or options.classes):
        raise BadInput("sites and classes come from --data; leave out --sites and --classes, or --data")
    return options, recipe


def main() -> None:
    """Parse, measure, print."""
    words = sys.argv[1:]
    options, recipe = parse_command_line(words)

    from train.models.backbone import check_name
    from train.planning.tables import plan

    check_name(recipe.backbone.name)
    plan(options, recipe, words)


if __name__ == "__main__":
    run_command(main)
