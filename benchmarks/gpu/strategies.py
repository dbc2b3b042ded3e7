"""Part `strategies`: every strategy and optimizer trains the network that one process trains on the CPU.

Each entry takes the same steps of a small network without batch statistics, whose losses a small difference does not
drive apart, and then counts the calls that make the host wait for the GPU.
"""

import os
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from synthetic import recipe_of, setting_of, training
from training_speed import endless

from gpu.deepspeed_ops import deepspeed_for
from gpu.entries import Entry, Part, Place
from gpu.forms import Form
from gpu.host_waits import waits_of
from gpu.preparation import SIDE
from gpu.results import Finding

NETWORK, BATCH, STEPS, WATCHED = "test_convnext", 32, 12, 4
# The largest relative difference of a step's loss. On one device strategies differ by float32 sums in another order; a
# GPU has other kernels, and rounds bf16 and fp16 elsewhere.
TOLERANCE = {(False, "fp32"): 1e-5, (True, "fp32"): 1e-3, (True, "bf16"): 2e-2, (True, "fp16"): 5e-2}
AUGMENT = {"shift": 0.1, "zoom": 0.1, "brightness": 0.2, "contrast": 0.2, "flip": True}
# What a step may consist of under DDP. None of it may make the host wait.
STEPS_OF: dict[str, dict[str, Any]] = {
    "adam": {"optimizer": {"name": "adam"}},
    "radam": {"optimizer": {"name": "radam"}},
    "lion, correlation loss": {"optimizer": {"name": "lion", "lr": 1e-4}, "loss": {"responses": "correlation"}},
    "sgd, momentum that cycles, poisson": {
        "optimizer": {"name": "sgd", "lr": 1e-4},
        "schedule": {"cycle_momentum": True},
        "loss": {"responses": "poisson"},
    },
    "nadam, clipping, average, augmentation": {
        "optimizer": {"name": "nadam", "clip_norm": 1.0},
        "ema": 0.99,
        "augment": AUGMENT,
    },
    "adamw, hybrid by uncertainty, accumulation": {
        "optimizer": {"name": "adamw", "clip_norm": 1.0},
        "task": {"kind": "hybrid", "weighting": "uncertainty"},
        "batch": {"global_size": BATCH, "per_device": BATCH // 2},
    },
}


@dataclass(frozen=True)
class Small:
    """A run of the small network.

    Attributes:
        strategy, precision, optimizer: of the recipe.
        sections: of the recipe, over these.
    """

    strategy: str
    precision: str
    optimizer: str = "nadam"
    sections: dict[str, Any] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        """Name of the losses on the CPU to compare with; for fp16, which CPUs lack, those in float32."""
        return f"{self.optimizer} in {'fp32' if self.precision == 'fp16' else self.precision} on the CPU"


@dataclass(frozen=True)
class Steps:
    """What the steps of a run were like.

    Attributes:
        losses: of each step.
        waits: calls in a step that made the host wait.
        places: of these calls.
    """

    losses: list[float]
    waits: float
    places: str


def part(form: Form) -> Part:
    """The entries of this part; the references first."""
    optimizers = ("nadam", "adamw")
    references = [
        Entry(small.reference, 90, partial(train_reference, small), needed=True)
        for precision in form.precisions
        for small in (Small("ddp", precision, optimizer) for optimizer in optimizers)
    ]
    runs = [Small("ddp", precision, optimizer) for precision in form.precisions for optimizer in optimizers]
    runs += [Small("ddp", "fp16")] if form.on_gpu else []
    runs += [Small(strategy, form.precisions[-1]) for strategy in form.strategies]
    if form.on_gpu:
        runs += [Small(strategy, form.precisions[0]) for strategy in form.strategies[:2]]
        runs += [Small(strategy, form.precisions[-1], "adamw") for strategy in ("zero2", "zero3_offload")]
    compared = [
        Entry(f"{small.strategy} {small.precision} {small.optimizer}", 90, partial(compare_losses, small))
        for small in runs
    ]
    watched = [
        Entry(name, 60, partial(watch_steps, name, Small("ddp", form.precisions[-1], sections=sections)))
        for name, sections in STEPS_OF.items()
    ]
    return Part("strategies", [references, [*compared, *watched]], together=form.together)


def train_small(small: Small, data: Path, out: Path) -> Steps:
    """Take the steps of a run of the small network.

    Raises:
        Skipped: DeepSpeed is missing, or its operations cannot be built here.
    """
    sections = {
        "strategy": setting_of(small.strategy),
        "precision": small.precision,
        "optimizer": {"name": small.optimizer, "clip_norm": 0.5},
        "loader": {"workers": 0},
    }
    recipe = recipe_of(NETWORK, SIDE, BATCH, **sections | small.sections)
    with deepspeed_for(small.strategy), training(recipe, data, out) as run:
        batches = endless(run.loader)
        losses = [run.step(micros, 0)["loss"] for micros in islice(batches, STEPS)]
        micros = next(batches)  # on the host: the copy to the device is part of a step
        waits, places = waits_of(WATCHED, lambda: run.step(micros, 0), run.runtime.device)
        return Steps(torch.stack(losses).tolist(), waits, places)


def folder_of(place: Place, name: str) -> Path:
    """A run folder."""
    return place.folder / "".join(letter if letter.isalnum() else "_" for letter in f"run {name}")


def train_reference(small: Small, place: Place) -> Finding:
    """The losses that others are compared with: one process on the CPU."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    steps = train_small(small, place.recording, folder_of(place, small.reference))
    place.leave(small.reference, steps.losses)
    return Finding({"losses": steps.losses})


def compare_losses(small: Small, place: Place) -> Finding:
    """Train, and compare with the reference."""
    expected = place.find(small.reference)
    steps = train_small(
        small, place.recording, folder_of(place, f"{small.strategy} {small.precision} {small.optimizer}")
    )
    differences = [abs(loss / reference - 1) for loss, reference in zip(steps.losses, expected, strict=True)]
    most, largest = TOLERANCE[place.form.on_gpu, small.precision], max(differences)
    faults = [] if largest <= most else [f"losses differ by {largest:.1e} from {small.reference}"]
    faults += waiting_faults(small, steps)
    values = {"first difference": differences[0], "largest difference": largest, **waits_in(place, steps)}
    required = f"losses within {most:.0e} of the CPU's"
    required += ", no waiting" if must_not_wait(small) else ""
    return Finding(values | {"losses": steps.losses}, required, faults)


def watch_steps(name: str, small: Small, place: Place) -> Finding:
    """Train, and look for calls that make the host wait."""
    steps = train_small(small, place.recording, folder_of(place, name))
    faults = waiting_faults(small, steps)
    if not all(map(torch.isfinite, torch.tensor(steps.losses))):
        faults.append("the loss is not finite")
    return Finding({**waits_in(place, steps), "losses": steps.losses}, "finite losses, no waiting", faults)


def must_not_wait(small: Small) -> bool:
    """Whether no call may make the host wait; DeepSpeed reads the gradient's norm on the host."""
    return small.strategy == "ddp"


def waiting_faults(small: Small, steps: Steps) -> list[str]:
    """What is wrong with the waits of a run."""
    if steps.waits and must_not_wait(small):
        return [f"{steps.waits:g} calls in a step make the host wait: {steps.places}"]
    return []


def waits_in(place: Place, steps: Steps) -> dict[str, Any]:
    """The waits as values; a CPU shows none."""
    return {"waits in a step": steps.waits, "waits at": steps.places} if place.form.on_gpu else {}
