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
from train.planning.recording_sizes import TrainingStimuli, manifest_of, training_stimuli
from train.planning.step_cost import StepCost, measure_step
from train.planning.training_time import TrainingTime, TrainingWork, has_cores_to_decode, nearest, training_time
from train.planning.wording import LARGE, duration, extrapolation, lines_of, origin, shares
from train.run.recipe import Recipe

HEADER = [
    *("strategy", "weights", "gradients", "optimizer", "activations", "buffers", "total", "host"),
    *("sent/step", "per_device", "micro-batches", "fits up to"),
]

MOST_REMEDIES = 4  # that are named


def plan(options: Plan, recipe: Recipe, words: list[str]) -> None:
    """Measure a step of the recipe, and print the strategies and the recommended command.

    Args:
        options: of the command line.
        recipe: that they amount to.
        words: of the command line, which the recommended command repeats.

    Raises:
        BadInput: no strategy fits, or there are rates without a training.
    """
    rates = [load_rates(path) for path in options.rates or []]
    if rates and not any(one.training for one in rates):
        raise BadInput("rates: no training was measured; run launch/check.sh --json FILE --recipe RECIPE.yaml")
    options = options.model_copy(update={"memory": options.memory or memory_of(rates, options)})
    manifest = manifest_of(options)
    stimuli = training_stimuli(options, recipe, manifest) if rates else None
    on_cpu = bool(rates) and not rates[0].place.on_gpu
    cost = measure_step(recipe, manifest)
    estimates = estimate_strategies(recipe, cost, options.gpus, gpu_bytes(options))
    print(introduction(options, recipe, cost, recipe.images.size or manifest.image.side, on_cpu), end="\n\n")
    print(table(estimates, options.gpus // options.machines), end="\n\n", flush=True)
    best = recommend(estimates)
    if best is None:
        raise BadInput(refusal(estimates, recipe, options))
    if stimuli is not None:
        timed = wanted(recipe, estimates) or best
        work = training_work(options, recipe, manifest, stimuli, cost, timed)
        time = training_time(work, nearest(work, rates))
        print(training_page(time, timed.largest_batch), end="\n\n")
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
    options: Plan,
    recipe: Recipe,
    manifest: Manifest,
    stimuli: TrainingStimuli,
    cost: StepCost,
    estimate: StrategyEstimate,
) -> TrainingWork:
    """The training whose time is planned, divided as the recipe says, or else as its strategy fits."""
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


def introduction(options: Plan, recipe: Recipe, cost: StepCost, side: int, on_cpu: bool) -> str:
    """What is planned, and for which GPUs or processes on the CPU."""
    checkpointing = ", gradient checkpointing" if recipe.backbone.gradient_checkpointing else ""
    usable, taken_by = usable_memory(gpu_bytes(options)) / GIB, "the program" if on_cpu else "CUDA"
    return (
        f"{recipe.backbone.name}, images of {side} px, {recipe.precision}{checkpointing}, {recipe.optimizer.name}: "
        f"{cost.trainable / 4e6:.1f} million parameters are trained; activations {cost.per_stimulus / GIB:.3f} GiB per "
        f"stimulus\n{options.gpus} x {options.memory:.4g} GiB, of which {usable:.1f} GiB each are usable ({taken_by} "
        f"takes {CUDA_CONTEXT / GIB:g}, headroom {HEADROOM:.0%}); global batch {recipe.batch.global_size}"
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
        f"memory: nothing fits into GPUs of {options.memory:.4g} GiB, of which {limit / GIB:.2f} GiB are usable: "
        f"{smallest.strategy} needs least, {smallest.memory.total / GIB:.2f} GiB for a batch of {smallest.per_device}; "
        f"what would help: {', '.join(name for name, helps in remedies.items() if helps)}"
    )


# ------------------------------------------------------------------------------------------------------------ how long


def training_page(time: TrainingTime, largest_batch: int | None) -> str:
    """How long a training takes.

    Args:
        time: of it.
        largest_batch: the most stimuli that fit into a pass of its strategy; None if it is not known.
    """
    recipe, work = time.work.recipe, time.work
    rows = {"first step after": duration(time.start), "first epoch": duration(time.first_epoch)}
    if time.decoding > 0 and time.cached > 0 and not time.starts_in_closed_form:
        rows["first epoch"] += "   images are decoded"
    if recipe.epochs > 1:
        rows["each later epoch"] = duration(time.later_epoch)
        if time.cached == 1:
            rows["each later epoch"] += "   images are kept decoded"
        elif time.cached > 0:
            rows["each later epoch"] += f"   {time.cached:.0%} of the images are kept decoded"
    epochs = "1 epoch" if recipe.epochs == 1 else f"{recipe.epochs} epochs"
    rows["whole run"] = f"at most {duration(time.whole)} ({epochs}"
    if time.soonest is not None:
        patience = recipe.early_stopping.patience
        rows["whole run"] += f"; early stopping ends it after {duration(time.soonest)} if none of {patience} improves"
    rows["whole run"] += ")"
    speed = work.global_size / (time.step + time.images)
    rows["speed"] = (
        f"{speed:,.0f} images/s; a step of {work.global_size} images takes {duration(time.step + time.images)}"
    )
    rows["of an epoch"] = shares(time.parts())
    place = time.measurement.rates.place
    lines = [f"How long under {work.strategy} (rates of {origin(place)})", *lines_of(rows)]
    lines += [f"what limits: {phrase}" for phrase in training_limits(time, largest_batch)]
    lines += extrapolation(time.measurement.differences)
    if time.unmeasured:
        lines.append(f"not counted: {'; '.join(time.unmeasured)}")
    return "\n".join(lines)


def training_limits(time: TrainingTime, largest_batch: int | None) -> list[str]:
    """What takes most of the time, and what would help; the largest first."""
    work, parts = time.work, time.parts()
    total = sum(parts.values())
    largest = sorted(parts, key=lambda name: parts[name], reverse=True)
    phrases = [_limit(name, time, largest_batch) for name in largest if parts[name] >= LARGE * total]
    if time.start > LARGE * time.whole:
        phrases.append(f"starting: {duration(time.start)} of {duration(time.whole)}")
    decodes = work.steps * time.decoding > LARGE * time.first_epoch and not time.starts_in_closed_form
    if work.recipe.epochs > 1 and decodes and parts["images"] < LARGE * total:
        phrases.append(f"decoding, in the first epoch only, {time.decoded_images:,.0f} images/s a process")
    return phrases


def _limit(part: str, time: TrainingTime, largest_batch: int | None) -> str:
    work = time.work
    match part:
        case "computing":
            return f"computing; what helps: {computing_remedies(time, largest_batch)}"
        case "images":
            return f"images, decoded at {time.decoded_images:,.0f}/s a process{_images(time)}"
        case "exchange":
            larger = "a larger batch.global_size, " * (work.micro_batches == 1)
            return f"exchange of gradients; what helps: {larger}a faster network, backbone.trainable head"
        case "evaluation":
            return (
                f"evaluation of {work.selection:,} stimuli; what helps: a smaller "
                "early_stopping.inner_fraction, a larger batch.per_device"
            )
    every = work.recipe.checkpoint.every_steps
    rarer = ", a larger checkpoint.every_steps" if every else ""
    return f"checkpoints of {work.checkpoint_bytes / GIB:.2g} GiB; what helps: a faster disk{rarer}"


def computing_remedies(time: TrainingTime, largest_batch: int | None) -> str:
    """What makes a step cheaper, the best first."""
    work, recipe = time.work, time.work.recipe
    pass_size = -(-work.share // work.micro_batches)
    larger = largest_batch is not None and largest_batch > pass_size and time.measurement.rates.place.on_gpu
    remedies = {
        "no backbone.gradient_checkpointing": recipe.backbone.gradient_checkpointing,
        "precision bf16": recipe.precision == "fp32",
        f"larger passes ({largest_batch} images fit, {pass_size} now)": larger,
        "more processes": True,
        "a smaller images.size": True,
        "backbone.cut": True,
        "backbone.trainable head": recipe.backbone.trainable == "all",
    }
    return ", ".join([name for name, helps in remedies.items() if helps][:MOST_REMEDIES])


def _images(time: TrainingTime) -> str:
    work, place = time.work, time.measurement.rates.place
    remedies = []
    if has_cores_to_decode(work.recipe.loader.workers, place, work.processes, work.machines):
        needed = -(-work.share / max(time.step, 1e-9) // time.decoded_images)
        remedies.append(f"{needed:.0f} times the loader.workers, on cores of their own")
    if time.cached < 1 and work.recipe.loader.engine == "indexed":
        size = (work.fit + work.selection) * work.side**2 * 3 / GIB
        remedies.append(f"{size:.3g} GiB for decoded ones (loader.cache_gib), a smaller images.size")
    if not remedies:
        return ", on the cores that compute; what helps: a smaller images.size"
    return f"; what helps: {', '.join(remedies)}"
