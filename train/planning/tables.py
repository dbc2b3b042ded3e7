"""What train/plan.py prints: what is planned, a table of strategies, and a recommendation."""

from collections.abc import Sequence

from data_prep.common.errors import BadInput
from data_prep.shards.manifest import Manifest
from data_prep.shards.storage import open_files
from train.data.recordings import combined_manifest
from train.planning.launch_command import launch_command
from train.planning.memory import CUDA_CONTEXT, GIB, HEADROOM, usable_memory
from train.planning.options import Plan
from train.planning.recommendation import StrategyEstimate, estimate_strategies, recommend
from train.planning.step_cost import StepCost, measure_step, paper_manifest
from train.run.recipe import Recipe

SITES, CLASSES, SIDE = 168, 64, 224  # where no recording is given
HEADER = [
    *("strategy", "weights", "gradients", "optimizer", "activations", "buffers", "total", "host"),
    *("sent/step", "per_device", "micro-batches", "fits up to"),
]


def plan(options: Plan, recipe: Recipe, words: list[str]) -> None:
    """Measure a step of the recipe, and print the strategies and the recommended command.

    Args:
        options: of the command line.
        recipe: that they amount to.
        words: of the command line, which the recommended command repeats.

    Raises:
        BadInput: no strategy fits.
    """
    manifest = manifest_of(options)
    cost = measure_step(recipe, manifest)
    estimates = estimate_strategies(recipe, cost, options.gpus, options.memory * GIB)
    print(introduction(options, recipe, cost, recipe.images.size or manifest.image.side), end="\n\n")
    print(table(estimates, options.gpus // options.machines), end="\n\n", flush=True)
    best = recommend(estimates)
    if best is None:
        raise BadInput(refusal(estimates, recipe, options))
    print(f"recommended: {best.strategy} with --batch.per_device {best.per_device}")
    print(launch_command(best, options, words))


def manifest_of(options: Plan) -> Manifest:
    """The recording of --data, or a made-up one."""
    if options.data is not None:
        return combined_manifest([open_files(location).manifest() for location in options.data])
    return paper_manifest(options.sites or SITES, options.classes or CLASSES, SIDE)


def introduction(options: Plan, recipe: Recipe, cost: StepCost, side: int) -> str:
    """What is planned, and for which GPUs."""
    checkpointing = ", gradient checkpointing" if recipe.backbone.gradient_checkpointing else ""
    return (
        f"{recipe.backbone.name}, images of {side} px, {recipe.precision}{checkpointing}, {recipe.optimizer.name}: "
        f"{cost.trainable / 4e6:.1f} million parameters are trained; activations {cost.per_stimulus / GIB:.3f} GiB per "
        f"stimulus\n{options.gpus} x {options.memory:g} GiB, of which {usable_memory(options.memory * GIB) / GIB:.1f} "
        f"GiB each are usable (CUDA takes {CUDA_CONTEXT / GIB:g}, headroom {HEADROOM:.0%}); global batch "
        f"{recipe.batch.global_size}"
    )


def table(estimates: Sequence[StrategyEstimate], gpus_per_machine: int) -> str:
    """Estimates in GiB per GPU, the host's per machine; a strategy that does not fit has its smallest batch."""
    rows = [HEADER, *(_row(estimate, gpus_per_machine) for estimate in estimates)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(["Estimates in GiB per GPU (host: per machine)", *lines])


def _row(estimate: StrategyEstimate, gpus_per_machine: int) -> list[str]:
    memory = estimate.memory
    sizes = [
        memory.weights,
        memory.gradients,
        memory.optimizer,
        memory.activations,
        memory.buffers,
        memory.total,
        memory.host * gpus_per_machine,
        estimate.bytes_sent,
    ]
    batch = [str(estimate.per_device), str(estimate.accumulation_steps)] if estimate.fits else ["-", "-"]
    return [estimate.strategy, *(f"{size / GIB:.2f}" for size in sizes), *batch, str(estimate.largest_batch)]


def refusal(estimates: Sequence[StrategyEstimate], recipe: Recipe, options: Plan) -> str:
    """Why nothing fits, and what would help."""
    smallest = min(estimates, key=lambda estimate: estimate.memory.total)
    trains_all = recipe.backbone.trainable == "all"
    remedies = {
        "backbone.gradient_checkpointing": trains_all and not recipe.backbone.gradient_checkpointing,
        "precision bf16": recipe.precision == "fp32",
        "a smaller images.size": True,
        "more GPUs": recipe.loss.responses == "correlation" or options.gpus == 1,
        "backbone.trainable head": trains_all,
    }
    limit = max(usable_memory(options.memory * GIB), 0)
    return (
        f"memory: nothing fits into GPUs of {options.memory:g} GiB, of which {limit / GIB:.2f} GiB are usable: "
        f"{smallest.strategy} needs least, {smallest.memory.total / GIB:.2f} GiB for a batch of {smallest.per_device}; "
        f"what would help: {', '.join(name for name, helps in remedies.items() if helps)}"
    )
