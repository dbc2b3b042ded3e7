"""What train/plan.py prints of a training: the plan, a table of strategies, a recommendation, and how long it takes."""

from collections.abc import Sequence
from pathlib import Path

from data_prep.common.errors import BadInput
from data_prep.shards.manifest import Manifest
from train.planning.launch_command import launch_command
from train.planning.memory import CUDA_CONTEXT, GIB, HEADROOM, usable_memory
from train.planning.operations import speed_settings, training_flops
from train.planning.options import Plan
from train.planning.rates import Rates, load_rates
from train.planning.recommendation import StrategyEstimate, estimate_strategies, recommend
from train.planning.recording_sizes import manifest_of, training_stimuli
from train.planning.step_cost import StepCost, measure_step
from train.planning.time_tables import training_page
from train.planning.training_time import TrainingWork, nearest, training_time
from train.run.recipe import Recipe

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
    rates = [load_rates(path) for path in options.rates or []]
    options = options.model_copy(update={"memory": options.memory or memory_of(rates, options)})
    manifest = manifest_of(options)
    cost = measure_step(recipe, manifest)
    estimates = estimate_strategies(recipe, cost, options.gpus, gpu_bytes(options))
    print(introduction(options, recipe, cost, recipe.images.size or manifest.image.side), end="\n\n")
    print(table(estimates, options.gpus // options.machines), end="\n\n", flush=True)
    best = recommend(estimates)
    if best is None:
        raise BadInput(refusal(estimates, recipe, options))
    if rates:
        timed = wanted(recipe, estimates) or best
        work = training_work(options, recipe, manifest, cost, timed)
        print(time_of(work, rates, timed), end="\n\n")
    on_cpu = bool(rates) and not rates[0].place.on_gpu
    print(f"recommended: {best.strategy} with --batch.per_device {best.per_device}")
    print(launch_command(best, options, words, on_cpu=on_cpu))


def gpu_bytes(options: Plan) -> float:
    """The memory of each GPU, given or measured."""
    assert options.memory is not None
    return options.memory * GIB


def memory_of(rates: Sequence[Rates], options: Plan) -> float:
    """GiB of each GPU, or of each process's part of a machine, of the machines whose rates are given.

    Raises:
        BadInput: no rates are given either.
    """
    if not rates:
        raise BadInput("memory: give the GiB of each GPU by --memory, or the machine's --rates")
    place = rates[0].place
    return (place.device_bytes or place.host_bytes / (options.gpus / options.machines)) / GIB


def wanted(recipe: Recipe, estimates: Sequence[StrategyEstimate]) -> StrategyEstimate | None:
    """The estimate of the strategy that the recipe names, if it fits."""
    name = None if recipe.strategy is None else Path(recipe.strategy).stem
    return next((estimate for estimate in estimates if estimate.strategy == name and estimate.fits), None)


def training_work(
    options: Plan, recipe: Recipe, manifest: Manifest, cost: StepCost, estimate: StrategyEstimate
) -> TrainingWork:
    """The training whose time is planned, divided as the recipe says, or else as its strategy fits."""
    stimuli = training_stimuli(options, recipe, manifest)
    per_device = recipe.batch.per_device or (estimate.per_device if estimate.accumulation_steps > 1 else None)
    batch = recipe.batch.model_copy(update={"per_device": per_device})
    recipe = recipe.model_copy(update={"batch": batch})
    return TrainingWork(
        recipe=recipe,
        settings=speed_settings(recipe, stimuli.images.side),
        fit=stimuli.fit,
        selection=stimuli.selection,
        side=stimuli.images.side,
        image_bytes=stimuli.images.bytes,
        flops=training_flops(recipe, manifest),
        cost=cost,
        strategy=estimate.strategy,
        processes=options.gpus,
        machines=options.machines,
        recording=stimuli.name,
    )


def time_of(work: TrainingWork, rates: Sequence[Rates], estimate: StrategyEstimate) -> str:
    """How long it takes, in words.

    Raises:
        BadInput: no training was measured.
    """
    measurement = nearest(work, rates)
    if measurement is None:
        raise BadInput("rates: no training was measured, because the check failed; run launch/check.sh --json again")
    return training_page(training_time(work, measurement), estimate.largest_batch)


def introduction(options: Plan, recipe: Recipe, cost: StepCost, side: int) -> str:
    """What is planned, and for which GPUs."""
    checkpointing = ", gradient checkpointing" if recipe.backbone.gradient_checkpointing else ""
    return (
        f"{recipe.backbone.name}, images of {side} px, {recipe.precision}{checkpointing}, {recipe.optimizer.name}: "
        f"{cost.trainable / 4e6:.1f} million parameters are trained; activations {cost.per_stimulus / GIB:.3f} GiB per "
        f"stimulus\n{options.gpus} x {options.memory:g} GiB, of which {usable_memory(gpu_bytes(options)) / GIB:.1f} "
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
    limit = max(usable_memory(gpu_bytes(options)), 0)
    return (
        f"memory: nothing fits into GPUs of {options.memory:g} GiB, of which {limit / GIB:.2f} GiB are usable: "
        f"{smallest.strategy} needs least, {smallest.memory.total / GIB:.2f} GiB for a batch of {smallest.per_device}; "
        f"what would help: {', '.join(name for name, helps in remedies.items() if helps)}"
    )
