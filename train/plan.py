"""Estimate what a recipe needs of each GPU under every strategy, and recommend a strategy and a batch.

python train/plan.py [RECIPE.yaml] --gpus 8 --memory 24 [--machines 1] [--data DIR | --sites 168 --classes 64]
    [--section.key value ...]
"""

import shlex
import sys
from typing import Annotated

import tyro
from pydantic import Field

from data_prep.common.command_line import Place, parse
from data_prep.common.errors import BadInput, run_command
from data_prep.remote.url import place_of
from data_prep.shards.files import files_at
from data_prep.shards.manifest import Manifest
from train.data.recordings import joined
from train.models.backbone import check_name
from train.planning.memory import CONTEXT, GIB, HEADROOM, Choice, choices, recommended, usable
from train.planning.step_cost import Needs, measure, paper_manifest
from train.run.recipe import MOST_RECORDINGS, Recipe, leading_recipe

SITES, CLASSES, SIDE = 168, 64, 224  # where no recording is given
OWN_OPTIONS = ("--data", "--sites", "--classes", "--gpus", "--memory", "--machines")
REPLACED = ("--batch.per-device", "--strategy")
HEADER = (
    *("strategy", "weights", "gradients", "optimizer", "activations", "buffers", "total", "host"),
    *("sent/step", "per_device", "pieces", "fits up to"),
)


class Plan(Recipe):
    """Estimate what a recipe needs of each GPU under every strategy, and recommend a strategy and a batch.

    A recipe (.yaml) as the first word gives the defaults: train/plan.py [RECIPE.yaml] --gpus 8 --memory 24 ...
    """

    gpus: int = Field(ge=1, le=1_000_000)
    """GPUs over all machines."""
    memory: float = Field(gt=0, le=1e6)
    """Memory of each GPU in GiB."""
    machines: int = Field(1, ge=1, le=1_000_000)
    """Machines, each with the same number of GPUs."""
    data: Annotated[list[Place], Field(min_length=1, max_length=MOST_RECORDINGS)] | None = None
    """Shard folder or its URL (or several), for the numbers of sites and classes and the size of the images."""
    sites: int | None = Field(None, ge=1, le=1_000_000)
    """Sites, where there is no shard folder; by default 168."""
    classes: int | None = Field(None, ge=1, le=1_000_000)
    """Classes, where there is no shard folder; by default 64."""


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
    check_name(recipe.backbone.name)
    if options.gpus % options.machines:
        raise BadInput(f"machines: {options.gpus} GPUs cannot be divided evenly among {options.machines} machines")
    if options.data is not None and (options.sites or options.classes):
        raise BadInput("sites and classes come from --data; leave out --sites and --classes, or --data")
    return options, recipe


def manifest_of(options: Plan) -> Manifest:
    """The recording that is planned for: that of --data, or one on paper."""
    if options.data is not None:
        return joined([files_at(place).manifest() for place in options.data])
    return paper_manifest(options.sites or SITES, options.classes or CLASSES, SIDE)


def introduction(options: Plan, recipe: Recipe, needs: Needs, side: int) -> str:
    """What is planned, and with what."""
    checkpointing = ", gradient checkpointing" if recipe.backbone.gradient_checkpointing else ""
    planned = usable(options.memory * GIB) / GIB
    return (
        f"{recipe.backbone.name}, images of {side} px, {recipe.precision}{checkpointing}, {recipe.optimizer.name}: "
        f"{needs.trainable / 4e6:.1f} million parameters are trained; activations {needs.per_stimulus / GIB:.3f} GiB a "
        f"stimulus\n{options.gpus} x {options.memory:g} GiB, of which {planned:.1f} each can be planned with (CUDA "
        f"takes {CONTEXT / GIB:g}, headroom {HEADROOM:.0%}); global batch {recipe.batch.global_size}"
    )


def table(found: list[Choice], gpus_per_machine: int) -> str:
    """Estimates in GiB per GPU, the host's per machine; what does not fit is shown with its smallest batch."""
    rows = [HEADER]
    for choice in found:
        memory = choice.memory
        held = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.buffers, memory.total)
        numbers = [f"{part / GIB:.2f}" for part in (*held, memory.host * gpus_per_machine, choice.sent)]
        batch = [str(choice.per_device), str(choice.pieces)] if choice.fits else ["-", "-"]
        rows.append((choice.strategy, *numbers, *batch, str(choice.largest)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(["GiB per GPU (host: per machine), estimated", *lines])


def command(choice: Choice, options: Plan, words: list[str]) -> str:
    """The command line that trains as recommended, with the recipe and the settings that the plan was given."""
    data = shlex.join(str(place_of(place)) for place in options.data) if options.data else "DIR"
    strategy = "" if options.strategy is None else f" --strategy {_strategy_setting(choice.strategy)}"
    recipe, flags = ([words[0]], words[1:]) if words[0].endswith((".yaml", ".yml")) else ([], words)
    return (
        f"{_launcher(choice.strategy, options)} {shlex.join(['train/finetune.py', *recipe])} --data {data} --out RUN"
        f"{' ' * bool(kept := settings_of(flags))}{shlex.join(kept)}{strategy} --batch.per_device {choice.per_device}"
    )


def _launcher(strategy: str, options: Plan) -> str:
    if options.gpus == 1 and strategy == "ddp":
        return "python"
    words = f"accelerate launch --config_file launch/accelerate/{strategy}.yaml --num_processes {options.gpus}"
    if options.machines == 1:
        return words
    machines = f"--num_machines {options.machines} --machine_rank RANK --main_process_ip HOST"
    return f"{words} {machines} --main_process_port 29500"


def _strategy_setting(name: str) -> str:
    return name if name == "ddp" else f"ds_configs/{name}.json"


def settings_of(words: list[str]) -> list[str]:
    """The words of a command line that are settings of the recipe and not what the plan decides or alone reads."""
    kept, dropping = [], False
    for word in words:
        if word.startswith("--"):
            dropping = word.partition("=")[0].replace("_", "-") in (*OWN_OPTIONS, *REPLACED)
        if not dropping:
            kept.append(word)
    return kept


def refusal(found: list[Choice], recipe: Recipe, options: Plan) -> str:
    """Why nothing fits, and what would help."""
    least = min(found, key=lambda choice: choice.memory.total)
    whole = recipe.backbone.trainable == "all"
    remedies = {
        "backbone.gradient_checkpointing": whole and not recipe.backbone.gradient_checkpointing,
        "precision bf16": recipe.precision == "fp32",
        "a smaller images.size": True,
        "more GPUs": recipe.loss.responses == "correlation" or options.gpus == 1,
        "backbone.trainable head": whole,
    }
    limit = max(usable(options.memory * GIB), 0)
    return (
        f"memory: nothing fits into GPUs of {options.memory:g} GiB, {limit / GIB:.2f} of which can be planned with: "
        f"{least.strategy} needs least, {least.memory.total / GIB:.2f} GiB for a batch of {least.per_device}; what "
        f"would help: {', '.join(name for name, helps in remedies.items() if helps)}"
    )


def main() -> None:
    """Parse, measure, print."""
    words = sys.argv[1:]
    options, recipe = parse_command_line(words)
    manifest = manifest_of(options)
    needs = measure(recipe, manifest)
    found = choices(recipe, needs, options.gpus, options.memory * GIB)
    print(introduction(options, recipe, needs, recipe.images.size or manifest.image.side), end="\n\n")
    print(table(found, options.gpus // options.machines), end="\n\n", flush=True)
    best = recommended(found)
    if best is None:
        raise BadInput(refusal(found, recipe, options))
    print(f"recommended: {best.strategy} with --batch.per_device {best.per_device}\n{command(best, options, words)}")


if __name__ == "__main__":
    run_command(main)
