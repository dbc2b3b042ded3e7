"""One trial of a search: a command of train/ under `accelerate launch` on this machine, and how it ended."""

import os
import re
import shutil
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
from data_prep.common.process_identity import ADDRESS_VARIABLES, RANK_VARIABLES
from train.distributed.launch_environment import announced_process, uses_gpu
from train.run.folder import RunFolder
from train.sweeping.supervised_process import Heartbeat, run_supervised

COMMANDS = Path(__file__).resolve().parents[1]
LOCAL_LAUNCHER = COMMANDS.parent / "launch" / "processes.py"
# Variables that would make a trial believe that it belongs to the job of a launcher above the worker.
LAUNCHER_PREFIXES = ("SLURM_", "OMPI_", "PMI_", "PMIX_", "MV2_", "ACCELERATE_", "TORCHELASTIC_")
LAUNCHER_VARIABLES = (*RANK_VARIABLES, "GROUP_RANK", *ADDRESS_VARIABLES)


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        kind: done; diverged (another try would not help); bad input (nor would other trials); failed otherwise.
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
        if announced_process().world_size != 1:
            raise BadInput(
                "this command starts processes itself; start it with plain python, and outside of another job "
                f"(unset {' '.join(name for name in RANK_VARIABLES if name in os.environ)})"
            )
        self.gpus = torch.cuda.device_count() if uses_gpu() else 0
        self.processes = processes or max(self.gpus, 1)
        if 0 < self.gpus < self.processes:
            raise BadInput(
                f"--processes {self.processes}: this machine has {self.gpus} GPUs, and each process needs one; "
                "lower it, or set ACCELERATE_USE_CPU=true"
            )

    def describe(self) -> str:
        """The processes of a trial, for the terminal."""
        device = "GPU" if self.gpus else "CPU"
        return f"1 {device} process" if self.processes == 1 else f"{self.processes} {device} processes"

    def environment(self) -> dict[str, str]:
        """The environment of a trial: this worker's, without the variables of other launchers."""
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(LAUNCHER_PREFIXES) and name not in LAUNCHER_VARIABLES
        }
        threads = 1 if self.gpus else max(len(os.sched_getaffinity(0)) // self.processes, 1)
        environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"} | inherited
        if not self.gpus:
            environment["ACCELERATE_USE_CPU"] = "true"
        return environment

    def command(self, config: Path, script: str, *words: object) -> list[str]:
        """The command that launches a script of train/; writes the launcher's configuration to `config`.

        Without one, `accelerate launch` reads the configuration in the user's home, which may ask for other processes,
        precision or DeepSpeed. `--cpu` would start a single process.
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

    def local_command(self, script: str, *words: object) -> list[str]:
        """The command that starts a script of train/ as launch/local.sh does; a single process needs no launcher."""
        launch = [LOCAL_LAUNCHER, "local", "-n", self.processes] if self.processes > 1 else []
        return [sys.executable, *map(str, [*launch, COMMANDS / script, *words])]

    def run(
        self, command: Sequence[str], heartbeat: Heartbeat, lock: int, log: Path, check: Callable[[], None]
    ) -> Outcome:
        """Run a command and report how it ended; see `run_supervised`."""
        before = log.stat().st_size if log.exists() else 0
        code = run_supervised(command, heartbeat, lock, log, self.environment(), check)
        with log.open("rb") as file:
            file.seek(before)
            return outcome(code, file.read().decode(errors="replace"), log)


def resuming(run: RunFolder) -> list[str]:
    """The option with which a run goes on that has begun; what an attempt has left that has not is removed."""
    if run.recipe.is_file():
        return ["--resume"]
    shutil.rmtree(run.path, ignore_errors=True)  # it was killed before it had claimed its folder
    return []


def outcome(code: int, printed: str, log: Path) -> Outcome:
    """How a launched command ended, from the launcher's exit code and the output.

    `accelerate launch` ends with 1 whatever the exit code of the command, and prints that code; launch/local.sh ends
    with it.
    """
    if code == 0:
        return Outcome("done")
    sentences = re.findall(r"^error: (?!process \d+ ended with)(.+)$", printed, re.MULTILINE)  # not the launcher's
    codes = {int(number) for number in re.findall(r"(?:exit status |exitcode\s*: )(-?\d+)", printed)}
    codes |= {-int(number) for number in re.findall(r"died with <Signals\.\w+: (\d+)>", printed)}
    reason = sentences[-1] if sentences else f"{_last_exception(printed) or _describe_exit(codes or {code})}; see {log}"
    if 2 in codes | {code}:
        return Outcome("bad input", reason)
    diverged = [sentence for sentence in sentences if sentence.startswith(DIVERGED)]
    if diverged:
        return Outcome("diverged", diverged[-1])
    return Outcome("failed", reason)


def _last_exception(printed: str) -> str | None:
    of_launcher = ("subprocess.CalledProcessError", "torch.distributed.elastic")
    lines = re.findall(r"^(?:\[rank\d+\]: )?((?:\w+\.)*\w*(?:Error|Exception)\b.*)$", printed, re.MULTILINE)
    return next((line for line in reversed(lines) if not line.startswith(of_launcher)), None)


def _describe_exit(codes: set[int]) -> str:
    """Describe the exit code of the process that failed first; the launcher ends the others with SIGTERM."""
    code = next((code for code in sorted(codes) if code != -signal.SIGTERM), -signal.SIGTERM)
    if code == -signal.SIGKILL:
        return "killed by SIGKILL (out of memory?)"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
