"""Readouts that begin at the ridge through each site's best window."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import assert_refused, run_here, succeed_here
from launching import SMALL, history, losses, metrics, succeed

from train.models.readouts import Factorised, Gaussian
from train.models.windows import Window, gaussian_windows
from train.run.recipe import Recipe, load_recipe

SHAPE, SITES = (3, 6, 6), 4


@pytest.mark.parametrize("kind", [Factorised, Gaussian])
def test_a_readout_looks_through_its_windows(kind):
    windows = [Window(0.5, -0.5, 0.4), Window(0, 0, 0.25), Window(-0.5, 0.5, 0.15), Window(0, 0.5, 0.4)]
    readout, maps = kind(SHAPE, SITES), torch.rand(5, *SHAPE)
    readout.set_windows(windows)
    for mask, window in zip(readout.masks(), windows, strict=True):
        expected = torch.from_numpy(window.weights(6, 6))
        torch.testing.assert_close(mask.detach(), expected / expected.sum())
    weight = torch.randn(SITES, SHAPE[0])
    readout.start_from(weight, torch.zeros(SITES), torch.empty(0))
    seen = readout.windowed_start_features(maps, windows).view(5, SITES, SHAPE[0])
    torch.testing.assert_close(readout(maps), torch.einsum("bsc,sc->bs", seen, weight))


def test_windows_to_start_from_are_different():
    assert len(set(gaussian_windows())) == len(gaussian_windows())


def left_out_score(run) -> float:
    return float((run / "log.txt").read_text().partition("leave-one-out: ")[2].partition(")")[0])


@pytest.fixture(scope="module")
def started(recording, tmp_path_factory):
    """Leave-one-out scores of two starts, and the run that began in windows."""
    folder, scores = tmp_path_factory.mktemp("started"), {}
    words = [*SMALL, "--backbone.cut", "stages.0", "--readout.kind", "gaussian", "--epochs", "1"]
    words += ["--data", recording, "--optimizer.lr", "1e-9"]
    for start in ("ridge", "field"):
        succeed_here("train/finetune.py", "--out", folder / start, *words, "--readout.start", start)
        scores[start] = left_out_score(folder / start)
    return words, folder / "field", scores


def test_sites_that_see_a_part_start_better_in_their_window(started):
    _, _, scores = started
    assert scores["field"] > scores["ridge"] + 0.01


def test_the_start_does_not_depend_on_the_number_of_processes(started, tmp_path):
    words, one, scores = started
    succeed(2, "train/finetune.py", "--out", tmp_path / "two", *words, "--readout.start", "field")
    assert left_out_score(tmp_path / "two") == pytest.approx(scores["field"], abs=2e-3)
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-3)


@pytest.fixture(scope="module")
def spoilt(recording, tmp_path_factory):
    """A run that begins at the ridge, and whose steps are so large that no epoch is better than that."""
    run = tmp_path_factory.mktemp("spoilt") / "run"
    words = ["--data", recording, *SMALL, "--readout.start", "ridge", "--optimizer.lr", "0.3", "--ema", "0.5"]
    done = succeed_here("train/finetune.py", "--out", run, *words)
    return run, done.stdout


def test_a_ridge_start_that_no_epoch_improves_is_the_best(spoilt):
    run, output = spoilt
    start, *epochs = history(run)
    assert start["epoch"] == start["step"] == 0
    assert [line["epoch"] for line in epochs] == [1, 2]
    assert [line["best"] for line in (start, *epochs)] == [True, False, False]
    assert max(line["inner"]["r2"] for line in epochs) < start["inner"]["r2"]
    assert "on inner at the start: no epoch improved on it" in output
    assert (run / "checkpoints" / "best").readlink() == Path("step_0")
    scored = run_here("train/evaluate.py", run, "--split", "val")
    assert scored.returncode == 0, scored.stderr
    assert metrics(run)["epoch"] == 0


def went_on(spoilt, recording, run):
    """What a copy of the run says when it goes on; it ends as that did."""
    done = succeed_here("train/finetune.py", "--data", recording, "--out", run, "--resume")
    assert [line["epoch"] for line in history(run)] == [0, 1, 2]
    assert losses(run) == losses(spoilt[0])
    for link in ("last", "best"):
        assert (run / "checkpoints" / link).readlink() == (spoilt[0] / "checkpoints" / link).readlink()
        assert (run / "checkpoints" / link).is_dir()
    return done.stdout


def test_a_run_killed_after_its_start_was_saved_makes_it_again(spoilt, recording, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(spoilt[0], run, symlinks=True)
    for path in (run / "checkpoints").glob("step_[1-9]*"):
        shutil.rmtree(path)
    (run / "checkpoints" / "last").unlink()
    (run / "checkpoints" / "last").symlink_to("step_0")
    (run / "history.jsonl").write_text(json.dumps(history(spoilt[0])[0]) + "\n")
    assert "starting from the beginning" in went_on(spoilt, recording, run)


def test_damaged_checkpoints_fall_back_to_the_ridge_start(spoilt, recording, tmp_path):
    """All after the start are damaged; or only the last, which an odd disk also called the best."""
    run, last = tmp_path / "all", (spoilt[0] / "checkpoints" / "last").readlink()
    shutil.copytree(spoilt[0], run, symlinks=True)
    for path in (run / "checkpoints").glob("step_[1-9]*"):
        (path / "sha256.json").unlink()
    assert "starting from the beginning" in went_on(spoilt, recording, run)
    run = tmp_path / "last"
    shutil.copytree(spoilt[0], run, symlinks=True)
    (run / "checkpoints" / last / "sha256.json").unlink()
    (run / "checkpoints" / "best").unlink()
    (run / "checkpoints" / "best").symlink_to(last)
    assert "resumed after epoch 1" in went_on(spoilt, recording, run)


def test_only_readouts_with_masks_have_windows(tmp_path):
    (tmp_path / "recipe.yaml").write_text("readout: {kind: linear, start: field}")
    assert load_recipe(tmp_path / "recipe.yaml", Recipe).readout.start == "field"
    done = run_here("train/finetune.py", tmp_path / "recipe.yaml", "--data", tmp_path, "--out", tmp_path / "run")
    assert_refused(done, "readout.start", "gaussian")
