"""Damaged files of a run are refused by a report in one sentence, without waiting."""

import json
import os

import numpy as np
import pytest

from data_prep.common.errors import BadInput
from train.evaluation.predictions_file import Predictions
from train.reporting.run_files import read_environment, read_history, read_metrics

SCORE = {"mean": 0.5, "median": 0.5, "ci95": [0.4, 0.6], "per_site": [0.5]}
NAMES = ("r2", "explained_variance", "mse", "pearson_r")
METRICS = {"split": "val", "stimuli": 10, "recording": "a", "regression": dict.fromkeys(NAMES, SCORE)}
DIGITS = "9" * 400


def test_whole_files_are_read(tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS))
    assert read_metrics(tmp_path / "metrics.json").stimuli == 10
    (tmp_path / "history.jsonl").write_text('{"epoch": 1, "val": {"r2": null}}\n{"epoch": 2, "val"')
    assert read_history(tmp_path / "history.jsonl") == [{"epoch": 1, "val": {"r2": None}}]
    assert read_history(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"stimuli": 10', f'"stimuli": {DIGITS}', "400 digits"),
        ('"stimuli": 10', '"stimuli": 0', "stimuli: must be greater than 0"),
        ('"mean": 0.5', '"mean": 1.7e308', r"regression\.r2\.mean: must be at most"),
        ('"per_site": [0.5]', '"per_site": [-1.7e308]', r"regression\.r2\.per_site\.0: must be at least"),
        ('"per_site": [0.5]', '"per_site": 3', r"regression\.r2\.per_site: must be a list"),
        ('"ci95": [0.4, 0.6]', '"ci95": [0.4]', r"regression\.r2\.ci95\.1: is missing"),
    ],
)
def test_bad_metrics_are_refused(tmp_path, old, new, words):
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps(METRICS).replace(old, new, 1))
    with pytest.raises(BadInput, match=rf"metrics\.json.*{words}") as caught:
        read_metrics(path)
    assert "Input" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f'{{"epoch": {DIGITS}}}', "line 2: .*400 digits"),
        ('{"epoch": 2, "val": {"r2": 1.7e308}}', "1.7e"),
        ("{", "line 2"),
    ],
)
def test_a_bad_history_is_refused(tmp_path, line, words):
    path = tmp_path / "history.jsonl"
    path.write_text(f'{{"epoch": 1}}\n{line}\n')
    with pytest.raises(BadInput, match=rf"history\.jsonl is damaged .*{words}"):
        read_history(path)


@pytest.mark.parametrize("read", [read_history, read_metrics])
def test_a_pipe_is_refused_at_once(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadInput, match="not a regular file"):
        read(tmp_path / "pipe")


def test_bad_environments_are_refused(tmp_path):
    path = tmp_path / "env.json"
    for text, words in ((f'{{"world_size": {DIGITS}}}', "400 digits"), ('{"world_size": 0}', "must be greater than 0")):
        path.write_text(text)
        with pytest.raises(BadInput, match=words):
            read_environment(path)


def test_predictions_of_no_stimuli_predict_nothing():
    none = Predictions([], ["a", "b"], np.empty((0, 2), np.float32))
    assert np.isnan(none.rows(["x", "y"])).all()
    one = Predictions(["y"], ["a", "b"], np.array([[1, 2]], np.float32))
    rows = one.rows(["x", "y"])
    assert rows.dtype == np.float32
    assert np.array_equal(rows, [[np.nan, np.nan], [1, 2]], equal_nan=True)
