"""A run, a probe and the ensembles of them, each scored on val."""

import shutil
from pathlib import Path

import pytest
from helpers import succeed_here

PROBE = ["--layers", "stages.0", "--backbone.name", "test_convnext", "--backbone.weights", "random"]


@pytest.fixture(scope="session")
def predictors(recording, trained, tmp_path_factory) -> Path:
    """A folder with `run` (32 px), `probe` (48 px, through windows), `pixels`, `mean` and `stack` of run and probe."""
    folder = tmp_path_factory.mktemp("predictors")
    shutil.copytree(trained, folder / "run", symlinks=True)
    succeed_here("train/evaluate.py", folder / "run")
    probe = ["train/probe.py", "--data", recording, "--out"]
    succeed_here(*probe, folder / "probe", *PROBE, "--field", "gaussian")
    succeed_here(*probe, folder / "pixels", "--layers", "pixels", "--images.size", "16")
    for combine in ("mean", "stack"):
        members = [folder / "run", folder / "probe"]
        succeed_here("train/evaluate.py", *members, "--combine", combine, "--out", folder / combine)
    return folder
