"""A run that is scored on another recording, or on responses of another scale, says so; and how many stimuli it had."""

import csv

import numpy as np
import pytest
from helpers import succeed_here
from launching import SMALL, metrics
from make_sources import make_folder, write_csv

from data_prep.shards.image_identity import ImageIdentities
from data_prep.shards.packing import pack
from data_prep.sources.folder import Folder
from train.data.seen import FITTED, SELECTED, SeenImages, SeenRecord
from train.evaluation.training_facts import ResponseScale, other_scale, training_stimuli

N = 60


def pack_folder(path, scale: float = 1.0, name: str = "mine", train: int = 36):
    """The same 60 images and sites; `train` of the stimuli to train on, 12 for val."""
    source = path / "source"
    written = make_folder(source, n=N, sites=4, noise=0.5)
    splits = ["val"] * 12 + ["train"] * train + ["test"] * (N - train - 12)
    images = [f"images/{stimulus}.png" for stimulus in written.ids]
    write_csv(source / "stimuli.csv", {"stimulus_id": written.ids, "image": images, "split": splits})
    np.save(source / "rates.npy", written.rates * np.float32(scale))
    return pack(Folder(source=source, name=name).open(), path / "shards", stimuli_per_shard=20, workers=1).folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained")
    succeed_here("train/finetune.py", "--data", pack_folder(path), "--out", path / "run", *SMALL)
    return path / "run"


def test_another_scale_and_another_recording_are_told_and_marked(run, tmp_path):
    """With responses ten times as large, in another unit say, R2 was -102 without a word."""
    done = succeed_here("train/evaluate.py", run)
    assert "warning" not in done.stderr
    assert not {"other_scale", "trained_on"} & metrics(run).keys()

    scaled = pack_folder(tmp_path / "scaled", scale=10.0)
    done = succeed_here("train/evaluate.py", run, "--data", scaled)
    assert "are on another scale than those that" in done.stderr
    assert metrics(run)["other_scale"] is True
    assert "trained_on" not in metrics(run)
    done = succeed_here("train/report.py", run, "--out", tmp_path / "report")
    assert "run (OTHER SCALE)" in done.stdout
    succeed_here("train/evaluate.py", run, "--data", scaled, "--out", tmp_path / "ensemble")
    assert metrics(tmp_path / "ensemble")["other_scale"] is True

    other = pack_folder(tmp_path / "other", name="other")
    done = succeed_here("train/evaluate.py", run, "--data", other)
    assert "was trained on the recording mine and is scored on other, whose sites have the same names" in done.stderr
    assert "another scale" not in done.stderr
    assert metrics(run)["trained_on"] == ["mine"]
    succeed_here("train/report.py", run, "--out", tmp_path / "other_report")
    with (tmp_path / "other_report" / "table.csv").open(newline="") as file:
        (line,) = csv.DictReader(file)
    assert line["what"].endswith("trained on mine")


def test_training_stimuli_are_those_of_the_run_whatever_it_is_scored_on(run, tmp_path):
    succeed_here("train/evaluate.py", run, "--data", pack_folder(tmp_path, train=20))
    assert metrics(run)["training_stimuli"] == 36


def part(role: str, recording: str, count: int, inherited_from: str = "") -> SeenImages:
    images = ImageIdentities(np.zeros((count, 16), np.uint8), np.zeros((count, 16), np.uint8))
    return SeenImages(role, recording, inherited_from, images, [f"s{number}" for number in range(count)])


def test_a_run_s_own_stimuli_are_counted_by_recording_without_what_it_inherited():
    record = SeenRecord(
        (
            part(FITTED, "a", 50),
            part(FITTED, "b", 7),
            part(SELECTED, "a", 5),
            part(SELECTED, "b", 1),
            part(FITTED, "a", 900, "weights runs/other"),
            part(SELECTED, "a", 90, "weights runs/other"),
        )
    )
    assert training_stimuli(record, "a", True) == 55
    assert training_stimuli(record, "b", True) == 8
    assert training_stimuli(record, None, True) == 63
    assert training_stimuli(record, None, False) == 57


def scale(mean, std) -> ResponseScale:
    return ResponseScale(np.array(mean, float), np.array(std, float))


TRAINED = scale([5.0, 6.0, 7.0], [1.0, 2.0, 1.0])


@pytest.mark.parametrize(
    ("scored", "differs"),
    [
        (TRAINED, False),
        (scale([5.5, 7.0, 7.9], [1.5, 3.0, 0.6]), False),  # drift from day to day
        (scale([50.0, 60.0, 70.0], [10.0, 20.0, 10.0]), True),
        (scale([0.0, 0.0, 0.0], [1.0, 1.0, 1.0]), True),  # z-scores
        (scale([5.0, 6.0, 7.0], [0.4, 0.9, 0.3]), True),
        (scale([5.0, 6.0, 70.0], [1.0, 2.0, 10.0]), False),  # a single site
        (scale([np.nan, 6.0, 7.0], [np.nan, 2.0, 0.0]), False),
        (scale([np.nan, 9.0, 7.0], [np.nan, 0.0, 0.0]), False),  # nothing to compare
    ],
)
def test_the_scale_differs_by_the_medians_over_sites(scored, differs):
    assert bool(other_scale(TRAINED, scored)) == differs
