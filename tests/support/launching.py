"""Start the commands of train/ on several processes, as users do, and read the files of a run."""

import contextlib
import json
import os
import statistics
import subprocess
import time
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import psutil
import torch
from forked_python import forked_python
from helpers import ROOT, finish, start_group, succeed_here, wait_for
from safetensors.torch import load_file

# A network without BatchNorm, in float32, so that the number of processes makes no difference.
SMALL = [
    *("--backbone.name", "test_convnext", "--backbone.weights", "random", "--precision", "fp32"),
    *("--epochs", "2", "--batch.global-size", "32", "--images.size", "32", "--optimizer.lr", "3e-3"),
    *("--loader.workers", "0"),
]


def start(processes: int, *command, **environment: str) -> subprocess.Popen:
    """Start `launch/local.sh -n PROCESSES COMMAND` (options of local.sh first) in its own process group."""
    words = ["bash", "launch/local.sh", "-n", processes, *command]
    return start_group(words, env={**os.environ, "OMP_NUM_THREADS": "1", **forked(), **environment})


def forked() -> dict[str, str]:
    """The variables that name the interpreter of the launchers, and of the processes that torchrun starts."""
    return {"PYTHON": forked_python(), "PYTHON_EXEC": forked_python()}


def launch(processes: int, *command, timeout: float = 300, **environment: str) -> CompletedProcess:
    """`start` a command and wait for it to end."""
    return finish(start(processes, *command, **environment), timeout)


def kill_after_an_epoch(processes: int, run: Path, *options) -> None:
    """Start a run and SIGKILL all its processes once its first checkpoint exists."""
    launcher = start(processes, "train/finetune.py", "--out", run, *options)
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "last").exists() and time.monotonic() < deadline and launcher.poll() is None:
        time.sleep(0.01)
    for process in psutil.process_iter(["cmdline"]):
        if str(run) in (process.info["cmdline"] or []):
            process.kill()
    launcher.communicate()


def epochs_of(run: Path) -> int:
    """Number of epochs in the history of a run, 0 if it has none yet."""
    with contextlib.suppress(OSError):
        return len((run / "history.jsonl").read_text().splitlines())
    return 0


def wait_for_epochs(run: Path, count: int = 1) -> None:
    """Wait until the history of a run holds `count` epochs."""
    wait_for(lambda: epochs_of(run) >= count, seconds=120)


def succeed(processes: int, *command, **environment: str) -> str:
    """`launch` a command that must succeed; returns its standard output."""
    done = launch(processes, *command, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def succeed_on(processes: int, script: str, *args) -> str:
    """`succeed`, within this process where one is enough."""
    return succeed_here(script, *args).stdout if processes == 1 else succeed(processes, script, *args)


DRIVER = """
import os, signal, sys
import train.{module} as module
{patch}
from data_prep.common.errors import run_command
from train.finetune import main
run_command(main, on_ranks=True)
"""

STOP_WHILE_SCORING = """
scored = module.score
def score(*args, **kw):
    score.calls += 1
    if score.calls == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return scored(*args, **kw)
score.calls = 0
module.score = score
"""


def run_patched(module: str, patch: str, *options, processes: int = 1) -> CompletedProcess:
    """Run train/finetune.py with part of `train.MODULE` replaced, to provoke faults that no input can."""
    script = Path(options[options.index("--out") + 1]).with_suffix(".py")
    script.write_text(DRIVER.format(module=module, patch=patch))
    if processes > 1:
        return launch(processes, script, *options, PYTHONPATH=str(ROOT))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return finish(start_group([forked_python(), script, *options], env=environment))


def weights(run: Path, which: str = "last") -> dict[str, torch.Tensor]:
    """The network's tensors in a checkpoint of a run."""
    return load_file(run / "checkpoints" / which / "network.safetensors")


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference between two sets of tensors with the same names."""
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def checkpoint_tensors(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint of a run: weights, averages, optimizer state."""
    files = sorted((run / "checkpoints" / "last").glob("*.safetensors"))
    return {f"{file.stem}: {name}": x for file in files for name, x in load_file(file).items()}


def assert_identical(run: Path, other: Path) -> None:
    """Two runs have the same losses and the same last checkpoint, bit for bit."""
    assert losses(run) == losses(other)
    ours, theirs = checkpoint_tensors(run), checkpoint_tensors(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def history(run: Path) -> list[dict]:
    """The lines of history.jsonl: one for the start, if it was scored, and one per epoch."""
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    """The training loss of each epoch."""
    return [line["loss"] for line in history(run) if line["epoch"]]


def charts(run: Path) -> dict[str, float]:
    """The median of each chart `speed/NAME_seconds` of a run, by NAME."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if name.endswith("_seconds")]
    return {name[6:-8]: statistics.median(event.value for event in events.Scalars(name)) for name in names}


def metrics(run: Path, split: str = "val") -> dict:
    """metrics.json of an evaluation."""
    return json.loads((run / "eval" / split / "metrics.json").read_text())


def predictions(run: Path, split: str = "val") -> dict[str, np.ndarray]:
    """The arrays of predictions.npz of an evaluation."""
    with np.load(run / "eval" / split / "predictions.npz", allow_pickle=False) as arrays:
        return dict(arrays)
