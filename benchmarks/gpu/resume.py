"""Part `resume`: a deterministic run is the same to the last bit when it is repeated, stopped by SIGTERM, or killed."""

import signal
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from data_prep.common.errors import FAILURE, STOPPED
from gpu.commands import Started, signal_when, start
from gpu.entries import Entry, Part, Place
from gpu.forms import Form
from gpu.results import Finding

WHOLE = "whole run"
EVERY = 4  # steps between checkpoints
# A network with batch statistics, its running average and augmented images, with checkpoints within an epoch.
OPTIONS = [
    *("--backbone.name", "test_efficientnet", "--backbone.weights", "random", "--batch.global-size", "16"),
    *("--deterministic", "--precision", "bf16", "--optimizer.clip-norm", "0.5", "--ema", "0.9"),
    *("--augment.shift", "0.1", "--augment.zoom", "0.1", "--augment.flip", "--augment.contrast", "0.2"),
    *("--checkpoint.every-steps", EVERY, "--loader.workers", "0"),
]


def part(form: Form) -> Part:
    """The entries of this part."""
    stopped = [
        Entry("stopped by SIGTERM", 120, partial(stop_and_resume, signal.SIGTERM)),
        Entry("killed", 120, partial(stop_and_resume, signal.SIGKILL)),
        Entry("repeated", 90, repeat_whole),
        Entry("with max pooling", 90, pool_deterministically),
    ]
    return Part(
        "resume",
        [[Entry(WHOLE, 90, run_whole, needed=True)], stopped[: None if form.on_gpu else 2]],
        together=min(form.together, 3),
    )


def run_of(place: Place, name: str) -> Path:
    """A run folder."""
    return place.folder / f"resume_{name.replace(' ', '_')}"


def started(place: Place, name: str, *words: str) -> Started:
    """A run with the options above, started."""
    return command(place, name, *OPTIONS, "--epochs", place.form.epochs, *words)


def command(place: Place, name: str, *words: object) -> Started:
    """The command on a run folder, started."""
    out = run_of(place, name)
    return start(["train/finetune.py", "--data", place.recording, "--out", out, *words], out.with_suffix(".log"))


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's last checkpoint: weights, their average, the optimizer's state."""
    files = sorted((run / "checkpoints" / "last").glob("*.safetensors"))
    return {f"{file.stem}|{name}": tensor for file in files for name, tensor in load_file(file).items()}


def differences(place: Place, name: str) -> list[str]:
    """How a run differs from the whole one."""
    ours, whole = tensors_of(run_of(place, name)), tensors_of(run_of(place, WHOLE))
    if ours.keys() != whole.keys():
        return ["its last checkpoint has other tensors than that of the whole run"]
    different = [key for key in whole if not torch.equal(ours[key], whole[key])]
    if not different:
        return []
    largest = max(float((ours[key].double() - whole[key].double()).abs().max()) for key in different)
    return [
        f"{len(different)} of {len(whole)} tensors differ from the whole run, by up to {largest:.1e}: {different[0]}"
    ]


def run_whole(place: Place) -> Finding:
    """The run that others are compared with."""
    run = started(place, WHOLE)
    run.must_succeed()
    return Finding({"run s": run.seconds, "tensors": len(tensors_of(run_of(place, WHOLE)))}, "it trains")


def repeat_whole(place: Place) -> Finding:
    """The same command in another folder."""
    started(place, "repeated").must_succeed()
    return Finding({}, "every tensor equal, bit for bit", differences(place, "repeated"))


def pool_deterministically(place: Place) -> Finding:
    """Whether a ResNet trains deterministically: torch may lack a kernel for its max pooling; the run then says so."""
    run = started(place, "pooled", "--backbone.name", "test_resnet", "--epochs", "1")
    code = run.wait()
    refused = code == FAILURE and "deterministic: " in run.said
    faults = [] if code == 0 or refused else [f"exit code {code}: {run.last_words}"]
    words = run.last_words if refused else "it trains"
    return Finding({"found": words, "run s": run.seconds}, "it trains, or says why it cannot", faults)


def stop_and_resume(number: signal.Signals, place: Place) -> Finding:
    """Stop a run by a signal after its first checkpoint, resume it, and compare."""
    name = number.name
    last = run_of(place, name) / "checkpoints" / "last"
    run = started(place, name)
    was_running = signal_when(run, last.exists, number)
    code = run.wait()
    if not was_running:
        return Finding({}, "it is stopped", [f"it ended before the signal, with exit code {code}: {run.last_words}"])
    faults = []
    expected = STOPPED if number == signal.SIGTERM else -number
    if code != expected:
        faults.append(f"it ended with exit code {code}, not {expected}: {run.last_words}")
    stopped_at = last.resolve().name
    resumed = command(place, name, "--resume")
    resumed.must_succeed()
    values = {"stopped at": stopped_at, "seconds to stop and before": run.seconds, "resumed s": resumed.seconds}
    required = f"exit code {expected}; every tensor equal to the whole run's, bit for bit"
    return Finding(values, required, faults + differences(place, name))
