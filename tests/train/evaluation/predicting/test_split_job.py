"""Probes and ensembles are scored on splits that they were not made on."""

import shutil

import numpy as np
import pytest
from helpers import assert_refused, run_here, succeed_here
from launching import metrics, predictions
from make_recordings import pack_recording

from data_prep.shards.folder import ShardFolder


@pytest.fixture(scope="module")
def scored(predictors, tmp_path_factory):
    """Everything, scored on test."""
    folder = tmp_path_factory.mktemp("scored") / "all"
    shutil.copytree(predictors, folder, symlinks=True)
    for kind in ("run", "probe", "mean", "stack"):
        succeed_here("train/evaluate.py", folder / kind, "--split", "test")
    return folder


def test_a_probe_is_scored_like_a_run(scored, recording):
    block, found = metrics(scored / "probe", "test"), predictions(scored / "probe", "test")
    test = ShardFolder(recording).split("test")
    assert found["stimulus_id"].tolist() == test.stimulus_ids
    rates = test.rates().astype(np.float64)
    np.testing.assert_array_equal(found["target"], test.rates())
    r2 = 1 - np.square(rates - found["prediction"]).sum(0) / np.square(rates - rates.mean(0)).sum(0)
    np.testing.assert_allclose(block["regression"]["r2"]["per_site"], r2, rtol=1e-4, atol=1e-4)
    own = metrics(scored / "probe", "val")
    assert block["selected_on"] == own["selected_on"]
    assert block["chosen"] == own["chosen"]
    assert block["training_stimuli"] == own["training_stimuli"]
    assert block["seen"]["fitted"] == 0
    assert block["regression"]["ceiling"] == own["regression"]["ceiling"]


def test_an_ensemble_combines_what_its_members_predict(scored):
    run, probe = (predictions(scored / name, "test")["prediction"] for name in ("run", "probe"))
    np.testing.assert_allclose(predictions(scored / "mean", "test")["prediction"], (run + probe) / 2, rtol=1e-4)
    assert metrics(scored / "mean", "test")["selected_on"] == metrics(scored / "mean", "val")["selected_on"]


def test_a_stack_keeps_its_weights(scored, recording, tmp_path):
    """They were learned on the training stimuli: a new stack that is made on test has the same."""
    members = [scored / "run", scored / "probe"]
    succeed_here("train/evaluate.py", *members, "--combine", "stack", "--split", "test", "--out", tmp_path / "new")
    expected = predictions(tmp_path / "new", "test")["prediction"]
    found = predictions(scored / "stack", "test")["prediction"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.std())
    assert metrics(scored / "stack", "test")["ensemble"]["combine"] == "stack"


def test_members_without_predictions_of_the_split_are_scored_first(predictors, tmp_path):
    shutil.copytree(predictors, tmp_path / "all", symlinks=True)
    members = [tmp_path / "all/run", tmp_path / "all/probe", tmp_path / "all/mean"]
    succeed_here("train/evaluate.py", *members, "--split", "test", "--out", tmp_path / "new")
    parts = [predictions(member, "test")["prediction"] for member in members]
    np.testing.assert_allclose(predictions(tmp_path / "new", "test")["prediction"], np.mean(parts, 0), rtol=1e-4)


def test_training_stimuli_are_marked(scored):
    succeed_here("train/evaluate.py", scored / "pixels", "--split", "train")
    block = metrics(scored / "pixels", "train")
    assert block["seen"]["fitted"] == block["stimuli"]


def test_what_a_probe_has_scored_itself_stays(predictors):
    done = run_here("train/evaluate.py", predictors / "probe")
    assert_refused(done, "already scored on val by train/probe.py", "another --split")
    assert "layers" in metrics(predictors / "probe", "val")
    assert_refused(run_here("train/evaluate.py", predictors / "probe", "--split", "left_out"), "left_out")


def test_other_sites_are_refused_with_a_way_out(predictors, tmp_path):
    other, _ = pack_recording(tmp_path, "other", n=40, size=24, sites=3)
    done = run_here("train/evaluate.py", predictors / "pixels", "--data", other, "--split", "test")
    assert_refused(done, "other sites", f"--images {other}")


def test_an_old_probe_says_what_to_do(predictors, tmp_path):
    shutil.copytree(predictors / "pixels", tmp_path / "old")
    (tmp_path / "old/predictor.safetensors").unlink()
    assert_refused(run_here("train/evaluate.py", tmp_path / "old", "--split", "test"), "probe again")
