"""Starting the commands of train/ on several processes, as users do, and reading what they leave."""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import psutil
import torch
from helpers import ROOT, start_group
from safetensors.torch import load_file

# A network without batch statistics, in float32: then the number of processes must not matter.
SMALL = [
    *("--backbone.name", "test_convnext", "--backbone.weights", "random", "--precision", "fp32"),
    *("--epochs", "2", "--batch.global-size", "32", "--images.size", "32", "--optimizer.lr", "3e-3"),
    *("--loader.workers", "0"),
]


def start(processes: int, *command, **environment: str) -> subprocess.Popen:
    """launch/local.sh -n PROCESSES COMMAND (options of local.sh first), as the leader of a process group of its own."""
    words = ["bash", "launch/local.sh", "-n", processes, *command]
    return start_group(words, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def launch(processes: int, *command, timeout: float = 300, **environment: str) -> CompletedProcess:
    """`start` and wait."""
    return finish_started(start(processes, *command, **environment), timeout)


def finish_started(process: subprocess.Popen, timeout: float = 300) -> CompletedProcess:
    """Wait for what `start` began."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return CompletedProcess(process.args, process.returncode, out, err)


def kill_after_an_epoch(processes: int, run: Path, *options) -> None:
    """Start a run and SIGKILL all its processes when its first checkpoint is there."""
    launcher = start(processes, "train/finetune.py", "--out", run, *options)
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "last").exists() and time.monotonic() < deadline and launcher.poll() is None:
        time.sleep(0.01)
    for process in psutil.process_iter(["cmdline"]):
        if str(run) in (process.info["cmdline"] or []):
            process.kill()
    launcher.communicate()


def epochs_of(run) -> int:
    with contextlib.suppress(OSError):
        return len((run / "history.jsonl").read_text().splitlines())
    return 0


def wait_for_epochs(run, count: int) -> None:
    deadline = time.monotonic() + 120
    while epochs_of(run) < count:
        assert time.monotonic() < deadline, "the run did not begin"
        time.sleep(0.02)


def succeed(processes: int, *command, **environment: str) -> str:
    """`launch` that must end well; returns what it printed."""
    done = launch(processes, *command, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


DRIVER = """
import os, signal, sys
import train.{module} as module
{patch}
from data_prep.common.errors import run_command
from train.finetune import main
run_command(main)
"""

STOP_WHILE_SCORING = """
scored = module.score_recordings
def score(*args, **kw):
    score.calls += 1
    if score.calls == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return scored(*args, **kw)
score.calls = 0
module.score_recordings = score
"""


def run_patched(module: str, patch: str, *options, processes: int = 1) -> subprocess.CompletedProcess:
    """train/finetune.py with something in it replaced, to bring about what no input can."""
    script = Path(options[options.index("--out") + 1]).with_suffix(".py")
    script.write_text(DRIVER.format(module=module, patch=patch))
    if processes > 1:
        return launch(processes, script, *options, PYTHONPATH=str(ROOT))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, script, *map(str, options)]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def weights(run: Path, which: str = "last") -> dict[str, torch.Tensor]:
    """The network's tensors in a run's checkpoint."""
    return load_file(run / "checkpoints" / which / "network.safetensors")


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference between two sets of tensors with the same names."""
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def history(run: Path) -> list[dict]:
    """What a run wrote of its start, where that was scored, and of each epoch."""
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    """The training loss of each epoch."""
    return [line["loss"] for line in history(run) if line["epoch"]]


def charts(run: Path) -> dict[str, float]:
    """The median of each of a run's charts of time, by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if name.endswith("_seconds")]
    return {name[6:-8]: statistics.median(event.value for event in events.Scalars(name)) for name in names}


def metrics(run: Path, split: str = "val") -> dict:
    """What an evaluation wrote."""
    return json.loads((run / "eval" / split / "metrics.json").read_text())


def predictions(run: Path, split: str = "val") -> dict[str, np.ndarray]:
    """What an evaluation predicted."""
    with np.load(run / "eval" / split / "predictions.npz", allow_pickle=False) as arrays:
        return dict(arrays)
