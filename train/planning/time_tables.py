"""What train/plan.py says about time: how long, what limits, what would help, and what is extrapolated."""

import socket
from collections.abc import Mapping, Sequence

from train.planning.probe_time import ProbeTime
from train.planning.rates import Place
from train.planning.training_time import GIB, TrainingTime

LARGE = 0.2  # share of the time that is worth doing something about
SMALL = 0.005  # share that is not shown


def duration(seconds: float) -> str:
    """Seconds in words: `0.42 s`, `14 s`, `2 min 5 s`, `3 h 20 min`, `4 d 2 h`."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    for large, small, size in (("d", "h", 86400), ("h", "min", 3600), ("min", "s", 60)):
        if whole >= size:
            rest = (whole % size) * {"d": 24, "h": 60, "min": 60}[large] // size
            return f"{whole // size} {large} {rest} {small}" if rest else f"{whole // size} {large}"
    return f"{whole} s"


def origin(place: Place) -> str:
    """Where the rates come from."""
    count = "process" if place.processes == 1 else "processes"
    device = f"on the CPU, {place.cores} core{'s' * (place.cores > 1)} each" if not place.on_gpu else place.device
    torch = place.versions.get("torch", "?")
    where = f"{', '.join(place.hosts)}, {place.when}: {place.processes} {count}, {device}, torch {torch}"
    if socket.gethostname() not in place.hosts:
        where += f"; this is {socket.gethostname()}, and they hold for machines like {place.hosts[0]}"
    return where


def extrapolation(differences: Sequence[str]) -> list[str]:
    """What differs from what was measured; nothing if nothing does."""
    if not differences:
        return ["measured: this recipe on this many processes"]
    return [f"EXTRAPOLATED by counted operations and bytes, as this was not measured: {'; '.join(differences)}"]


def shares(parts: Mapping[str, float]) -> str:
    """The parts of a time, the largest first, in percent."""
    total = sum(parts.values())
    largest = sorted(parts.items(), key=lambda part: part[1], reverse=True)
    return ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in largest if seconds > SMALL * total)


def lines_of(rows: Mapping[str, str]) -> list[str]:
    """Titles and values below each other."""
    width = max(map(len, rows)) + 2
    return [f"  {title:<{width}}{value}" for title, value in rows.items()]


# ------------------------------------------------------------------------------------------------------------ training


def training_page(time: TrainingTime, largest_batch: int | None) -> str:
    """How long a training takes.

    Args:
        time: of it.
        largest_batch: the most stimuli that fit into a pass of its strategy; None if it is not known.
    """
    recipe, work = time.work.recipe, time.work
    rows = {"first step after": duration(time.start), "first epoch": duration(time.first_epoch)}
    if time.decoding > 0 and time.cached > 0:
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
    lines = [f"How long (rates of {origin(time.measurement.rates.place)})", *lines_of(rows)]
    lines += [f"what limits: {sentence}" for sentence in training_limits(time, largest_batch)]
    lines += extrapolation(time.measurement.differences)
    if time.unmeasured:
        lines.append(f"not counted: {'; '.join(time.unmeasured)}")
    return "\n".join(lines)


def training_limits(time: TrainingTime, largest_batch: int | None) -> list[str]:
    """What takes most of the time, and what would help; the largest first."""
    work, parts = time.work, time.parts()
    recipe, total = work.recipe, sum(parts.values())
    sentences = []
    for name, seconds in sorted(parts.items(), key=lambda part: part[1], reverse=True):
        if seconds < LARGE * total:
            continue
        match name:
            case "computing":
                sentences.append(f"computing; {computing_remedies(time, largest_batch)}")
            case "images":
                sentences.append(
                    f"images, of which a process can decode {time.decoded_images:,.0f} a second; {_images(time)}"
                )
            case "network":
                larger = "a larger batch.global_size exchanges as many bytes for more images" * (
                    work.micro_batches == 1
                )
                sentences.append(
                    f"the exchange of gradients; {larger or 'a faster network'}, or backbone.trainable head"
                )
            case "evaluation":
                sentences.append(
                    f"the evaluation of {work.selection:,} stimuli in float32 after each epoch; a smaller "
                    "early_stopping.inner_fraction, or a larger batch.per_device"
                )
            case "checkpoints":
                sentences.append(
                    f"checkpoints of {work.checkpoint_bytes / GIB:.2g} GiB after each epoch and every "
                    "checkpoint.every_steps; a faster disk, or fewer"
                )
    if time.start > LARGE * time.whole:
        sentences.append(f"starting: {duration(time.start)} of {duration(time.whole)}")
    if recipe.epochs > 1 and work.steps * time.decoding > LARGE * time.first_epoch and parts["images"] < LARGE * total:
        sentences.append(
            f"decoding, in the first epoch only; a process can decode {time.decoded_images:,.0f} images a second"
        )
    return sentences


def computing_remedies(time: TrainingTime, largest_batch: int | None) -> str:
    """What makes a step cheaper."""
    work, recipe = time.work, time.work.recipe
    pass_size = -(-work.share // work.micro_batches)
    remedies = ["a smaller images.size", "backbone.cut (fewer layers)"]
    if recipe.precision == "fp32":
        remedies.insert(0, "precision bf16")
    if recipe.backbone.gradient_checkpointing:
        remedies.insert(0, "no backbone.gradient_checkpointing (a third of the time)")
    if recipe.backbone.trainable == "all":
        remedies.append("backbone.trainable head")
    if largest_batch is not None and largest_batch > pass_size and time.measurement.rates.place.on_gpu:
        remedies.append(f"a larger pass, of {pass_size} images now where {largest_batch:,} fit")
    remedies.append("more processes")
    return f"what would help: {', '.join(remedies)}"


def _images(time: TrainingTime) -> str:
    loader, place = time.work.recipe.loader, time.measurement.rates.place
    needed = -(-time.work.share / max(time.step, 1e-9) // time.decoded_images)
    workers = f"{needed:.0f} times as many decoding processes (loader.workers, on cores of their own) would keep up"
    if time.cached < 1 and loader.engine == "indexed":
        size = (time.work.fit + time.work.selection) * time.work.side**2 * 3 / GIB
        memory = f"keep all decoded images, {size:.3g} GiB (loader.cache, loader.cache_gib, or a smaller images.size)"
        return f"what would help: {workers}; {memory}"
    if place.on_gpu:
        return f"what would help: {workers}"
    return "they are copied from memory; on a CPU this shares the cores with computing"


# --------------------------------------------------------------------------------------------------------------- probes


def probe_page(time: ProbeTime) -> str:
    """How long a probe takes."""
    parts = time.parts()
    rows = {"first batch after": duration(time.start)}
    rows |= {name: duration(seconds) for name, seconds in parts.items() if seconds > SMALL * time.whole}
    rows["whole probe"] = duration(time.whole)
    lines = [f"How long (rates of {origin(time.forward.rates.place)})", *lines_of(rows)]
    name, seconds = max(parts.items(), key=lambda part: part[1])
    if seconds > LARGE * time.whole:
        lines.append(f"what limits: {name}; what would help: {probe_remedies(time, name)}")
    lines += extrapolation(time.forward.differences)
    largest = max(one.stimuli for one in time.forward.rates.machine.decompositions)
    if max(time.work.sizes.fit) > 2 * largest:
        lines.append(f"decompositions are EXTRAPOLATED from one of {largest:,} stimuli")
    return "\n".join(lines)


def probe_remedies(time: ProbeTime, part: str) -> str:
    """What makes a part of a probe cheaper."""
    recipe = time.work.recipe
    match part:
        case "forward passes":
            return "a smaller images.size, more processes"
        case "decoding and writing":
            narrower = "a smaller pool, " if recipe.pool is None else ""
            return f"more decoding processes (loader.workers), {narrower}fewer layers, a faster disk for --scratch"
        case "reading features":
            return "a smaller pool, fewer layers, a larger --memory, a faster disk for --scratch"
        case "network":
            return "a smaller pool, fewer layers, a faster network"
        case "inner products":
            return "a smaller pool, products tf32 or bf16 where the hardware has them, more processes"
        case "decompositions and regressions":
            return "fewer components, subset, field whole, more processes than one where there are several layers"
    return "fewer layers"
