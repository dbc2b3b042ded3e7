"""Part `faults`: runs that must fail say so, in words, and end."""

from functools import partial
from pathlib import Path

from data_prep.common.errors import DIVERGED, FAILURE
from gpu.commands import start
from gpu.entries import Entry, Part, Place
from gpu.forms import Form
from gpu.results import Finding

OPTIONS = [
    *("--backbone.name", "test_resnet", "--backbone.weights", "random", "--batch.global-size", "16"),
    *("--loader.workers", "0", "--epochs", "20"),
    *("--optimizer.name", "sgd", "--optimizer.lr", "1000", "--schedule.kind", "constant", "--schedule.warmup", "0"),
]


def part(form: Form) -> Part:
    """The entries of this part."""
    diverging = [Entry(f"diverges in {precision}", 90, partial(diverge, precision)) for precision in form.diverging]
    return Part("faults", [diverging], together=min(form.together, 3))


def diverge(precision: str, place: Place) -> Finding:
    """A learning rate that no network survives: the run must say that it diverged, with every precision."""
    out: Path = place.folder / f"diverges_{precision}"
    words = ["train/finetune.py", "--data", place.recording, "--out", out, *OPTIONS, "--precision", precision]
    command = start(words, out.with_suffix(".log"))
    code, faults = command.wait(), []
    if code != FAILURE or DIVERGED not in command.said:
        faults.append(f"it ended with exit code {code}: {command.last_words}")
    values = {"exit code": code, "last words": command.last_words, "run s": command.seconds}
    return Finding(values, f"exit code {FAILURE}, saying that the training diverged", faults)
