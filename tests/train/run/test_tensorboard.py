"""TensorBoard's own server shows the charts of a real training, with consistent steps."""

import errno
import json
import shutil

import numpy as np
import pytest
import torch
from blank_figures import drawn_figures
from boards import tensorboard_on
from helpers import succeed_here
from launching import SMALL, metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter

from train.evaluation.figures.prediction_figures import mean_errors
from train.finetuning import charts

HYBRID = ["--task.kind", "hybrid", "--epochs", "2"]


@pytest.fixture(scope="module")
def hybrid(recording, tmp_path_factory):
    """A hybrid that draws its images after every epoch, evaluated on val."""
    out = tmp_path_factory.mktemp("boards") / "hybrid"
    with pytest.MonkeyPatch.context() as patch, drawn_figures():
        patch.setattr(charts, "SHARE", 1e9)
        succeed_here("train/finetune.py", "--data", recording, "--out", out, *SMALL, *HYBRID)
        succeed_here("train/evaluate.py", out)
    return out


@pytest.fixture(scope="module")
def board(hybrid):
    with tensorboard_on(hybrid.parent) as ask:
        yield ask


RUN = "hybrid"


def points(board, tag):
    return [(step, value) for _, step, value in board("plugin/scalars/scalars", run=RUN, tag=tag)]


def epochs(run):
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def test_scores_are_charted_over_optimizer_steps(hybrid, board):
    lines = epochs(hybrid)
    for key in ("r2", "explained_variance", "mse", "pearson_r", "top1"):
        assert points(board, f"inner/{key}") == [(line["step"], pytest.approx(line["inner"][key])) for line in lines]
        assert [step for step, _ in points(board, f"train/{key}")] == [line["step"] for line in lines]
    best = max(lines, key=lambda line: line["inner"]["r2"])
    assert points(board, "val/r2") == [(best["step"], pytest.approx(metrics(hybrid)["regression"]["r2"]["mean"]))]
    for tag in ("train/loss", "train/loss_mse", "train/loss_cross_entropy", "rate/backbone", "speed/images_per_second"):
        steps = [step for step, _ in points(board, tag)]
        assert steps == list(range(10, lines[-1]["step"] + 1, 10)), tag


def test_the_first_page_of_custom_scalars_holds_the_main_charts(board):
    pages = board("plugin/custom_scalars/layout")["category"]
    assert pages[0]["title"] == "first look"
    tags = {tag for page in pages for chart in page["chart"] for tag in chart["multiline"]["tag"]}
    known = board("plugin/scalars/tags")[RUN]
    assert {"train/loss", "train/r2", "inner/r2", "val/r2", "inner/top1", "rate/readout"} <= tags
    shown = {tag for tag in tags if tag.startswith(("train", "inner", "rate", "speed"))}
    assert shown - {"speed/communication_seconds"} <= known.keys()  # which one process has none of
    answer = board("plugin/custom_scalars/scalars", run=RUN, tag="inner/r2")
    assert answer["regex_valid"]
    assert len(answer["tag_to_events"]["inner/r2"]) == 2


def test_sites_stimuli_and_objects_are_drawn(hybrid, board):
    steps = [line["step"] for line in epochs(hybrid)]
    images = board("plugin/images/tags")[RUN]
    for split, at in (("inner", steps), ("val", [max(epochs(hybrid), key=lambda line: line["inner"]["r2"])["step"]])):
        for chart in (
            "best, median and worst site",
            "most over- and underestimated",
            "confusion matrix",
        ):
            assert f"{split}/{chart}" in images
            answer = board("plugin/images/images", run=RUN, tag=f"{split}/{chart}", sample=0)
            assert [image["step"] for image in answer] == at
        answer = board("plugin/histograms/histograms", run=RUN, tag=f"{split}/r2_of_sites")
        assert [step for _, step, _ in answer] == at
        assert sum(count for _, _, count in answer[-1][2]) == 12
    png = board("plugin/images/individualImage?" + found_query(board))
    assert png.startswith(b"\x89PNG")


def found_query(board):
    image = board("plugin/images/images", run=RUN, tag="val/best, median and worst site", sample=0)[0]
    return image["query"]


def test_the_predictions_say_which_object_was_named(hybrid):
    with np.load(hybrid / "eval/val/predictions.npz", allow_pickle=False) as arrays:
        right = arrays["predicted_class"] == arrays["class"]
        names = arrays["class_id"][arrays["class"]]
    scores = metrics(hybrid)["classification"]
    assert right.mean() == pytest.approx(scores["top1"])
    assert {str(name): right[names == name].mean() for name in set(names)} == pytest.approx(scores["per_class"])


def test_train_scores_are_those_of_the_predictions_that_training_made(recording, tmp_path, monkeypatch):
    """All of an epoch's predictions are kept here, so their scores can be computed again."""
    recorded = []
    keep = charts.TrainingCharts.keep_predictions

    def keep_here_too(self, outputs, batch):
        recorded.append((self._objective.responses, outputs, batch))
        keep(self, outputs, batch)

    monkeypatch.setattr(charts.TrainingCharts, "keep_predictions", keep_here_too)
    out = tmp_path / "run"
    succeed_here("train/finetune.py", "--data", recording, "--out", out, *SMALL, "--epochs", "1")
    responses = recorded[0][0]
    prediction = torch.cat([responses.to_rates(outputs["rates"].detach()) for _, outputs, _ in recorded]).double()
    target = torch.cat([batch.rates for *_, batch in recorded]).double()
    expected = 1 - ((target - prediction) ** 2).sum(0) / ((target - target.mean(0)) ** 2).sum(0)
    with tensorboard_on(tmp_path) as board:
        ((_, r2),) = [point[1:] for point in board("plugin/scalars/scalars", run="run", tag="train/r2")]
    assert r2 == pytest.approx(float(expected.mean()), abs=1e-5)


@pytest.mark.usefixtures("figures")
def test_a_probe_draws_its_layers(recording, tmp_path):
    words = ["--layers", "stages.1", "stages.2", "--images.size", "32", "--loader.workers", "0"]
    network = ["--backbone.name", "test_convnext", "--backbone.weights", "random"]
    succeed_here("train/probe.py", "--data", recording, "--out", tmp_path / "probe", *network, *words)
    with tensorboard_on(tmp_path) as board:
        assert list(board("plugin/images/tags")["probe"]) == ["explained variance by layer"]


def test_a_short_training_draws_nothing_but_an_evaluation_does(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run, symlinks=True)
    succeed_here("train/evaluate.py", run)
    with tensorboard_on(tmp_path) as board:
        tags = board("plugin/images/tags")["run"]
    assert {tag.partition("/")[0] for tag in tags} == {"val"}


def test_a_folder_that_cannot_be_written_costs_an_evaluation_its_charts_alone(trained, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(trained, run, symlinks=True)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    done = succeed_here("train/evaluate.py", run)
    assert done.stderr.count("continuing without charts") == 1
    assert metrics(run)["stimuli"]


def test_charts_of_a_run_of_an_earlier_version_stay_in_their_folder(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run, symlinks=True, ignore=shutil.ignore_patterns("events.*"))
    (run / "tensorboard").mkdir()
    succeed_here("train/evaluate.py", run)
    assert list((run / "tensorboard").glob("events.*"))
    assert not list(run.glob("events.*"))


def test_runs_can_be_compared_by_their_settings(hybrid):
    """The page HParams has a line for the run: its settings, and the scores that runs are compared by."""
    events = EventAccumulator(str(hybrid)).Reload()
    tags = events.summary_metadata
    content = {tag: HParamsPluginData.FromString(tags[tag].plugin_data.content) for tag in tags if "_hparams_" in tag}
    settings = content["_hparams_/session_start_info"].session_start_info.hparams
    assert settings["task.kind"].string_value == "hybrid"
    assert settings["optimizer.lr"].number_value == pytest.approx(3e-3)
    assert settings["recording"].string_value
    scores = content["_hparams_/experiment"].experiment.metric_infos
    assert {score.name.tag for score in scores} == {"inner/r2", "val/r2", "test/r2"}
    assert {"inner/r2", "val/r2"} <= set(events.Tags()["scalars"])


def test_an_error_is_in_standard_deviations_of_each_site():
    target = np.array([[0.0, 10], [2, 30], [4, np.nan]], np.float32)
    prediction = target + np.array([[1, 10], [0, -10], [-2, 5]], np.float32)
    scale = np.sqrt(8 / 3)
    np.testing.assert_allclose(mean_errors(prediction, target), [(1 / scale + 1) / 2, -0.5, -2 / scale], rtol=1e-6)
