"""What train/plan.py prints: what is planned, a table of strategies, and a recommendation."""

from data_prep.common.errors import BadInput
from data_prep.shards.manifest import Manifest
from data_prep.shards.storage import open_files
from train.data.recordings import combined_manifest
from train.planning.launch_command import command
from train.planning.memory import CONTEXT, GIB, HEADROOM, Choice, choices, recommended, usable
from train.planning.options import Plan
from train.planning.step_cost import Needs, measure, paper_manifest
from train.run.recipe import Recipe

SITES, CLASSES, SIDE = 168, 64, 224  # where no recording is given
HEADER = (
    *("strategy", "weights", "gradients", "optimizer", "activations", "buffers", "total", "host"),
    *("sent/step", "per_device", "pieces", "fits up to"),
)


def plan(options: Plan, recipe: Recipe, words: list[str]) -> None:
    """Measure what the recipe needs, and print the strategies and the recommended command.

    Args:
        options: of the command line.
        recipe: that they amount to.
        words: of the command line, which the recommended command repeats.

    Raises:
        BadInput: no strategy fits.
    """
    manifest = manifest_of(options)
    needs = measure(recipe, manifest)
    found = choices(recipe, needs, options.gpus, options.memory * GIB)
    print(introduction(options, recipe, needs, recipe.images.size or manifest.image.side), end="\n\n")
    print(table(found, options.gpus // options.machines), end="\n\n", flush=True)
    best = recommended(found)
    if best is None:
        raise BadInput(refusal(found, recipe, options))
    print(f"recommended: {best.strategy} with --batch.per_device {best.per_device}\n{command(best, options, words)}")


def manifest_of(options: Plan) -> Manifest:
    """The recording that is planned for: that of --data, or one on paper."""
    if options.data is not None:
        return combined_manifest([open_files(place).manifest() for place in options.data])
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
