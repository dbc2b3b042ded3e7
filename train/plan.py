"""Estimate what a recipe needs, under every strategy, and how long it takes; or what a recording could decide.

python train/plan.py [RECIPE.yaml] --gpus 8 --memory 24 [--machines 1] [--data DIR | --sites 168 --classes 64]
    [--rates rates.json] [--section.key value ...]
python train/plan.py PROBE.yaml [--gpus 2] (--data DIR | --stimuli 22248) [--rates rates.json] [--section.key value ...]
python train/plan.py --runs RUN [RUN ...] [--scored 640] [--repetitions 12] [--presentations 8000] [--difference 0.02]
"""

import sys

from data_prep.common.command_line import parse
from data_prep.common.errors import BadInput, run_command
from train.planning.options import Plan, PowerPlan, ProbePlan, is_power, is_probe
from train.run.recipe import ProbeRecipe, Recipe
from train.run.recipe_command import parse_with_recipe

EXAMPLES = (
    "train/recipes/resnet50.yaml --gpus 8 --memory 24",
    "train/recipes/resnet50.yaml --gpus 2 --data data/it --rates rates.json",
)
POWER_EXAMPLES = ("--runs runs/a runs/b --scored 640 --repetitions 12 --presentations 8000",)
PROBE_EXAMPLES = ("train/recipes/probes/resnet50.yaml --gpus 2 --data data/it --rates rates.json",)


def parse_command_line(words: list[str]) -> tuple[Plan, Recipe]:
    """The options, and the recipe in them.

    Raises:
        BadInput: an option is unknown, out of bounds, or contradicts another.
    """
    options, recipe = parse_with_recipe(Plan, Recipe, words, EXAMPLES)
    _check(options)
    return options, recipe


def parse_probe(words: list[str]) -> tuple[ProbePlan, ProbeRecipe]:
    """`parse_command_line` of a probe."""
    options, recipe = parse_with_recipe(ProbePlan, ProbeRecipe, words, PROBE_EXAMPLES)
    _check(options)
    return options, recipe


def _check(options: Plan | ProbePlan) -> None:
    if options.gpus % options.machines:
        raise BadInput(f"machines: {options.gpus} GPUs cannot be divided evenly among {options.machines} machines")
    of_paper = [name for name in ("stimuli", "scored", "sites", "classes") if getattr(options, name, None)]
    if options.data is not None and of_paper:
        flags = " and ".join(f"--{name}" for name in of_paper)
        raise BadInput(f"{', '.join(of_paper)}: --data gives these numbers; leave out {flags}, or --data")


def main() -> None:
    """Parse, measure, print."""
    words = sys.argv[1:]
    if is_power(words):
        power_options = parse(PowerPlan, words, examples=POWER_EXAMPLES)
        from train.reporting.power.power_plan import plan_power

        plan_power(power_options)
        return
    if is_probe(words):
        probe_options, probe = parse_probe(words)

        from train.models.timm_networks import check_network_name
        from train.planning.probe_plan import plan_probe

        check_network_name(probe.backbone.name)
        plan_probe(probe_options, probe)
        return
    options, recipe = parse_command_line(words)

    from train.models.timm_networks import check_network_name
    from train.planning.training_plan import plan

    check_network_name(recipe.backbone.name)
    plan(options, recipe, words)


if __name__ == "__main__":
    run_command(main)
