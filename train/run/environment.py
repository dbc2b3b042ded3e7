"""What is needed to repeat a run besides its recipe: command, versions, git commit, hardware."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from data_prep.remote.url import without_secrets

PACKAGES = ("torch", "torchvision", "timm", "accelerate", "deepspeed", "webdataset", "numpy")


def environment() -> dict[str, Any]:
    """This process's command, versions, git commit and hardware, for env.json."""
    return {
        "command": [Path(sys.argv[0]).name, *without_secrets(sys.argv[1:])],
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "git_commit": _git_commit(),
        "host": platform.node(),
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        or [f"CPU, {os.cpu_count()} cores"],
        "job": os.environ.get("SPIKETUNE_JOB"),
    }


def _git_commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return git.stdout.strip() or None
