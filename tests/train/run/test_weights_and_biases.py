"""Weights & Biases records a run offline, and its absence or failure never ends one."""

import shutil

import pytest
from helpers import assert_refused, run_here, succeed_here
from launching import SMALL, history, metrics

from train.run import trackers, weights_and_biases

installed = pytest.mark.skipif(
    not weights_and_biases.is_installed(), reason="wandb is an optional package: pip install -e '.[wandb]'"
)


@pytest.fixture(scope="module")
def recorded(recording, tmp_path_factory):
    """A run that both trackers follow, and what the training and the evaluation print; nobody is logged in."""
    out = tmp_path_factory.mktemp("wandb") / "mine"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_PROJECT"):
            patch.delenv(name, raising=False)
        patch.setenv("NETRC", str(out.parent / "nowhere"))
        words = ["--trackers", "tensorboard", "wandb", *SMALL]
        trained = succeed_here("train/finetune.py", "--data", recording, "--out", out, *words)
        evaluated = succeed_here("train/evaluate.py", out)
    return out, trained.stdout, evaluated.stderr


def records(run):
    """What each of W&B's files of a run holds, the oldest first."""
    return [path.read_bytes() for path in sorted((run / "wandb").glob("offline-run-*/*.wandb"))]


@installed
def test_a_run_is_recorded_offline_where_there_is_no_login(recorded):
    run, trained, _ = recorded
    assert trained.count("recorded offline (there is no login on this machine); to send it: wandb sync") == 1
    training, evaluation = records(run)
    lines = history(run)
    for name in ("r2", "explained_variance", "pearson_r"):
        assert all(repr(line["inner"][name]).encode() in training for line in lines)
        assert repr(metrics(run)["regression"][name]["mean"]).encode() in evaluation
    assert b"test_convnext" in training  # the settings
    assert b"r2_of_sites" in evaluation


@installed
def test_an_evaluation_continues_the_same_run(recorded):
    run, *_ = recorded
    ids = {path.name.rpartition("-")[2] for path in (run / "wandb").glob("offline-run-*")}
    assert len(ids) == 1
    assert list((run / "wandb").glob("offline-run-*/files/media/images/**/*.png"))
    assert list(run.glob("events.out.tfevents.*"))  # of the other tracker


@installed
def test_a_recorded_run_can_be_resumed_with_other_trackers(recorded, recording, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(recorded[0], run, symlinks=True)
    words = ["--data", recording, "--out", run, "--resume", "--trackers", "tensorboard"]
    done = succeed_here("train/finetune.py", *words)
    assert "resumed after epoch 2" in done.stdout
    assert "Weights & Biases" not in done.stdout


def test_a_run_does_not_begin_without_the_package(recording, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "is_installed", lambda: False)
    words = ["--data", recording, "--out", tmp_path / "run", "--trackers", "wandb", *SMALL]
    assert_refused(run_here("train/finetune.py", *words), "trackers", "pip install wandb")
    assert not (tmp_path / "run").exists()


def test_an_evaluation_does_without_the_package(trained, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(trained, run, symlinks=True)
    monkeypatch.setattr(weights_and_biases, "is_installed", lambda: False)
    done = succeed_here("train/evaluate.py", run, "--trackers", "wandb")
    assert done.stderr.count("wandb is not installed here; continuing without") == 1
    assert not list((run / "eval").glob("events.*"))


def test_a_failure_is_told_once(tmp_path, monkeypatch):
    class Broken:
        def log(self, values):
            raise RuntimeError("the service has ended")

    messages: list[str] = []
    monkeypatch.setattr(weights_and_biases, "is_installed", lambda: True)
    monkeypatch.setattr(weights_and_biases.WeightsAndBiases, "_open", lambda self: Broken())
    tracker = weights_and_biases.WeightsAndBiases(tmp_path, messages.append)
    for step in range(3):
        tracker.scalars({"train/loss": 1.0}, step)
    tracker.close()
    assert messages == [
        "warning: Weights & Biases cannot be written (the service has ended); continuing without it",
    ]
