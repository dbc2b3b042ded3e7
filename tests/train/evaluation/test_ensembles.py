"""Ensembles of runs and probes, distillation from them, and a proof that held-out responses influence nothing."""

import json
import shutil

import numpy as np
import pytest
from helpers import assert_refused, run_here, succeed_here
from launching import SMALL, losses, metrics, predictions, succeed
from make_sources import make_folder
from sklearn.metrics import r2_score

from data_prep.shards.folder import ShardFolder
from data_prep.shards.packing import pack
from data_prep.sources.folder import Folder
from train.data.recordings import Recordings
from train.finetuning.setup.preparation import training_stimuli
from train.finetuning.setup.training_targets import site_weights
from train.run.recipe import Recipe

PROBE = ["--backbone.name", "test_convnext", "--backbone.weights", "random", "--images.size", 32]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """100 stimuli with 4 trials, 60 of them for training; half of the sites are noisier."""
    path = tmp_path_factory.mktemp("ensemble")
    make_folder(path / "src", n=100, splits=True, sites=6, trials=4, rates=None, noise=1.0)
    trials = np.load(path / "src" / "trials.npy")
    trials[..., 3:] += np.random.default_rng(1).normal(size=trials[..., 3:].shape) * 3
    np.save(path / "src" / "trials.npy", trials)
    return pack(Folder(source=path / "src").open(), path / "shards", stimuli_per_shard=50, workers=1).folder


@pytest.fixture(scope="module")
def members(data, tmp_path_factory):
    """Three folds of a run, and a probe."""
    folder = tmp_path_factory.mktemp("members")
    folds = [folder / f"fold_{k}" for k in (1, 2, 3)]
    for number, run in enumerate(folds, 1):
        fold = ["--early-stopping.folds", 3, "--early-stopping.fold", number, "--seed", number]
        succeed_here("train/finetune.py", "--data", data, "--out", run, *SMALL, *fold)
    succeed_here(
        "train/probe.py", "--data", data, "--out", folder / "probe", *PROBE, "--layers", "stages.0", "stages.1"
    )
    return [*folds, folder / "probe"]


@pytest.fixture(scope="module")
def joined(members, tmp_path_factory):
    """The members combined by mean and by stacking."""
    out = {combine: tmp_path_factory.mktemp("joined") / combine for combine in ("mean", "stack")}
    for combine, folder in out.items():
        succeed_here("train/evaluate.py", *members, "--combine", combine, "--out", folder)
    return out


def test_folds_leave_every_training_stimulus_out_once(members, joined, data):
    left_out = np.concatenate([predictions(run, "left_out")["stimulus_id"] for run in members[:3]])
    assert sorted(left_out.tolist()) == sorted(ShardFolder(data).split("train").stimulus_ids)


def test_the_mean_is_over_all_runs(members, joined):
    expected = np.mean([predictions(run)["prediction"] for run in members], axis=0)
    ensemble = predictions(joined["mean"])
    np.testing.assert_allclose(ensemble["prediction"], expected, rtol=1e-5)
    assert metrics(joined["mean"])["regression"]["r2"]["mean"] == pytest.approx(
        r2_score(ensemble["target"], ensemble["prediction"]), rel=1e-6
    )


def test_stacking_weights_use_left_out_predictions(members, joined):
    """The folds are one member, weighted by their predictions of left-out stimuli."""
    scores = metrics(joined["stack"])
    assert [len(member["runs"]) for member in scores["ensemble"]["members"]] == [3, 1]
    assert all(member["mean_weight"] >= 0 for member in scores["ensemble"]["members"])
    assert scores["selected_on"][-1] == "train, left out"
    assert len(predictions(joined["stack"], "left_out")["stimulus_id"]) == 60


def test_an_ensemble_can_be_joined_again_and_does_not_overwrite_another(members, joined, tmp_path):
    words = [joined["stack"], members[0], "--out", tmp_path / "again"]
    first, second = (succeed_here("train/evaluate.py", *words) for _ in range(2))
    assert f"{members[0]}, val: 20 stimuli  R2" in first.stdout
    assert f"ensemble {tmp_path / 'again'}, val: 20 stimuli  R2" in first.stdout
    assert "already has scores" not in first.stderr
    assert f"{tmp_path / 'again'} already has scores on val; they are replaced" in second.stderr
    environment = json.loads((tmp_path / "again" / "env.json").read_text())
    assert environment["command"] == ["evaluate.py", *map(str, words)]
    assert environment["data"] == json.loads((tmp_path / "again" / "ensemble.json").read_text())["data"]
    done = run_here("train/evaluate.py", *members[:2], "--out", joined["mean"])
    assert_refused(done, "another ensemble", "--out")
    assert_refused(run_here("train/evaluate.py", *members[:2]), "--out")


def test_runs_that_cannot_be_stacked_are_refused(members, data, tmp_path):
    succeed_here(
        "train/probe.py", "--data", data, "--out", tmp_path / "ols", *PROBE, "--layers", "stages.1", "--readout", "ols"
    )
    done = run_here("train/evaluate.py", members[3], tmp_path / "ols", "--combine", "stack", "--out", tmp_path / "out")
    assert_refused(done, "left_out", "ridge")
    assert not (tmp_path / "out").exists()


def test_a_network_learns_from_an_ensemble(data, members, joined, tmp_path):
    teach = ["--distill.teacher", joined["stack"], "--distill.weight", 1]
    succeed_here("train/finetune.py", "--data", data, "--out", tmp_path / "run", *SMALL, *teach, "--epochs", 30)
    succeed_here("train/evaluate.py", tmp_path / "run", "--split", "train")
    assert "teaches" in (tmp_path / "run" / "log.txt").read_text()
    student, taught = predictions(tmp_path / "run", "train"), predictions(joined["stack"], "left_out")
    assert student["stimulus_id"].tolist() == taught["stimulus_id"].tolist()

    def likeness(target):
        return np.mean([np.corrcoef(student["prediction"][:, s], target[:, s])[0, 1] for s in range(6)])

    assert likeness(taught["prediction"]) > likeness(student["target"])
    scored = predictions(tmp_path / "run", "train")["target"]
    np.testing.assert_array_equal(scored, ShardFolder(data).split("train").rates())


def test_a_teacher_must_have_left_stimuli_out(data, trained, tmp_path):
    words = ["--data", data, "--out", tmp_path / "run", *SMALL, "--distill.teacher"]
    assert_refused(run_here("train/finetune.py", *words, trained), "left_out")
    assert not (tmp_path / "run").exists()


def test_unreliable_sites_count_less(data, tmp_path):
    recordings, recipe = Recordings([ShardFolder(data)]), Recipe()
    weights = site_weights(training_stimuli(recordings, recordings.divide(recipe), recipe)[0])
    assert weights.mean() == pytest.approx(1)
    assert weights[:3].min() > weights[3:].max()
    one_epoch = ["--data", data, *SMALL, "--epochs", 1, "--optimizer.lr", 1e-9]
    for name in ("equal", "reliability"):
        succeed_here("train/finetune.py", "--out", tmp_path / name, *one_epoch, "--loss.site-weights", name)
    assert losses(tmp_path / "equal")[0] != pytest.approx(losses(tmp_path / "reliability")[0], rel=1e-6)


def test_reliability_needs_trials(tmp_path):
    make_folder(tmp_path / "src", n=40, splits=True)
    shards = pack(Folder(source=tmp_path / "src").open(), tmp_path / "shards", stimuli_per_shard=40, workers=1).folder
    words = ["--data", shards, "--out", tmp_path / "run", *SMALL, "--loss.site-weights", "reliability"]
    assert_refused(run_here("train/finetune.py", *words), "loss.site_weights", "trials")


def test_subsets_are_nested_and_recorded(data, tmp_path):
    seen = {}
    for size in (20, 40):
        succeed_here(
            "train/probe.py",
            "--data",
            data,
            "--out",
            tmp_path / str(size),
            *PROBE,
            "--layers",
            "stages.1",
            "--subset",
            size,
        )
        seen[size] = set(predictions(tmp_path / str(size), "left_out")["stimulus_id"].tolist())
        assert len(seen[size]) == metrics(tmp_path / str(size))["training_stimuli"] == size
        succeed_here("train/evaluate.py", tmp_path / str(size), "--out", tmp_path / f"joined_{size}")
    assert seen[20] < seen[40]
    runs = [tmp_path / f"{kind}{size}" for kind in ("", "joined_") for size in (20, 40)]
    succeed_here("train/report.py", *runs, "--out", tmp_path / "report")
    text = (tmp_path / "report" / "table.md").read_text()
    assert "| training stimuli | 20 | 40 | per doubling |" in text
    assert "\n| test_convnext, random weights, frozen, ridge | " in text
    assert "\n| joined | " in text
    succeed_here("train/finetune.py", "--data", data, "--out", tmp_path / "run", *SMALL, "--subset", 40)
    succeed_here("train/evaluate.py", tmp_path / "run")
    succeed_here("train/evaluate.py", tmp_path / "run", "--split", "left_out")
    assert metrics(tmp_path / "run")["training_stimuli"] == 40
    assert set(predictions(tmp_path / "run", "left_out")["stimulus_id"].tolist()) < seen[40]
    done = run_here("train/finetune.py", "--data", data, "--out", tmp_path / "more", *SMALL, "--subset", 61)
    assert_refused(done, "subset", "60")


def test_a_probe_of_shuffled_responses_is_at_chance(data, tmp_path):
    succeed_here(
        "train/probe.py",
        "--data",
        data,
        "--out",
        tmp_path / "run",
        *PROBE,
        "--layers",
        "stages.1",
        "--shuffle-responses",
    )
    scores = metrics(tmp_path / "run")
    assert scores["control"] == "shuffled responses"
    assert scores["regression"]["r2"]["mean"] < 0.05
    np.testing.assert_array_equal(predictions(tmp_path / "run")["target"], ShardFolder(data).split("val").rates())


def pipeline(data, folder):
    """A probe with windows, a run that uses everything a recording offers, and their ensemble."""
    succeed_here(
        "train/probe.py",
        "--data",
        data,
        "--out",
        folder / "probe",
        *PROBE,
        "--layers",
        "stages.1",
        "--field",
        "gaussian",
    )
    words = ["--readout.kind", "gaussian", "--readout.start", "ridge", "--backbone.cut", "stages.1", "--ema", "0.9"]
    words += ["--loss.site-weights", "reliability", "--distill.teacher", folder / "probe", "--augment.shift", "0.05"]
    succeed_here("train/finetune.py", "--data", data, "--out", folder / "run", *SMALL, *words)
    runs = [folder / "probe", folder / "run"]
    succeed_here("train/evaluate.py", *runs, "--combine", "mean", "--out", folder / "ensemble")
    return folder


def test_held_out_responses_decide_nothing(data, tmp_path):
    """The same pipeline on shards whose held-out responses and trials are noise makes the identical predictor."""
    source = tmp_path / "src"
    shutil.copytree(data.parent / "src", source)
    trials, splits = np.load(source / "trials.npy"), np.array(("train", "train", "train", "val", "test") * 20)
    held_out = splits != "train"
    trials[held_out] = np.random.default_rng(5).normal(40, 9, size=trials[held_out].shape)
    np.save(source / "trials.npy", trials)
    noise = pack(Folder(source=source).open(), tmp_path / "noise", stimuli_per_shard=50, workers=1).folder
    true, other = pipeline(data, tmp_path / "on_true"), pipeline(noise, tmp_path / "on_noise")
    for part in ("probe", "run", "ensemble"):
        a, b = predictions(true / part), predictions(other / part)
        assert not np.array_equal(a["target"], b["target"])
        np.testing.assert_array_equal(a["prediction"], b["prediction"])
    weights = [
        (folder / "run" / "checkpoints" / "best" / "network.safetensors").read_bytes() for folder in (true, other)
    ]
    assert weights[0] == weights[1]


def test_an_ensemble_is_made_on_two_processes(members, tmp_path, joined):
    succeed(2, "train/evaluate.py", *members, "--combine", "stack", "--out", tmp_path / "two")
    np.testing.assert_allclose(
        predictions(tmp_path / "two")["prediction"], predictions(joined["stack"])["prediction"], rtol=1e-3, atol=1e-3
    )
