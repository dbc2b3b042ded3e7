"""How many processes were started and where they compute, from the environment; known before they are joined."""

import os
import sys
from pathlib import Path

import psutil
import torch
import yaml

from data_prep.common.errors import BadInput


def world_size() -> int:
    """Processes that were started together, from the launcher's environment; known before they are joined.

    Raises:
        BadInput: the launcher announced several processes and started this one alone (see `_announced`).
    """
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    count, who = _announced()
    if count > 1:
        raise BadInput(
            f"{who} was to start {count} processes, but this one was started alone and would train by itself; "
            f"use launch/local.sh -n {count} {' '.join(sys.argv[:1])} ..., or torchrun --nproc-per-node {count}"
        )
    return 1


def _announced() -> tuple[int, str]:
    """How many processes the launcher was asked for, and which launcher, where none told this process its rank.

    `accelerate launch --cpu --num_processes 2` starts one process and sets nothing that says so; its command line does.
    """
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if os.environ.get(name, "1") != "1":
            return int(os.environ[name]), {"S": "srun"}.get(name[0], "mpirun")
    try:
        words = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):
        return 1, ""
    if not any(Path(word).name.startswith("accelerate") for word in words[:3]):
        return 1, ""
    return max(_accelerate_processes(words), 1), "accelerate launch"


def _accelerate_processes(words: list[str]) -> int:
    """The number of processes that an `accelerate launch` command line asks for; 1 where it does not tell."""
    given = {}
    for option, value in zip(words, [*words[1:], ""], strict=True):
        name, _, inline = option.partition("=")
        given[name.replace("-", "_").lstrip("_")] = inline or value
    if given.get("num_processes", "").isdigit():
        return int(given["num_processes"])
    try:
        return int(yaml.safe_load(Path(given["config_file"]).read_text()).get("num_processes", 1))
    except (KeyError, OSError, AttributeError, ValueError, TypeError, yaml.YAMLError):
        return 1


def rank() -> int:
    """Which of them this process is; known before they are joined."""
    return int(os.environ.get("RANK", "0"))


def ranks_on_machine() -> int:
    """Processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def uses_gpu() -> bool:
    """Whether this run computes on GPUs: where there are any, unless ACCELERATE_USE_CPU says otherwise."""
    return torch.cuda.is_available() and not cpu_requested()


def cpu_requested() -> bool:
    """Whether the CPU was asked for, GPUs or not."""
    return os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
