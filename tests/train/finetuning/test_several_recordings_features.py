"""Bad samples, charts, reports, ensembles and teachers work for each of several recordings as for one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_refused, run_here, slow, succeed_here
from hostile import FIRST, flip, place_in
from launching import SMALL, history, succeed, weights
from make_recordings import pack_two
from make_sources import make_folder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_prep.shards.folder import ShardFolder
from data_prep.shards.packing import pack
from data_prep.sources.folder import Folder
from train.data.recordings import Recordings
from train.finetuning.setup.preparation import training_stimuli
from train.finetuning.setup.training_targets import site_weights, with_rates_of
from train.run.recipe import Recipe

NAMES = ("one", "two")
PROBE = [
    "--backbone.name",
    "test_convnext",
    "--backbone.weights",
    "random",
    "--images.size",
    32,
    "--layers",
    "stages.1",
]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[Path]:
    return pack_two(tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def folds(two, tmp_path_factory) -> list[Path]:
    """Two folds of a run on both recordings."""
    folder = tmp_path_factory.mktemp("folds")
    runs = [folder / f"fold_{number}" for number in (1, 2)]
    for number, run in enumerate(runs, 1):
        fold = ["--early-stopping.folds", 2, "--early-stopping.fold", number, "--task.kind", "hybrid"]
        succeed_here("train/finetune.py", "--data", *two, "--out", run, *SMALL, *fold, "--seed", number)
    return runs


@pytest.fixture(scope="module")
def joined(folds, tmp_path_factory) -> Path:
    """The folds, stacked."""
    out = tmp_path_factory.mktemp("joined") / "stack"
    output = succeed_here("train/evaluate.py", *folds, "--combine", "stack", "--out", out).stdout
    for name, stimuli in zip(NAMES, (12, 20), strict=True):
        assert all(f"{run}, {name}, val: {stimuli} stimuli" in output for run in folds)
        assert f"ensemble {out}, {name}, val: {stimuli} stimuli  R2" in output
    return out


def arrays(run: Path, split: str, name: str = "") -> dict[str, np.ndarray]:
    with np.load(run / "eval" / split / name / "predictions.npz", allow_pickle=False) as file:
        return dict(file)


def metrics(run: Path, name: str = "", split: str = "val") -> dict:
    return json.loads((run / "eval" / split / name / "metrics.json").read_text())


def train_ids(folder: Path) -> list[str]:
    return ShardFolder(folder).split("train").stimulus_ids


# ---- bad samples ---------------------------------------------------------------------------------------------------


def damaged(two: list[Path], folder: Path) -> tuple[list[Path], str]:
    """The same recordings, with a flipped bit in a training stimulus of the second."""
    places = [shutil.copytree(recording, folder / recording.name) for recording in two]
    offset, size = place_in(places[1], "png", 5)
    flip(places[1] / FIRST, offset + size // 2)
    return places, train_ids(places[1])[5]


def stimuli_of(places, **recipe) -> list[list[str]]:
    recordings, recipe = Recordings([ShardFolder(folder) for folder in places]), Recipe.model_validate(recipe)
    by_part = training_stimuli(recordings, recordings.divide(recipe), recipe)
    return [part.stimulus_ids for stimuli in by_part for part in stimuli.recordings]


def test_unreadable_stimuli_of_one_recording_are_named_and_left_out(two, tmp_path):
    places, bad = damaged(two, tmp_path)
    words = ["train/finetune.py", "--data", *places, *SMALL, "--epochs", 1]
    assert_refused(run_here(*words, "--out", tmp_path / "stopped"), FIRST, bad)
    done = succeed_here(*words, "--out", tmp_path / "run", "--on-bad-sample", "skip")
    assert "WARNING: 1 of 60 stimuli of two/train cannot be read and are LEFT OUT" in done.stdout
    left_out = json.loads((tmp_path / "run" / "env.json").read_text())["left_out"]
    assert {name: list(record["stimuli"]) for name, record in left_out.items()} == {"two/train": [bad]}
    done = succeed_here("train/evaluate.py", tmp_path / "run", "--split", "train")
    assert "1 of 60 stimuli of train" in done.stderr
    assert metrics(tmp_path / "run", "two", "train")["left_out"]["train"]["count"] == 1
    assert "left_out" not in metrics(tmp_path / "run", "one", "train")


def test_the_others_are_divided_as_all_would_be(two, tmp_path):
    places, bad = damaged(two, tmp_path)
    rest = stimuli_of(places, loader={"on_bad_sample": "skip"})
    assert rest == [[name for name in names if name != bad] for names in stimuli_of(two)]


# ---- charts and reports --------------------------------------------------------------------------------------------


def test_charts_show_each_recording_and_the_mean(folds, joined):
    board = EventAccumulator(str(folds[0]), size_guidance={"scalars": 0, "images": 0})
    board.Reload()
    lines = history(folds[0])

    def points(tag):
        return [point.value for point in board.Scalars(tag)]

    for metric in ("r2", "top1"):
        assert points(f"inner/{metric}") == pytest.approx([line["inner"][metric] for line in lines])
        for name in NAMES:
            recorded = [line["recordings"][name][metric] for line in lines]
            assert points(f"inner/{name}/{metric}") == pytest.approx(recorded)
        mean_score = np.mean([points(f"train/{name}/{metric}") for name in NAMES], axis=0)
        assert points(f"train/{metric}") == pytest.approx(mean_score, rel=1e-5)
    for name, sites in zip(NAMES, (5, 7), strict=True):
        scores = metrics(folds[0], name)
        assert points(f"val/{name}/r2") == pytest.approx([scores["regression"]["r2"]["mean"]], rel=1e-5)
        assert points(f"val/{name}/top1") == pytest.approx([scores["classification"]["top1"]], rel=1e-5)
        assert f"val/{name}/best, median and worst site" in board.Tags()["images"]
        assert board.Histograms(f"inner/{name}/r2_of_sites")[-1].histogram_value.num == sites


@pytest.mark.usefixtures("figures")
def test_a_report_has_each_recording_in_its_table(folds, joined, two, tmp_path):
    succeed_here("train/finetune.py", "--data", two[0], "--out", tmp_path / "alone", *SMALL)
    succeed_here("train/evaluate.py", tmp_path / "alone")
    runs = [folds[0], tmp_path / "alone", joined]
    done = succeed_here("train/report.py", *runs, "--out", tmp_path / "report", "--pair", folds[0], joined)
    of_one, of_two = done.stdout.split("two: 7 sites")
    for name in ("fold_1: one", "alone", "stack: one"):
        assert name in of_one
    assert "fold_1: two" in of_two
    assert "alone" not in of_two.split("Object classification")[0]
    table = (tmp_path / "report" / "table.csv").read_text()
    for name in NAMES:
        assert f"{metrics(folds[0], name)['regression']['r2']['mean']}" in table
        assert f"fold_1: {name}" in (tmp_path / "report" / "report.html").read_text()
    assert "trained on one + two" in table
    assert (tmp_path / "report" / "figures" / "site_by_site_2.png").exists()


# ---- ensembles -----------------------------------------------------------------------------------------------------


def test_folds_leave_each_training_stimulus_of_each_recording_out_once(folds, joined, two):
    for name, folder in zip(NAMES, two, strict=True):
        left_out = [arrays(run, "left_out", name)["stimulus_id"].tolist() for run in folds]
        assert sorted(left_out[0] + left_out[1]) == sorted(train_ids(folder))


def test_each_recording_has_an_ensemble_of_its_own(folds, joined, two, tmp_path):
    """Combined and scored as with a single recording."""
    assert not (joined / "eval" / "val" / "predictions.npz").exists()
    for name, folder in zip(NAMES, two, strict=True):
        ensemble, rates = arrays(joined, "val", name), ShardFolder(folder).split("val").rates()
        np.testing.assert_array_equal(ensemble["target"], rates)
        assert metrics(joined, name)["recording"] == name
        assert metrics(joined, name)["ensemble"]["members"][0]["mean_weight"] >= 0
        assert arrays(joined, "left_out", name)["stimulus_id"].tolist() == train_ids(folder)
    succeed_here("train/evaluate.py", *folds, "--out", tmp_path / "mean")
    for name in NAMES:
        expected = np.mean([arrays(run, "val", name)["prediction"] for run in folds], axis=0)
        np.testing.assert_allclose(arrays(tmp_path / "mean", "val", name)["prediction"], expected, rtol=1e-5)
    assert_refused(run_here("train/evaluate.py", *folds, "--data", two[0], "--out", joined), "another ensemble")


def test_runs_on_several_and_a_probe_of_one_are_joined_for_that_one(folds, joined, two, tmp_path):
    succeed_here("train/probe.py", "--data", two[0], "--out", tmp_path / "probe", *PROBE, "--layers", "stages.1")
    words = ["train/evaluate.py", *folds, tmp_path / "probe", "--combine", "stack", "--out", tmp_path / "out"]
    assert_refused(run_here(*words), "probe", "other sites", "two")
    assert not (tmp_path / "out").exists()
    succeed_here(*words, "--data", two[0])
    assert metrics(tmp_path / "out")["recording"] == "one"
    assert len(arrays(tmp_path / "out", "left_out")["stimulus_id"]) == 36


def test_left_out_of_one_recording_is_what_the_run_left_out(folds, joined, two, tmp_path):
    """They were divided together, though only one is scored, from where it lies by now: the run keeps a record."""
    copy = shutil.copytree(folds[0], tmp_path / "run", symlinks=True)
    shutil.rmtree(copy / "eval")
    moved = shutil.copytree(two[1], tmp_path / "moved")
    succeed_here("train/evaluate.py", copy, "--split", "left_out", "--data", moved)
    assert not (copy / "eval" / "left_out" / "one").exists()
    before, after = (arrays(run, "left_out", "two") for run in (folds[0], copy))
    np.testing.assert_array_equal(before["stimulus_id"], after["stimulus_id"])


@slow  # test_ensembles.py has it for one recording
def test_two_processes_join_the_same(folds, joined, tmp_path):
    succeed(2, "train/evaluate.py", *folds, "--combine", "stack", "--out", tmp_path / "out")
    for name in NAMES:
        a, b = (arrays(run, "val", name)["prediction"] for run in (joined, tmp_path / "out"))
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def test_an_ensemble_teaches_a_network_of_both_and_one_of_one(joined, two, tmp_path):
    for places, name in ((two, "both"), (two[:1], "alone")):
        teach = ["--distill.teacher", joined, "--distill.weight", 1, "--epochs", 1]
        succeed_here("train/finetune.py", "--data", *places, "--out", tmp_path / name, *SMALL, *teach)
        log = (tmp_path / name / "log.txt").read_text()
        assert [f"of the training stimuli of {folder.name}" in log for folder in two] == [True, name == "both"]
    succeed_here("train/probe.py", "--data", two[0], "--out", tmp_path / "probe", *PROBE, "--layers", "stages.1")
    words = ["--data", *two, "--out", tmp_path / "run", *SMALL, "--distill.teacher", tmp_path / "probe"]
    assert_refused(run_here("train/finetune.py", *words), "other sites", "two")


# ---- where readouts start, what sites count ------------------------------------------------------------------------


def test_windows_of_each_recordings_sites_are_those_found_alone(two, tmp_path):
    options = [*SMALL, "--epochs", 1, "--optimizer.lr", "1e-12", "--optimizer.weight-decay", 0]
    options += ["--readout.start", "field", "--readout.kind", "gaussian", "--backbone.cut", "stages.1"]
    tensors = {}
    for name, places in {"one": two[:1], "two": two[1:], "both": two}.items():
        succeed_here("train/finetune.py", "--data", *places, "--out", tmp_path / name, *options)
        tensors[name] = weights(tmp_path / name)
    for tensor in ("centre", "log_width", "sites.weight", "sites.bias"):
        alone = [tensors[name][f"heads.rates.{tensor}"] for name in NAMES]
        torch.testing.assert_close(tensors["both"][f"heads.rates.{tensor}"], torch.cat(alone), rtol=1e-3, atol=1e-4)
    assert tensors["both"]["heads.rates.centre"].abs().max() > 0


def test_a_subset_is_of_each_and_scales_its_sites(two):
    recipe = Recipe.model_validate({"subset": 20, "seed": 1})
    recordings = Recordings([ShardFolder(folder) for folder in two])
    fit, selection = training_stimuli(recordings, recordings.divide(recipe), recipe)
    assert [len(a) + len(b) for a, b in zip(fit.recordings, selection.recordings, strict=True)] == [20, 20]
    scaled = with_rates_of(recordings.manifest, fit).rates
    means = np.concatenate([np.nanmean(part.rates, axis=0) for part in fit.recordings])
    np.testing.assert_allclose(scaled.mean, means, rtol=1e-5)
    assert scaled.mean != recordings.manifest.rates.mean


def test_sites_are_weighed_among_those_of_their_recording(tmp_path):
    places = []
    for name, noise in (("clear", 0.5), ("noisy", 3.0)):
        make_folder(tmp_path / name, n=60, splits=True, sites=3, trials=4, rates=None, noise=noise)
        places.append(pack(Folder(source=tmp_path / name, name=name).open(), tmp_path / f"{name}_shards", 60, 1).folder)
    recordings, recipe = Recordings([ShardFolder(path) for path in places]), Recipe()
    weights = site_weights(training_stimuli(recordings, recordings.divide(recipe), recipe)[0])
    assert weights.shape == (6,)
    assert [weights[:3].mean(), weights[3:].mean()] == pytest.approx([1, 1])
    assert weights[3:].std() > 0
