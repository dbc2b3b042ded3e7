"""One small packed recording and one trained run that the end-to-end tests share."""

from pathlib import Path

import pytest
from helpers import run_command
from launching import SMALL, launch


@pytest.fixture(scope="session")
def recording(tmp_path_factory) -> Path:
    """A small simulated recording, packed by the real command: 240 stimuli of 48 px, 12 sites."""
    out = tmp_path_factory.mktemp("packed") / "simulated"
    options = ["--stimuli", "240", "--sites", "12", "--repetitions", "6", "--image-size", "48"]
    options += ["--stimuli-per-shard", "64"]
    done = run_command(["data_prep/pack.py", "simulated", "--out", out, *options])
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def trained(recording, tmp_path_factory) -> Path:
    """A network trained on it for two epochs by one process."""
    out = tmp_path_factory.mktemp("runs") / "trained"
    done = launch(1, "train/finetune.py", "--data", recording, "--out", out, *SMALL)
    assert done.returncode == 0, done.stderr
    return out
