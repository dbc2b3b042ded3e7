"""How many processes were started and on what devices, from the environment: known before the processes are joined."""

import os
import sys
from pathlib import Path

import psutil
import yaml

from data_prep.common.errors import BadInput

LAUNCHERS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun"}


def world_size() -> int:
    """Number of processes that were started together.

    Raises:
        BadInput: the launcher was asked for several processes, but started this one alone.
    """
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    launcher, requested = _requested_processes()
    if requested > 1:
        raise BadInput(
            f"{launcher} was asked for {requested} processes, but started this one alone, which would train by itself; "
            f"use launch/local.sh -n {requested} {' '.join(sys.argv[:1])} ..., or torchrun --nproc-per-node {requested}"
        )
    return 1


def _requested_processes() -> tuple[str, int]:
    """The launcher and the number of processes it was asked for, where it did not set this process's rank.

    `accelerate launch --cpu --num_processes 2` starts one process and sets no variable; only its command line shows it.
    """
    for variable, launcher in LAUNCHERS.items():
        if os.environ.get(variable, "1") != "1":
            return launcher, int(os.environ[variable])
    words = _command_line_of_parent()
    if not any(Path(word).name.startswith("accelerate") for word in words[:3]):
        return "", 1
    return "accelerate launch", max(_accelerate_processes(words), 1)


def _command_line_of_parent() -> list[str]:
    try:
        parent = psutil.Process().parent()
        return [] if parent is None else parent.cmdline()
    except psutil.Error:
        return []


def _accelerate_processes(words: list[str]) -> int:
    """The number of processes that an `accelerate launch` command line asks for; 1 if it names none."""
    options = {}
    for word, next_word in zip(words, [*words[1:], ""], strict=True):
        name, _, value = word.partition("=")
        options[name.replace("-", "_").lstrip("_")] = value or next_word
    if options.get("num_processes", "").isdigit():
        return int(options["num_processes"])
    try:
        return int(yaml.safe_load(Path(options["config_file"]).read_text()).get("num_processes", 1))
    except (KeyError, OSError, AttributeError, ValueError, TypeError, yaml.YAMLError):
        return 1


def rank() -> int:
    """The rank of this process."""
    return int(os.environ.get("RANK", "0"))


def ranks_on_machine() -> int:
    """Number of processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def uses_gpu() -> bool:
    """Whether this run computes on GPUs: if the machine has any, unless ACCELERATE_USE_CPU asks for the CPU."""
    import torch  # takes seconds; parsing must not wait for it

    return torch.cuda.is_available() and not cpu_requested()


def cpu_requested() -> bool:
    """Whether ACCELERATE_USE_CPU asks for the CPU, GPUs or not."""
    return os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
