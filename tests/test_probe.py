"""Probes: exact ridge on any number of processes; and the table over runs."""

import numpy as np
import pytest
from helpers import run_command, run_here
from launching import SMALL, metrics, predictions, succeed
from sklearn.linear_model import Ridge, RidgeCV

from data_prep.shards import ShardFolder
from train.gram import PENALTIES, Gram, ridge
from train.loader import Stimuli

LAYERS = ["--backbone.name", "test_convnext", "--backbone.weights", "random", "--images.size", "32"]


@pytest.fixture(scope="module")
def probed(recording, tmp_path_factory):
    """All stages of a random network, probed on 1, 2 and 3 processes."""
    runs = {}
    for processes in (1, 2, 3):
        runs[processes] = tmp_path_factory.mktemp("probed") / f"run_{processes}"
        succeed(processes, "train/probe.py", "--data", recording, "--out", runs[processes], *LAYERS)
    return runs


@pytest.mark.parametrize("processes", [2, 3])
def test_a_probe_does_not_depend_on_the_number_of_processes(probed, processes):
    one, more = metrics(probed[1]), metrics(probed[processes])
    assert list(more["layers"]) == list(one["layers"])
    assert more["chosen"] == one["chosen"]
    for layer, block in one["layers"].items():
        expected = block["regression"]["r2"]["per_site"]
        assert more["layers"][layer]["regression"]["r2"]["per_site"] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_pixels_equal_scikit_learn(recording, tmp_path):
    """RidgeCV chooses by the same leave-one-out error; one site at a time gives each its own penalty."""
    options = ["--layers", "pixels", "--images.size", "16"]
    succeed(2, "train/probe.py", "--data", recording, "--out", tmp_path / "run", *options)
    shards = ShardFolder(recording)
    pictures, rates = {}, {}
    for name in ("train", "val"):
        split = shards.split(name)
        stimuli = Stimuli(split, 16)
        pictures[name] = np.stack([stimuli._picture(i) for i in range(len(stimuli))]).transpose(0, 3, 1, 2)
        pictures[name] = pictures[name].reshape(len(stimuli), -1).astype(np.float64) / 255
        rates[name] = split.rates().astype(np.float64)
    centred = pictures["train"] - pictures["train"].mean(0)
    unit = np.square(centred).sum() / len(centred)
    expected = [
        RidgeCV(alphas=PENALTIES * unit, gcv_mode="eigen").fit(pictures["train"], y).predict(pictures["val"])
        for y in rates["train"].T
    ]
    np.testing.assert_allclose(predictions(tmp_path / "run")["prediction"], np.array(expected).T, rtol=5e-4)


def test_sites_recorded_for_other_stimuli_get_the_ridge_of_their_stimuli():
    generator = np.random.default_rng(0)
    scale = np.linspace(3, 0.1, 90)  # or every penalty would do as well as any other
    features, others = generator.normal(size=(40, 90)) * scale, generator.normal(size=(7, 90)) * scale
    rates = features[:, :5] @ generator.normal(size=(5, 4)) + 2 * generator.normal(size=(40, 4))
    rates[3:9, 1] = np.nan
    rates[:, 3] = np.nan
    mean = features.mean(0)
    found = ridge(Gram((features - mean) @ (features - mean).T, (others - mean) @ (features - mean).T), rates)
    there = ~np.isnan(rates[:, 1])
    centred = features[there] - features[there].mean(0)
    unit = np.square(centred).sum() / there.sum()
    choice = RidgeCV(alphas=PENALTIES * unit).fit(features[there], rates[there, 1])
    assert found.penalty[1] * unit == pytest.approx(choice.alpha_)
    reference = Ridge(alpha=choice.alpha_, solver="svd").fit(features[there], rates[there, 1])
    np.testing.assert_allclose(found.prediction[:, 1], reference.predict(others), rtol=1e-5)
    assert np.isnan(found.prediction[:, 3]).all()


def test_the_table_shows_the_numbers_of_metrics_json(probed, trained, tmp_path):
    succeed(2, "train/evaluate.py", trained)
    done = run_command(["train/report.py", probed[1], trained, "--out", tmp_path / "report"])
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "report" / "table.md").read_text()
    assert text.strip() in done.stdout
    assert "SIMULATED" in text
    for run in (probed[1], trained):
        row = next(line for line in text.splitlines() if line.startswith(f"| {run.name}"))
        block = metrics(run)["regression"]
        for score in ("r2", "explained_variance", "mse", "pearson_r"):
            low, high = block[score]["ci95"]
            assert f"{block[score]['mean']:.3f} [{low:.3f}, {high:.3f}]" in row


def test_a_run_that_was_not_evaluated_is_named(recording, tmp_path):
    succeed(1, "train/finetune.py", "--data", recording, "--out", tmp_path / "run", *SMALL, "--epochs", "1")
    done = run_command(["train/report.py", tmp_path / "run", "--out", tmp_path / "report"])
    assert done.returncode == 2
    assert "train/evaluate.py" in done.stderr
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--layers", "stages.9"], "stages"),
        (["--layers", "pixels", "all"], "pixels are no layer"),
        (["--split", "train"], "--split"),
    ],
)
def test_bad_input_to_a_probe(recording, tmp_path, options, expected):
    done = run_here("train/probe.py", "--data", recording, "--out", tmp_path / "run", *LAYERS, *options)
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
