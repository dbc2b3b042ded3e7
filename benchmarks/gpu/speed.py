"""Part `speed`: images per second, fed by the loader and from one batch, with the memory that the plan foresaw.

The first network is fed first; then come the others, and the first again under other strategies, in other precisions,
with another optimizer and compiled, all on one batch that stays on the device.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from synthetic import GIB, recipe_of, setting_of, training
from training_speed import (
    fed_rate,
    fill_cache,
    loader_of,
    loader_rate,
    resident_batch,
    seconds_for,
    synthetic_rate,
)

from data_prep.common.worker_processes import usable_cores
from gpu.deepspeed_ops import deepspeed_for
from gpu.device import RATES, device_name
from gpu.entries import Entry, Part, Place
from gpu.forms import Case, Form
from gpu.gpu_memory import Peak, peak_of, start_peak
from gpu.preparation import SITES, plan_name
from gpu.results import Finding
from gpu.step_plan import TERA, StepPlan, data_sheet_rate, total_memory
from gpu.strategies import folder_of
from train.data.loader import workers_per_rank
from train.finetuning.checkpointing import CheckpointWriter
from train.finetuning.loop import Training
from train.planning.memory import CUDA_CONTEXT, HEADROOM
from train.run.recipe import Recipe

LEAST_FED = 0.97  # of the images a second with a batch that stays on the GPU
MEMORY = (0.7, 1 / (1 - HEADROOM))  # measured peak as a part of the plan; what is above it the headroom must hold
TRYING = 3  # steps
DECODED = 64  # stimuli in a batch of the loader alone


@dataclass(frozen=True)
class Variant:
    """A case in other settings.

    Attributes:
        name: what differs.
        case: network and batch.
        strategy, precision, optimizer: of the recipe; "tf32" is fp32 with products rounded to TF32.
        sections: of the recipe, over these.
    """

    name: str
    case: Case
    strategy: str = "ddp"
    precision: str = "bf16"
    optimizer: str = "adamw"
    sections: dict[str, Any] = field(default_factory=dict)

    @property
    def is_planned(self) -> bool:
        """Whether the plan of the case is that of the variant too."""
        return self.precision in ("bf16", "fp16") and self.optimizer == "adamw" and not self.sections

    def recipe(self, batch: int, **sections: Any) -> Recipe:
        """The recipe of a run."""
        given = {
            "strategy": setting_of(self.strategy),
            "precision": "fp32" if self.precision == "tf32" else self.precision,
            "optimizer": {"name": self.optimizer},
        }
        return recipe_of(self.case.network, self.case.side, batch, **given | self.sections | sections)


def part(form: Form) -> Part:
    """The entries of this part, the most telling first."""
    first = form.cases[0]
    fed = [Entry(f"{case.name}, fed", 120, partial(feed, Variant("fed", case))) for case in form.cases]
    varied = [Entry(f"{first.name}, {name}", 60, partial(vary, variant_of(first, name))) for name in form.variants]
    compiled = Entry(f"{first.name}, compiled", 180, partial(vary, variant_of(first, "compiled")))
    entries = [
        *fed[:2],
        Entry("decoding", 60, decode),
        *varied,
        Entry("checkpoint and evaluation", 60, partial(save_and_score, Variant("saved", first))),
        *fed[2:],
        *([compiled] if form.on_gpu else []),
    ]
    return Part("speed", [[entry] for entry in entries])


def variant_of(case: Case, name: str) -> Variant:
    """A variant by its name: a precision, an optimizer, a strategy, or compiled."""
    if name == "compiled":
        return Variant(name, case, sections={"compile": True})
    if name in ("fp16", "fp32", "tf32"):
        return Variant(name, case, precision=name)
    return Variant(name, case, optimizer=name) if name == "nadam" else Variant(name, case, strategy=name)


# ------------------------------------------------------------------------------------------------------ measurements


@contextmanager
def rounding_to_tf32(precision: str) -> Iterator[None]:
    """Let products and convolutions in float32 round to TF32, which the project does not do by itself."""
    if precision != "tf32":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = False


@contextmanager
def measured_run(variant: Variant, place: Place, batch: int, **sections: Any) -> Iterator[Training]:
    """A run of a variant, ready for its first step.

    Raises:
        Skipped: DeepSpeed is missing, or its operations cannot be built here.
    """
    recipe = variant.recipe(batch, **sections)
    out = folder_of(place, f"{variant.case.name} {variant.name}")
    with (
        deepspeed_for(variant.strategy),
        training(recipe, place.jpegs, out) as run,
        run.runtime.cudnn_autotuning(recipe.deterministic),
        rounding_to_tf32(variant.precision),
    ):
        yield run


def planned(case: Case, place: Place) -> StepPlan:
    """What a step of a case should cost."""
    return StepPlan.from_json(place.find(plan_name(case)))


def batch_of(case: Case, plan: StepPlan, place: Place) -> int:
    """The batch of a case, halved until the plan fits into the GPU."""
    return plan.fitting_batch(case.batch, total_memory()) if place.form.on_gpu else case.batch


@dataclass(frozen=True)
class OneBatch:
    """Training on one batch that stays on the device.

    Attributes:
        rate: images per second.
        trying: peak of memory in the first steps, in which cuDNN tries its kernels.
        peak: that of later steps.
        loss: at the end.
    """

    rate: float
    trying: Peak
    peak: Peak
    loss: float

    @property
    def faults(self) -> list[str]:
        """What is wrong with it."""
        return [] if math.isfinite(self.loss) else ["the loss is not finite"]


def train_on_one_batch(run: Training, case: Case, seconds: float) -> OneBatch:
    """Train on random images."""
    device, size = run.runtime.device, run.recipe.batch.global_size
    batch = resident_batch(size, case.side, SITES, device)
    start_peak(device)
    seconds_for(run, [[batch]] * TRYING)
    trying = peak_of(device)
    start_peak(device)
    rate = synthetic_rate(run, batch, seconds)
    return OneBatch(rate, trying, peak_of(device), float(run.step([batch], 0)["loss"]))


def use_of_device(variant: Variant, plan: StepPlan, rate: float, place: Place) -> dict[str, float]:
    """TFLOP/s, and as a part of what the data sheet promises and of a measured product of matrices."""
    done = plan.flops * rate
    values, promised = {"TFLOP/s": done / TERA}, data_sheet_rate(device_name(place.form), variant.precision)
    if promised is not None:
        values["MFU"] = done / promised
    values["of a product"] = done / place.find(RATES)[variant.precision]
    return values


def memory_values(plan: StepPlan, strategy: str, batch: int, one: OneBatch) -> dict[str, float]:
    """Peaks of memory beside the plan, in GiB."""
    values = {
        "allocated GiB": one.peak.allocated / GIB,
        "planned GiB": plan.bytes(strategy, batch) / GIB,
        "while kernels are tried GiB": one.trying.allocated / GIB,
    }
    if one.peak.reserved is not None and one.peak.device is not None:
        values["reserved GiB"] = one.peak.reserved / GIB
        values["device GiB"] = one.peak.device / GIB
        values["planned device GiB"] = (plan.bytes(strategy, batch) + CUDA_CONTEXT) / GIB
    return values


def memory_faults(values: dict[str, float], place: Place) -> list[str]:
    """Whether a GPU's peak is far from the plan; on a CPU the peak includes more than tensors."""
    share, (least, most) = values["allocated GiB"] / values["planned GiB"], MEMORY
    if not place.form.on_gpu or least <= share <= most:
        return []
    return [f"allocated {share:.2f} of the planned memory, not {least:.2f} to {most:.2f}"]


# ------------------------------------------------------------------------------------------------------------ entries


def feed(variant: Variant, place: Place) -> Finding:
    """Images per second of a network: one batch, fed cold and warm; memory beside the plan."""
    case, form, plan = variant.case, place.form, planned(variant.case, place)
    batch = batch_of(case, plan, place)
    workers = workers_per_rank(None if form.on_gpu else 0, usable_cores())
    with measured_run(variant, place, batch, loader={"workers": workers, "cache": "off"}, subset=case.stimuli) as run:
        one = train_on_one_batch(run, case, form.seconds)
        cold = fed_rate(run, run.loader, form.seconds)
        warm_loader = loader_of(run.recipe, place.jpegs, "ram", workers=workers, pin=form.on_gpu)
        fill_cache(warm_loader)
        alone = {"cold": loader_rate(run.loader, form.seconds / 2, workers)}
        alone["warm"] = loader_rate(warm_loader, form.seconds / 2, workers)
        warm = fed_rate(run, warm_loader, form.seconds)
    values = {"batch": batch, "images/s": one.rate, "cold": cold, "warm": warm, "workers": workers}
    values |= {"cold part": cold / one.rate, "warm part": warm / one.rate}
    values |= {f"loader alone, {name}": rate for name, rate in alone.items()}
    values |= use_of_device(variant, plan, one.rate, place)
    values |= memory_values(plan, variant.strategy, batch, one)
    faults = memory_faults(values, place) + one.faults
    # Without a GPU decoding and training share the cores.
    for name, rate in alone.items():
        if form.on_gpu and values[f"{name} part"] < LEAST_FED:
            faults.append(f"fed {name}: {values[f'{name} part']:.3f} of one batch")
        if form.on_gpu and rate < one.rate:  # what was read ahead can hide that for a while
            faults.append(f"the loader alone, {name}, is slower than training")
    return Finding(values, f"fed at {LEAST_FED} of one batch by a faster loader; memory as planned", faults)


def vary(variant: Variant, place: Place) -> Finding:
    """Images per second on one batch and memory, in other settings."""
    plan = planned(variant.case, place)
    batch = batch_of(variant.case, plan, place)
    if variant.precision in ("fp32", "tf32") and place.form.on_gpu:
        batch = max(batch // 2, 1)  # activations take twice the memory, which the plan in bf16 does not know
    with measured_run(variant, place, batch, loader={"workers": 0}) as run:
        one = train_on_one_batch(run, variant.case, place.form.seconds)
    values = {"batch": batch, "images/s": one.rate, **use_of_device(variant, plan, one.rate, place)}
    memory, faults = memory_values(plan, variant.strategy, batch, one), one.faults
    if variant.is_planned:
        faults += memory_faults(memory, place)
    else:
        memory = {name: value for name, value in memory.items() if not name.startswith("planned")}
    return Finding(values | memory, "a finite loss" + ", memory as planned" * variant.is_planned, faults)


def decode(place: Place) -> Finding:
    """Images per second of the loader alone, cold, by the number of decoding processes."""
    case = place.form.cases[0]
    recipe = Variant("decoding", case).recipe(DECODED)
    values: dict[str, float] = {"cores": usable_cores()}
    for workers in place.form.workers:
        loader = loader_of(recipe, place.jpegs, "off", workers=workers, pin=place.form.on_gpu)
        values[f"{workers} workers images/s"] = loader_rate(loader, place.form.seconds / 2, workers)
    return Finding(values)


def save_and_score(variant: Variant, place: Place) -> Finding:
    """Seconds of a checkpoint and of scoring the stimuli that select the best epoch, in float32."""
    batch = batch_of(variant.case, planned(variant.case, place), place)
    workers = workers_per_rank(None if place.form.on_gpu else 0, usable_cores())
    with measured_run(variant, place, batch, loader={"workers": workers}) as run:
        run.step([resident_batch(batch, variant.case.side, SITES, run.runtime.device)], 0)
        writer = CheckpointWriter(run.folder.checkpoints, 1, run.engine, run.network, run.average, run.runtime)
        saving = timed(lambda: writer.save(run.progress))
        first, again = (timed(run.scoring.scores) for _ in range(2))
        files = [file for file in run.folder.checkpoints.rglob("*.safetensors") if not file.parent.is_symlink()]
        values = {"checkpoint s": saving, "checkpoint MiB": sum(file.stat().st_size for file in files) / 2**20}
        stimuli = len(run.scoring.selection)
    return Finding(values | {"first evaluation s": first, "evaluation s": again, "evaluated images/s": stimuli / again})


def timed(work: Callable[[], object]) -> float:
    """Seconds that some work takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
