"""Runs on several recordings are as elastic and exact as runs on one, and score each with its own readout."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import assert_refused, run_here, slow, succeed_here
from launching import SMALL, history, largest_difference, losses, succeed, weights
from make_recordings import pack_two
from sklearn.metrics import r2_score

from data_prep.shards.folder import ShardFolder
from train.data.loader import evaluation_loader
from train.data.recordings import combined_manifest
from train.data.stimuli import RecordingStimuli
from train.models.network import Network
from train.run.checkpoint import load_matching_tensors, load_progress
from train.run.recipe import Recipe, load_recipe

# Accumulation over batches that do not divide by the processes, an average of the weights, readouts from a ridge: a
# process has at most two stimuli in a pass, so that many show one recording alone.
OPTIONS = [
    *(*SMALL, "--batch.global-size", "7", "--batch.per-device", "2", "--mix", "equal", "--ema", "0.9"),
    *("--backbone.cut", "stages.1", "--readout.kind", "low_rank", "--readout.rank", "4", "--readout.start", "ridge"),
    *("--optimizer.lr", "1e-3", "--checkpoint.every-steps", "3", "--checkpoint.keep", "100"),
]
LOSS, TENSOR = 1e-6, 1e-5


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[Path]:
    return pack_two(tmp_path_factory.mktemp("two"))


def finetune(processes: int, *words) -> str:
    """Train; a single process runs within this one."""
    if processes > 1:
        return succeed(processes, "train/finetune.py", *words)
    done = succeed_here("train/finetune.py", *words)
    return done.stdout


@pytest.fixture(scope="module")
def run_on(two, tmp_path_factory):
    """A function from a number of processes and a strategy to a run."""
    folder = tmp_path_factory.mktemp("runs")

    def run(processes: int, strategy: str = "ddp") -> Path:
        out = folder / f"{strategy}_{processes}"
        if not out.exists():
            setting = strategy if strategy == "ddp" else f"ds_configs/{strategy}.json"
            finetune(processes, "--data", *two, "--out", out, *OPTIONS, "--strategy", setting)
        return out

    return run


def assert_close(run: Path, other: Path) -> None:
    assert losses(run) == pytest.approx(losses(other), rel=LOSS)
    assert largest_difference(weights(run), weights(other)) < TENSOR


@pytest.fixture(scope="module")
def scored(run_on) -> Path:
    """The run of one process, with each recording scored on val."""
    done = succeed_here("train/evaluate.py", run_on(1))
    for line in ("one, val: 12 stimuli", "two, val: 20 stimuli"):
        assert line in done.stdout
    return run_on(1)


def results(run: Path, recording: str) -> tuple[dict, dict[str, np.ndarray]]:
    """metrics.json and predictions.npz of a recording's val."""
    folder = run / "eval" / "val" / recording
    with np.load(folder / "predictions.npz", allow_pickle=False) as arrays:
        return json.loads((folder / "metrics.json").read_text()), dict(arrays)


# ---- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("processes", "strategy"), [pytest.param(2, "ddp", marks=slow), (3, "ddp"), pytest.param(2, "zero3", marks=slow)]
)
def test_the_run_does_not_depend_on_processes_or_strategy(run_on, processes, strategy):
    assert_close(run_on(processes, strategy), run_on(1))


def test_a_run_goes_on_in_mid_epoch_on_another_number_of_processes(run_on, two, tmp_path):
    """Step 12 of 18 is the third of the second epoch."""
    run = tmp_path / "run"
    shutil.copytree(run_on(1), run, symlinks=True)
    for checkpoint in (run / "checkpoints").glob("step_*"):
        if int(checkpoint.name.removeprefix("step_")) > 12:
            shutil.rmtree(checkpoint)
    output = finetune(2, "--data", *two, "--out", run, "--resume")
    assert "resumed after epoch 1, step 3 of the next (step 12)" in output
    assert_close(run, run_on(1))
    swapped = run_here("train/finetune.py", "--data", *reversed(two), "--out", run, "--resume")
    assert_refused(swapped, "other shards", "in the same order")


def test_the_mean_over_recordings_selects_and_is_recorded(run_on):
    run = run_on(1)
    for epoch in history(run):
        by_recording = epoch["recordings"]
        assert list(by_recording) == ["one", "two"]
        assert epoch["inner"]["r2"] == pytest.approx(
            np.mean([scores["r2"] for scores in by_recording.values()]), rel=1e-12
        )
    progress = load_progress(run / "checkpoints" / "best")
    assert progress.best == max(epoch["inner"]["r2"] for epoch in history(run))
    assert progress.recordings == {"one": 5, "two": 7}
    assert "mix equal: equally many stimuli of each recording in a step" in (run / "log.txt").read_text()
    env = json.loads((run / "env.json").read_text())
    assert [Path(folder).name for folder in env["data"]] == env["recordings"] == ["one", "two"]


def test_stimuli_in_proportion_train_what_the_joined_folder_trains(two, tmp_path):
    """Equal if no stimulus is shared; val selects, since only the inner splits differ."""
    packed = run_here("data_prep/pack.py", "joined", *two, "--out", tmp_path / "joined", "--workers", 1)
    assert packed.returncode == 0, packed.stderr
    options = [*SMALL, "--readout.kind", "flattened", "--backbone.cut", "stages.1", "--early-stopping.split", "val"]
    finetune(1, "--data", tmp_path / "joined", "--out", tmp_path / "of_joined", *options)
    run = tmp_path / "together"
    finetune(1, "--data", *two, "--out", run, *options)
    assert_close(run, tmp_path / "of_joined")
    succeed_here("train/evaluate.py", run)
    best = load_progress(run / "checkpoints" / "best").epoch
    (epoch,) = [line for line in history(run) if line["epoch"] == best]
    for name, scores in epoch["recordings"].items():  # what selects is what is scored afterwards
        regression = results(run, name)[0]["regression"]
        for score, value in scores.items():
            assert regression[score]["mean"] == pytest.approx(value, rel=1e-5)


def test_a_ridge_start_is_that_of_each_recording_alone(two, tmp_path):
    """The seed's backbone is the same; the readouts of one and two lie one after the other in that of both."""
    options = [*SMALL, "--epochs", "1", "--optimizer.lr", "1e-12", "--optimizer.weight-decay", "0"]
    options += ["--readout.start", "ridge", "--readout.kind", "factorised", "--backbone.cut", "stages.1"]
    starts = {}
    for name, places in {"one": two[:1], "two": two[1:], "both": two}.items():
        finetune(1, "--data", *places, "--out", tmp_path / name, *options)
        starts[name] = weights(tmp_path / name)
    for tensor in ("heads.rates.sites.weight", "heads.rates.sites.bias", "objective.responses.rate_std"):
        alone = torch.cat([starts["one"][tensor], starts["two"][tensor]])
        torch.testing.assert_close(starts["both"][tensor], alone, rtol=1e-3, atol=1e-4)
    assert starts["both"]["heads.rates.sites.weight"].abs().max() > 0.1


def test_a_hybrid_with_one_readout_to_the_classes_of_both(two, tmp_path):
    options = [*SMALL, "--task.kind", "hybrid", "--task.weighting", "uncertainty", "--epochs", "1"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"data": [str(folder) for folder in two], "mix": "equal"}))
    finetune(1, recipe, "--out", tmp_path / "run", *options)
    succeed_here("train/evaluate.py", tmp_path / "run")
    for name, sites in (("one", 5), ("two", 7)):
        metrics, _ = results(tmp_path / "run", name)
        assert len(metrics["regression"]["r2"]["per_site"]) == sites
        assert 0 <= metrics["classification"]["top1"] <= 1


def test_a_correlation_is_calibrated_on_each_recordings_own_stimuli(two, tmp_path):
    options = [*SMALL, "--loss.responses", "correlation", "--mix", "equal"]
    finetune(1, "--data", *two, "--out", tmp_path / "run", *options)
    succeed_here("train/evaluate.py", tmp_path / "run", "--split", "train")
    for name in ("one", "two"):
        folder = tmp_path / "run" / "eval" / "train" / name
        scores = json.loads((folder / "metrics.json").read_text())["regression"]
        assert scores["r2"]["mean"] == pytest.approx(scores["explained_variance"]["mean"], abs=0.05)
        assert scores["r2"]["mean"] > 0


# ---- scores --------------------------------------------------------------------------------------------------------


def test_each_recording_is_scored_with_its_own_readout(scored, two):
    """On its own stimuli and in its own units."""
    folders = [ShardFolder(path) for path in two]
    network = Network(
        load_recipe(scored / "recipe.yaml", Recipe), combined_manifest([folder.manifest for folder in folders]), 32
    ).eval()
    network.load_state_dict(load_matching_tensors(network, scored / "checkpoints" / "best", "network"))
    for folder, name, columns in zip(folders, ("one", "two"), (slice(0, 5), slice(5, 12)), strict=True):
        val = folder.split("val")
        (batch,) = evaluation_loader(RecordingStimuli(val, 32), size=len(val), rank=0, ranks=1, workers=0, pin=False)
        with torch.no_grad():
            expected = network.objective.responses.to_rates(network(batch.images)["rates"])[:, columns]
        metrics, arrays = results(scored, name)
        np.testing.assert_allclose(arrays["prediction"], expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(arrays["target"], val.rates())
        assert arrays["stimulus_id"].tolist() == val.stimulus_ids
        assert arrays["site_id"].tolist() == folder.manifest.site_ids
        recorded = ~np.isnan(arrays["target"])
        r2 = [r2_score(arrays["target"][rows, k], arrays["prediction"][rows, k]) for k, rows in enumerate(recorded.T)]
        assert metrics["regression"]["r2"]["per_site"] == pytest.approx(r2, rel=1e-5)
        assert (metrics["recording"], metrics["trained_on"]) == (name, ["one", "two"])


def test_scores_do_not_depend_on_processes_or_on_what_else_is_scored(scored, two, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(scored, run, symlinks=True)
    shutil.rmtree(run / "eval")
    succeed(3, "train/evaluate.py", run)
    before, arrays = zip(*(results(run, name) for name in ("one", "two")), strict=True)
    for name, metrics, one_run_arrays in zip(("one", "two"), before, arrays, strict=True):
        expected, predicted = results(scored, name)
        np.testing.assert_allclose(one_run_arrays["prediction"], predicted["prediction"], rtol=1e-5, atol=1e-5)
        assert metrics["regression"]["r2"]["mean"] == pytest.approx(expected["regression"]["r2"]["mean"], rel=1e-6)
    shutil.rmtree(run / "eval")
    moved = tmp_path / "elsewhere"
    shutil.copytree(two[1], moved)
    succeed_here("train/evaluate.py", run, "--data", moved)
    assert not (run / "eval" / "val" / "one").exists()
    assert np.array_equal(results(run, "two")[1]["prediction"], results(scored, "two")[1]["prediction"])


def test_a_recording_that_the_run_does_not_know_is_refused(scored, two, recording, tmp_path):
    assert_refused(run_here("train/evaluate.py", scored, "--data", recording), "not trained on a recording", "one, two")
    assert_refused(run_here("train/evaluate.py", scored, "--data", two[0], two[0]), "both called 'one'")
    other = tmp_path / "other"
    shutil.copytree(two[0], other)
    content = json.loads((other / "manifest.json").read_text())
    del content["checksum"]  # it was edited by hand
    content["sites"][2]["id"] = "another"
    (other / "manifest.json").write_text(json.dumps(content))
    assert_refused(
        run_here("train/evaluate.py", scored, "--data", other), "site list", "'another' instead of 'site_002'"
    )


def test_a_run_on_one_recording_is_scored_on_one(trained, two):
    assert_refused(run_here("train/evaluate.py", trained, "--data", *two), "was trained on one recording")
    refused = run_here("train/export.py", trained, "--out", trained, "--format", "timm", "--recording", "one")
    assert_refused(refused, "not trained on several recordings")


# ---- handing on ----------------------------------------------------------------------------------------------------


def test_the_network_is_exported_with_the_readout_of_one(scored, two, tmp_path):
    words = ["train/export.py", scored, "--out", tmp_path / "out", "--format", "predictor", "mat"]
    assert_refused(run_here(*words), "--recording", "one, two")
    assert_refused(run_here(*words, "--recording", "three"), "--recording", "one, two")
    assert not (tmp_path / "out").exists()
    succeed_here(*words, "--recording", "two")
    spec = importlib.util.spec_from_file_location("predictor_of_two", tmp_path / "out" / "predictor.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    predictor = module.Predictor(tmp_path / "out")
    val = ShardFolder(two[1]).split("val")
    (batch,) = evaluation_loader(RecordingStimuli(val, 32), size=len(val), rank=0, ranks=1, workers=0, pin=False)
    prediction = predictor.predict(batch.images.permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(prediction, results(scored, "two")[1]["prediction"], rtol=1e-4, atol=1e-4)
    assert predictor.site_ids == val.manifest.site_ids
    assert (tmp_path / "out" / "predictions_val.mat").exists()
