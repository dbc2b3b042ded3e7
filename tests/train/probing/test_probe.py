"""Probes are exact on any number of processes, and the report shows their scores."""

import os
import shutil
import time

import numpy as np
import pytest
import torch
from forked_python import forked_python
from helpers import run_here, slow, start_group, succeed_here
from launching import SMALL, metrics, predictions, succeed, succeed_on
from safetensors.torch import load_file
from sklearn.cross_decomposition import PLSRegression
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression, RidgeCV

from data_prep.shards.folder import ShardFolder
from train.data.stimuli import RecordingStimuli
from train.evaluation.figures.layer_figure import layer_label
from train.models.saved_probe import SAVED_PROBE
from train.regression.ridge import PENALTIES

LAYERS = ["--backbone.name", "test_convnext", "--backbone.weights", "random", "--images.size", "32"]


@pytest.fixture(scope="module")
def probed_on(recording, tmp_path_factory):
    """A function from a number of processes to a probe of all stages, with all that sites learn from each other."""
    folder = tmp_path_factory.mktemp("probed")

    def probe(processes):
        out = folder / f"run_{processes}"
        if not out.exists():
            command = ["train/probe.py", "--data", recording, "--out", out, *LAYERS]
            succeed_on(processes, *command, "--sites-learn", "together", "--response", "curved")
        return out

    return probe


@pytest.fixture(scope="module")
def probed(probed_on):
    return probed_on(1)


@pytest.mark.parametrize("processes", [pytest.param(2, marks=slow), 3])
def test_a_probe_does_not_depend_on_the_process_count(probed_on, processes):
    one, more = metrics(probed_on(1)), metrics(probed_on(processes))
    assert list(more["layers"]) == list(one["layers"])
    assert more["chosen"] == one["chosen"]
    for layer, block in one["layers"].items():
        expected = block["regression"]["r2"]["per_site"]
        assert more["layers"][layer]["regression"]["r2"]["per_site"] == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("processes", [pytest.param(2, marks=slow), 3])
def test_the_saved_predictor_does_not_depend_on_the_process_count(probed_on, processes):
    one, more = (load_file(probed_on(count) / SAVED_PROBE) for count in (1, processes))
    assert one.keys() == more.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(more[name], tensor, rtol=1e-4, atol=float(1e-4 * tensor.std()))
    assert not list(probed_on(processes).glob("**/.*.tmp"))


def pixels_and_rates(recording, size):
    """Pixels as float64 rows, and responses, by split."""
    shards = ShardFolder(recording)
    images, rates = {}, {}
    for name in ("train", "val"):
        split = shards.split(name)
        stimuli = RecordingStimuli(split, size)
        images[name] = stimuli.images(stimuli.subset).numpy().transpose(0, 3, 1, 2)
        images[name] = images[name].reshape(len(stimuli), -1).astype(np.float64) / 255
        rates[name] = split.rates().astype(np.float64)
    return images, rates


def test_ridge_on_pixels_equals_scikit_learn(recording, tmp_path):
    """RidgeCV uses the same leave-one-out error; fitting one site at a time gives each its own penalty."""
    options = ["--layers", "pixels", "--images.size", "16", "--components", "None"]
    succeed(2, "train/probe.py", "--data", recording, "--out", tmp_path / "run", *options)
    images, rates = pixels_and_rates(recording, 16)
    centred = images["train"] - images["train"].mean(0)
    unit = np.square(centred).sum() / len(centred)
    expected = [
        RidgeCV(alphas=PENALTIES * unit, gcv_mode="eigen").fit(images["train"], y).predict(images["val"])
        for y in rates["train"].T
    ]
    np.testing.assert_allclose(predictions(tmp_path / "run")["prediction"], np.array(expected).T, rtol=5e-4)


def probe_pixels(recording, out, processes, *options):
    """Predictions from pixels with float64 products, accumulated over blocks of few columns."""
    words = ["train/probe.py", "--data", recording, "--out", out, "--layers", "pixels", "--images.size", "16"]
    words += ["--products", "float64", "--memory", "0.0005", *options]
    if processes > 1:
        succeed(processes, *words)
    else:
        succeed_here(*words)
    return predictions(out)["prediction"]


@pytest.mark.parametrize("processes", [1, pytest.param(3, marks=slow)])
def test_least_squares_on_principal_components_equals_scikit_learn(recording, tmp_path, processes):
    predicted = probe_pixels(recording, tmp_path / "run", processes, "--readout", "ols", "--components", "30")
    images, rates = pixels_and_rates(recording, 16)
    pca = PCA(30, svd_solver="full").fit(images["train"])
    fit = LinearRegression().fit(pca.transform(images["train"]), rates["train"])
    np.testing.assert_allclose(predicted, fit.predict(pca.transform(images["val"])), rtol=2e-6)  # of float32 pixels


@pytest.mark.parametrize("processes", [1, 2])
def test_partial_least_squares_equals_scikit_learn(recording, tmp_path, processes):
    predicted = probe_pixels(recording, tmp_path / "run", processes, "--readout", "pls", "--latent", "6")
    images, rates = pixels_and_rates(recording, 16)
    fit = PLSRegression(6, scale=False, tol=1e-12, max_iter=5000).fit(images["train"], rates["train"])
    np.testing.assert_allclose(predicted, fit.predict(images["val"]), rtol=1e-5)


def test_the_network_of_a_run_is_probed_from_its_folder(recording, tmp_path):
    """A run folder and its weights file give the same features, which differ from random ones."""
    run, options = tmp_path / "run", ["--backbone.name", "test_convnext", "--images.size", "32"]
    finetuned = ["--task.kind", "classification", "--optimizer.lr", "1e-2", "--epochs", "3"]
    succeed_here("train/finetune.py", "--data", recording, "--out", run, *SMALL, *finetuned)
    predicted = {}
    for name, weights in (("trained", run), ("file", run / "checkpoints/best/network.safetensors"), ("not", "random")):
        out = tmp_path / name
        words = ["--layers", "stages.3", "--backbone.weights", weights, *options]
        succeed_here("train/probe.py", "--data", recording, "--out", out, *words)
        predicted[name] = predictions(out)["prediction"]
    np.testing.assert_array_equal(predicted["trained"], predicted["file"])
    assert np.abs(predicted["trained"] - predicted["not"]).max() > 0.1


@pytest.mark.parametrize("by", ["random", "stratified", "grouped"])
def test_cross_validation_predicts_every_stimulus_once(recording, tmp_path, by):
    options = [*LAYERS, "--layers", "stages.1", "stages.2", "--split", "cv", "--cross-validation.by", by]
    options += ["--cross-validation.folds", "4"]
    succeed_here("train/probe.py", "--data", recording, "--out", tmp_path / "run", *options)
    scores, predicted = metrics(tmp_path / "run", "cv"), predictions(tmp_path / "run", "cv")
    assert scores["stimuli"] == len(set(predicted["stimulus_id"])) == 240
    assert np.isfinite(predicted["prediction"]).all()
    assert len(scores["chosen_by_fold"]) == 4
    assert set(scores["layers"]) == {"stages.1", "stages.2"}
    for block in scores["layers"].values():
        assert {"rsa", "cka"} <= block.keys()


def test_a_killed_probe_resumes_from_the_stored_activations(recording, tmp_path):
    """Stored activations end within a row; complete rows are reused, and the scores are the same."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ["--data", recording, *LAYERS, "--batch-size", "16"]
    succeed_here("train/probe.py", "--out", whole, *options)
    words = [forked_python(), "train/probe.py", "--out", cut, *options]
    process = start_group(words, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while not list(cut.glob("scratch/*/train/*.f32")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.communicate()
    stored = sorted(cut.glob("scratch/*/train/*.f32"))
    if stored:  # else it was killed before, or after, extraction; it must go on all the same
        with stored[0].open("ab") as file:
            file.write(b"\x00\x01\x02")
    succeed_here("train/probe.py", "--data", recording, "--out", cut, "--resume")
    assert metrics(cut) == metrics(whole)
    assert not (cut / "scratch").exists()


def test_the_table_shows_the_numbers_of_metrics_json(probed, trained, tmp_path):
    succeed_here("train/evaluate.py", trained)
    done = succeed_here("train/report.py", probed, trained, "--out", tmp_path / "report")
    text = (tmp_path / "report" / "table.md").read_text()
    assert "written to" in done.stdout
    assert "SIMULATED" in text
    for run in (probed, trained):
        row = next(line for line in text.splitlines() if line.startswith(f"| {run.name}"))
        block = metrics(run)["regression"]
        for score in ("r2", "explained_variance", "mse", "pearson_r"):
            low, high = block[score]["ci95"]
            assert f"{block[score]['mean']:.3f} [{low:.3f}, {high:.3f}]" in row


def test_a_probe_shows_metrics_of_other_papers_of_every_layer(probed):
    text, scores = (probed / "eval/val/table.md").read_text(), metrics(probed)
    for block in scores["layers"].values():
        medians = [block["regression"][name]["median"] for name in ("squared_pearson_r", "r2_er")]
        assert f"| {medians[0]:.3f} | {medians[1]:.3f} |" in text
    brain_score = scores["regression"]["brain_score"]
    low, high = brain_score["ci95"]
    assert f"Brain-Score of the chosen layer: {brain_score['score']:.3f} [{low:.3f}, {high:.3f}]" in text


def test_layers_are_ranked_with_intervals_that_hold_together(probed, tmp_path):
    scores = metrics(probed)
    standings = {layer: block["standing"] for layer, block in scores["layers"].items()}
    shares = np.array([standing["ranks"]["probability"] for standing in standings.values()])
    np.testing.assert_allclose(shares.sum(axis=0), 1)
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    for layer, standing in standings.items():
        alone, together = scores["layers"][layer]["regression"]["r2"]["ci95"], standing["adjusted"]
        # Of so few stimuli a layer's own interval may be wider: it is not symmetric, and its tails are expanded.
        assert together[1] - together[0] > 0.9 * (alone[1] - alone[0])
        assert 1 <= standing["ranks"]["best"] <= standing["ranks"]["worst"] <= len(standings)
    succeed_here("train/report.py", probed, "--out", tmp_path)
    assert f"Best by R², adjusted for {len(standings)} layers: " in (tmp_path / "report.html").read_text()


def test_the_report_names_a_run_without_scores(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run", symlinks=True, ignore=shutil.ignore_patterns("eval"))
    done = succeed_here("train/report.py", tmp_path / "run", "--out", tmp_path / "report")
    assert "run: not scored on val yet: 2 of 2 epochs done" in done.stdout
    assert "train/evaluate.py" in done.stdout


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--layers", "stages.9"], "stages"),
        (["--layers", "pixels", "all"], "pixels are not a layer"),
        (["--layers", "head.norm"], "no output of its own"),
        (["--layers", "stages.0", "stages.1", "--joined", "by_channels"], "read together (--layers a+b)"),
        (["--split", "train"], "--split"),
        (["--readout", "pls", "--components", "5"], "only with readout ridge or ols"),
        (["--readout", "ols", "--sites-learn", "together"], "only with readout ridge"),
        (["--readout", "pls", "--response", "curved"], "only with readout ridge"),
        (["--split", "cv", "--cross-validation.folds", "1000"], "cannot fill 1000 folds"),
        (["--split", "cv", "--cross-validation.by", "grouped", "--cross-validation.key", "objct"], "objct"),
        (["--resume"], "not a probe that can be resumed"),
    ],
)
def test_bad_probe_options_are_refused(recording, tmp_path, options, expected):
    done = run_here("train/probe.py", "--data", recording, "--out", tmp_path / "run", *LAYERS, *options)
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("layer", "label"),
    [
        ("blocks.4", "blocks.4"),
        ("a+b+c+d", "a+b+c+d"),
        ("blocks.2+blocks.2.0.bn2+blocks.3+blocks.4+blocks.5", "blocks.2+...+blocks.5 (5 modules)"),
    ],
)
def test_summed_layers_have_short_labels_in_tables(layer, label):
    assert layer_label(layer) == label
