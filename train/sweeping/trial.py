"""One trial of a search: `accelerate launch` of a command of train/ on this machine, and how it ended."""

import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import yaml

from data_prep.common.atomic_writes import write_bytes
from data_prep.common.errors import DIVERGED, BadInput
from train.distributed.launch_environment import uses_gpu
from train.sweeping.supervised_process import Beat, run_kept

COMMANDS = Path(__file__).resolve().parents[1]
# What a launcher above the worker has set would make a trial believe that it belongs to that launcher's job.
OF_LAUNCHERS = ("SLURM_", "OMPI_", "PMI_", "PMIX_", "MV2_", "ACCELERATE_", "TORCHELASTIC_")
OF_RANKS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        kind: done; diverged (trying again would not help); bad input (nor would going on); failed otherwise.
        reason: one sentence; empty where it is done.
    """

    kind: Literal["done", "diverged", "bad input", "failed"]
    reason: str = ""


class Launcher:
    """Starts commands of train/ on this machine's GPUs, or on N CPU processes.

    Args:
        processes: how many; by default one per GPU, or one where there is none.

    Raises:
        BadInput: more processes than GPUs, or the worker itself was started by a launcher.
    """

    def __init__(self, processes: int | None):
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise BadInput("train/sweep.py starts the processes of each trial itself; start it with plain python")
        self.gpus = torch.cuda.device_count() if uses_gpu() else 0
        self.processes = processes or max(self.gpus, 1)
        if 0 < self.gpus < self.processes:
            raise BadInput(
                f"--processes {self.processes}: there are {self.gpus} GPUs, and a process needs one; "
                "or set ACCELERATE_USE_CPU=true"
            )

    def describe(self) -> str:
        """How many processes a trial has, for the terminal."""
        return f"{self.processes} {'GPU' if self.gpus else 'CPU'} process{'es' * (self.processes > 1)}"

    def environment(self) -> dict[str, str]:
        """The environment of a trial: this worker's, without what other launchers have set."""
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(OF_LAUNCHERS) and name not in OF_RANKS
        }
        threads = 1 if self.gpus else max(len(os.sched_getaffinity(0)) // self.processes, 1)
        defaults = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        return defaults | inherited | ({} if self.gpus else {"ACCELERATE_USE_CPU": "true"})

    def command(self, config: Path, script: str, *words: object) -> list[str]:
        """The words that launch a script of train/; `config` is written for them.

        A configuration of our own, because `accelerate launch` takes what it is not told from the one in the user's
        home, which may ask for other processes, precision or DeepSpeed. `--cpu` would start a single process.
        """
        settings = {
            "compute_environment": "LOCAL_MACHINE",
            "distributed_type": "MULTI_GPU" if self.processes > 1 else "NO",
            "num_machines": 1,
            "num_processes": self.processes,
            "main_process_port": 0,
            "gpu_ids": "all",
            "use_cpu": not self.gpus,
            "mixed_precision": "no",
        }
        write_bytes(config, yaml.safe_dump(settings, sort_keys=False).encode())
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        return [*launch, str(COMMANDS / script), *map(str, words)]

    def run(self, command: Sequence[str], beat: Beat, lock: int, log: Path, check: Callable[[], None]) -> Outcome:
        """Run what `command` gave and say how it ended; see `train.sweeping.supervised_process.run_kept`."""
        before = log.stat().st_size if log.exists() else 0
        code = run_kept(command, beat, lock, log, self.environment(), check)
        with log.open("rb") as file:
            file.seek(before)
            return outcome(code, file.read().decode(errors="replace"), log)


def outcome(code: int, printed: str, log: Path) -> Outcome:
    """How a launched command ended, from the launcher's exit code and from what was printed.

    `accelerate launch` ends with 1 whatever the exit code of the command; it prints that code.
    """
    if code == 0:
        return Outcome("done")
    sentences = re.findall(r"^error: (.+)$", printed, re.MULTILINE)
    codes = {int(found) for found in re.findall(r"(?:exit status |exitcode\s*: )(-?\d+)", printed)}
    codes |= {-int(found) for found in re.findall(r"died with <Signals\.\w+: (\d+)>", printed)}
    reason = sentences[-1] if sentences else f"{_last_exception(printed) or _exit(codes or {code})}; see {log}"
    if 2 in codes | {code}:
        return Outcome("bad input", reason)
    if diverged := [sentence for sentence in sentences if sentence.startswith(DIVERGED)]:
        return Outcome("diverged", diverged[-1])
    return Outcome("failed", reason)


def _last_exception(printed: str) -> str | None:
    of_launcher = ("subprocess.CalledProcessError", "torch.distributed.elastic")
    found = re.findall(r"^(?:\[rank\d+\]: )?((?:\w+\.)*\w*(?:Error|Exception)\b.*)$", printed, re.MULTILINE)
    return next((line for line in reversed(found) if not line.startswith(of_launcher)), None)


def _exit(codes: set[int]) -> str:
    """The exit code to tell: the launcher ends with SIGTERM those that did not fail themselves."""
    code = next((code for code in sorted(codes) if code != -signal.SIGTERM), -signal.SIGTERM)
    if code == -signal.SIGKILL:
        return "killed by SIGKILL (out of memory?)"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
