"""Scores are exact, and the same on any number of processes."""

import shutil

import numpy as np
import pytest
from helpers import assert_refused, run_here, slow, succeed_here
from launching import SMALL, metrics, predictions, succeed, succeed_on
from make_sources import make_folder, make_it_h5
from sklearn.metrics import explained_variance_score, mean_squared_error, r2_score

from data_prep.shards.folder import ShardFolder
from data_prep.shards.manifest import from_json_list

SCORES = ("r2", "explained_variance", "mse", "pearson_r", "squared_pearson_r", "r2_er")


@pytest.fixture(scope="module")
def evaluated_on(trained, tmp_path_factory):
    """A function from a number of processes to the trained run evaluated on them."""
    folder = tmp_path_factory.mktemp("evaluated")

    def evaluate(processes):
        run = folder / f"on_{processes}"
        if not run.exists():
            shutil.copytree(trained, run, symlinks=True)
            succeed_on(processes, "train/evaluate.py", run, "--split", "val")
        return run

    return evaluate


@pytest.fixture(scope="module")
def evaluated(evaluated_on):
    return evaluated_on(3)


@pytest.mark.parametrize("processes", [pytest.param(2, marks=slow), 3])
def test_metrics_do_not_depend_on_the_process_count(evaluated_on, processes):
    one, more = metrics(evaluated_on(1)), metrics(evaluated_on(processes))
    assert more["world_size"] == processes
    assert more["stimuli"] == one["stimuli"]
    np.testing.assert_allclose(
        predictions(evaluated_on(processes))["prediction"],
        predictions(evaluated_on(1))["prediction"],
        rtol=1e-5,
        atol=1e-5,
    )
    for score in SCORES:
        per_site = [from_json_list(scores["regression"][score]["per_site"]) for scores in (one, more)]
        np.testing.assert_allclose(*per_site, rtol=1e-6)
        assert more["regression"][score]["mean"] == pytest.approx(one["regression"][score]["mean"], rel=1e-6)


def test_metrics_equal_scikit_learn_on_the_predictions(evaluated):
    arrays, scores = predictions(evaluated), metrics(evaluated)["regression"]
    y, p = arrays["target"].astype(np.float64), arrays["prediction"].astype(np.float64)
    assert scores["r2"]["mean"] == pytest.approx(r2_score(y, p), rel=1e-6)
    assert scores["explained_variance"]["mean"] == pytest.approx(explained_variance_score(y, p), rel=1e-6)
    assert scores["mse"]["mean"] == pytest.approx(mean_squared_error(y, p), rel=1e-6)
    r = [np.corrcoef(y[:, site], p[:, site])[0, 1] for site in range(y.shape[1])]
    assert scores["pearson_r"]["per_site"] == pytest.approx(r, rel=1e-6)


def test_every_stimulus_is_predicted_once_in_the_order_of_the_shards(recording, evaluated):
    val = ShardFolder(recording).split("val")
    arrays = predictions(evaluated)
    assert arrays["stimulus_id"].tolist() == val.stimulus_ids
    assert metrics(evaluated)["stimuli"] == ShardFolder(recording).manifest.splits["val"].stimuli
    np.testing.assert_array_equal(arrays["target"], val.rates())


def test_metrics_state_their_provenance(evaluated):
    scores = metrics(evaluated)
    assert scores["simulated"] is True
    assert scores["selected_on"] == ["inner"]
    method = scores["regression"]["ceiling"]["method"]
    assert "variance components" in method
    for name in ("ceiled_explained_variance", "ceiled_pearson_r"):
        assert scores["regression"][name]["ceiling"] == method
    for name in ("feve", "r2_er"):
        assert "repetitions" in scores["regression"][name]["ceiling"]
    low, high = scores["regression"]["r2"]["ci95"]
    assert low < scores["regression"]["r2"]["mean"] < high


def test_the_brain_score_is_that_of_predictions_and_manifest(recording, evaluated):
    arrays, block = predictions(evaluated), metrics(evaluated)["regression"]
    y, p = arrays["target"].astype(np.float64), arrays["prediction"].astype(np.float64)
    r = np.median([np.corrcoef(y[:, site], p[:, site])[0, 1] for site in range(y.shape[1])])
    ceiling = np.median(ShardFolder(recording).manifest.ceiling.split_half)
    assert block["brain_score"]["score"] == pytest.approx(r**2 / ceiling, rel=1e-6)
    assert block["brain_score"]["before_2026_01"]["score"] == pytest.approx((r / ceiling) ** 2, rel=1e-6)
    assert block["brain_score"]["median_ceiling"] == pytest.approx(ceiling)


def test_the_course_file_is_packed_trained_and_predicted(tmp_path):
    """IT_data.h5 has no test responses, so that only predictions are written for that split."""
    make_it_h5(tmp_path / "IT_data.h5", n_train=60, n_val=20, n_test=11, size=32, sites=7)
    succeed_here("data_prep/pack.py", "it-h5", tmp_path / "IT_data.h5", "--out", tmp_path / "shards")
    run = tmp_path / "run"
    succeed_here("train/finetune.py", "--data", tmp_path / "shards", "--out", run, *SMALL)
    succeed_here("train/evaluate.py", run, "--split", "val")
    succeed(2, "train/evaluate.py", run, "--split", "test")
    assert metrics(run)["stimuli"] == 20
    unknown = predictions(run, "test")
    assert unknown["prediction"].shape == (11, 7)
    assert "target" not in unknown
    assert not (run / "eval" / "test" / "metrics.json").exists()
    assert np.isfinite(unknown["prediction"]).all()


def test_hybrid_scores_responses_and_classes(recording, tmp_path):
    run = tmp_path / "run"
    hybrid = ["--task.kind", "hybrid", "--epochs", "1"]
    succeed_here("train/finetune.py", "--data", recording, "--out", run, *SMALL, *hybrid)
    succeed_here("train/evaluate.py", run)
    scores = metrics(run)
    assert set(scores["classification"]) == {"top1", "top5", "balanced_accuracy", "per_class"}
    assert 0 <= scores["classification"]["top1"] <= scores["classification"]["top5"] <= 1
    assert len(scores["regression"]["r2"]["per_site"]) == 12


def test_evaluating_on_other_sites_is_refused(trained, tmp_path):
    make_it_h5(tmp_path / "IT_data.h5", n_train=20, n_val=10, n_test=5, size=32, sites=12)
    succeed_here("data_prep/pack.py", "it-h5", tmp_path / "IT_data.h5", "--out", tmp_path / "shards")
    assert_refused(run_here("train/evaluate.py", trained, "--data", tmp_path / "shards"), "site list")


def test_classes_missing_from_train_raise_a_warning(tmp_path):
    make_folder(tmp_path / "src", n=60, n_objects=6)
    words = ["--split", "grouped", "--split-by", "object", "--split-fractions", "0.3", "0.1"]
    succeed_here("data_prep/pack.py", "folder", tmp_path / "src", "--out", tmp_path / "shards", *words)
    run = tmp_path / "run"
    task = ["--task.kind", "classification", "--epochs", "1"]
    succeed_here("train/finetune.py", "--data", tmp_path / "shards", "--out", run, *SMALL, *task)
    done = run_here("train/evaluate.py", run)
    assert "by construction" in done.stderr
    assert metrics(run)["classification"]["classes_not_in_train"] == 2
    assert metrics(run)["classification"]["top1"] == 0
