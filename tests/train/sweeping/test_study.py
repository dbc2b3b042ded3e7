"""The study runs each of its rows once, goes on where it was stopped, and names what is not as published."""

import errno
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import ROOT, assert_refused, run_here, slow
from make_runs import make_probe, make_run

from data_prep.common.errors import BadInput, RunFailed
from data_prep.shards.manifest import load_manifest
from train import finetune, probe
from train.run.recipe import ProbeRecipe, load_recipe
from train.sweeping.plan import load_plan
from train.sweeping.queue_worker import StopRequest, take_trials
from train.sweeping.study.rows import NETWORKS, ROWS, find_rows
from train.sweeping.study.worker import StudyOptions, StudyWorker, open_study
from train.sweeping.trial import Launcher, Outcome

TARGET = np.random.default_rng(0).normal(5, 1, (20, 3)).astype(np.float32)


class MadeUpCommands(Launcher):
    """A launcher whose commands do nothing but leave scored runs.

    Attributes:
        ran: the words of each command, from its script on.
        ends: how a command whose words contain a key ends; the last of several stays.
    """

    def __init__(self):
        super().__init__(1)
        self.ran: list[list[str]] = []
        self.ends: dict[str, list[Outcome | BaseException]] = {}

    def run(self, command, heartbeat, lock, log, check):
        _, script, *words = command
        self.ran.append([Path(script).name, *words])
        for word, ends in self.ends.items():
            if any(word in given for given in words):
                end = ends.pop(0) if len(ends) > 1 else ends[0]
                if isinstance(end, BaseException):
                    raise end
                if end.kind != "done":
                    return end
        if script.endswith("probe.py"):
            make_probe(Path(words[words.index("--out") + 1]), TARGET, {"layer2": TARGET, "layer3": TARGET}, "layer3")
        if script.endswith("evaluate.py"):
            shutil.rmtree(words[0], ignore_errors=True)
            make_run(Path(words[0]), TARGET, TARGET)
        return Outcome("done")

    def scripts(self, name: str) -> list[str]:
        """The commands that named a run."""
        return [script for script, *words in self.ran if any(Path(word).name == name for word in words)]


@pytest.fixture
def start(recording, tmp_path, monkeypatch):
    """A function that starts a worker whose commands do nothing; `missing` are networks whose weights cannot be had."""

    def begin(*names: str, missing: tuple[str, ...] = (), **options) -> StudyWorker:
        monkeypatch.setattr(
            "train.sweeping.study.worker.missing_weights", lambda name: f"no {name}" if name in missing else None
        )
        settings = {"small": True, "selects_on": "inner", "processes": 1} | options
        worker = open_study(
            StudyOptions(str(recording), tmp_path / "study", find_rows(names), **settings), StopRequest()
        )
        return replace(worker, launcher=MadeUpCommands())

    return begin


def states(worker: StudyWorker) -> dict[str, str]:
    return {name: state.state for name, state in worker.folder.read_states().items()}


# ------------------------------------------------------------------------------------------------------------- rows


def test_the_rows_are_the_systems_of_the_study():
    assert len(ROWS) == 24
    assert {f"{network}_{part}" for network in NETWORKS for part in ("head", "whole")} < set(ROWS)
    recipes = {step.recipe for row in ROWS.values() for step in row.steps}
    assert {"probes/pixels_linear.yaml", "cnn2.yaml", "hybrid_resnet50.yaml", "sweeps/lr_x_optimizer.yaml"} < recipes
    assert ROWS["resnet50_random"].networks == []
    assert ROWS["pixels_ridge"].networks == []
    assert ROWS["resnet50_retrained"].networks == ["resnet50"]
    assert ROWS["efficientnet_b6_head"].networks == ["tf_efficientnet_b6"]


def test_an_unknown_row_is_refused_with_the_nearest_name():
    with pytest.raises(
        BadInput, match=r"--rows: 'resnet152_hole' is not a row of the study; did you mean resnet152_whole"
    ):
        find_rows(["resnet152_hole"])


@pytest.mark.parametrize(("small", "selects_on"), [(True, "inner"), (False, "val")])
def test_every_row_is_run_by_commands_that_understand_their_words(start, small, selects_on):
    worker = start(small=small, selects_on=selects_on, missing=("vgg16",) if small else ())
    worker.work(lambda: None)
    assert states(worker) == dict.fromkeys(ROWS, "done")
    recipes, searches = {}, []
    for script, *words in worker.launcher.ran:
        if script == "finetune.py":
            options, recipes[options.out.name] = finetune.parse_command_line(words)
        elif script == "probe.py":
            options, recipes[options.out.name] = probe.parse_command_line(words)
        elif script == "sweep.py":
            searches.append(load_plan(Path(words[0])))
            assert words[-2:] == ["--processes", "1"]
    assert len(recipes) == len(ROWS)  # with the classifier, without the search
    trained = {name: recipe for name, recipe in recipes.items() if not isinstance(recipe, ProbeRecipe)}
    assert {recipe.early_stopping.split for recipe in trained.values()} == {selects_on}
    heads = {name for name, recipe in trained.items() if recipe.backbone.trainable == "head"}
    endings = ("_SMALL", "_SMALL_RANDOM_WEIGHTS") if small else ("", "")
    assert heads == {f"{network}_head{endings[network == 'vgg16']}" for network in NETWORKS}
    assert {recipe.images.size for recipe in recipes.values()} == ({64} if small else {None})
    plain, random = endings
    assert trained[f"cnn3{plain}"].epochs == (1 if small else 96)
    assert trained[f"vgg16_whole{random}"].backbone.weights == ("random" if small else "pretrained")
    assert trained[f"resnet18_whole{plain}"].backbone.weights == "pretrained"
    retrained = recipes[f"resnet50_retrained{plain}"]
    assert Path(retrained.backbone.weights) == worker.folder.run(f"resnet50_classifier{plain}")
    (search,) = searches
    assert len(search.points) == (4 if small else 20)
    assert search.base.backbone.name == "densenet169"
    assert search.base.epochs == (1 if small else 96)


def test_a_small_study_uses_no_more_stimuli_than_there_are(start, recording):
    assert load_manifest(recording).splits["train"].stimuli < 300
    worker = start("pixels_ridge", "cnn2")
    worker.work(lambda: None)
    words = {script: words for script, *words in worker.launcher.ran}
    assert "--subset" not in words["probe.py"]
    assert words["finetune.py"][words["finetune.py"].index("--subset") + 1] == "96"


def test_rows_that_learn_objects_are_left_out_where_there_are_none(start, recording, monkeypatch):
    manifest = load_manifest(recording).model_copy(update={"classes": None})
    files = type("Files", (), {"manifest": lambda self: manifest})
    monkeypatch.setattr("train.sweeping.study.worker.open_files", lambda data: files())
    worker = start("resnet50_hybrid", "resnet50_retrained", "cnn2")
    assert "resnet50_hybrid is left out: it learns to name objects" in worker.describe()
    assert "column `object`" in worker.describe()
    worker.work(lambda: None)
    expected = {"cnn2": "done", "resnet50_retrained": "left out", "resnet50_hybrid": "left out"}
    assert states(worker) == expected
    start("cnn2").work(lambda: None)
    assert states(worker) == expected


# --------------------------------------------------------------------------------------------------------- the queue


def test_a_study_goes_on_where_it_was_stopped(start):
    """The row that was stopped goes on with its second command; those that are done are not touched."""
    first = start("pixels_ridge", "cnn2", "cnn3")
    first.launcher.ends = {"--split": [KeyboardInterrupt()]}
    with pytest.raises(KeyboardInterrupt):
        first.work(lambda: None)
    assert states(first) == {"pixels_ridge": "done", "cnn2": "waiting", "cnn3": "waiting"}
    assert first.launcher.scripts("cnn2_SMALL") == ["finetune.py", "evaluate.py"]
    begun = first.folder.run("cnn2_SMALL")
    begun.mkdir()
    (begun / "recipe.yaml").write_text("epochs: 1\n")
    second = start("pixels_ridge", "cnn2", "cnn3")
    second.work(lambda: None)
    assert second.launcher.scripts("pixels_ridge_SMALL") == []
    resumed = [words for script, *words in second.launcher.ran if script == "finetune.py" and "--resume" in words]
    assert [Path(words[words.index("--out") + 1]).name for words in resumed] == ["cnn2_SMALL"]
    assert states(second) == dict.fromkeys(("pixels_ridge", "cnn2", "cnn3"), "done")


def test_a_worker_of_a_batch_job_runs_one_row(start):
    published = []
    one, two = start("cnn2", "cnn3"), start("cnn2", "cnn3")
    one.work(lambda: published.append(1), at_most=1)
    assert states(one) == {"cnn2": "done", "cnn3": "waiting"}
    two.work(lambda: published.append(2), at_most=1)
    assert states(two) == {"cnn2": "done", "cnn3": "done"}
    two.work(lambda: published.append(3), at_most=1)
    assert published == [1, 2]


def test_a_worker_of_a_batch_job_leaves_no_row_to_be_tried_again_by_nobody(start):
    worker = start("cnn2", "cnn3")
    worker.launcher.ends = {"cnn2_SMALL": [Outcome("failed", "a node died"), Outcome("done")]}
    other = start("cnn2", "cnn3").queue.claim(["cnn3"])
    assert other is not None
    assert worker.work(lambda: None, at_most=1) == []
    assert states(worker) == {"cnn2": "done", "cnn3": "running"}


def test_a_worker_runs_the_rows_that_it_was_asked_for(start):
    """Although others wait before them in the same folder, which keep what they have gone through."""
    queue = start("pixels_ridge", "cnn2", "cnn3").queue
    queue.release(queue.claim(["cnn2"]), failed=True)
    one = start("cnn3")
    one.work(lambda: None)
    assert states(one) == {"pixels_ridge": "waiting", "cnn2": "waiting", "cnn3": "done"}
    assert queue.claim(["cnn3"]) is None
    claims = [queue.claim([name]) for name in ("pixels_ridge", "cnn2")]
    assert [(claim.run, claim.failures) for claim in claims] == [("pixels_ridge", 0), ("cnn2", 1)]


def test_a_full_disk_leaves_a_queue_that_can_be_gone_on_with(start, monkeypatch):
    worker = start("cnn2")
    before = worker.folder.journal.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(RunFailed, match=r"cannot be written \(No space left on device\); make room"):
            take_trials(worker.queue, worker.stop, worker.run_row)
    assert worker.folder.journal.read_bytes() == before
    start("cnn2").work(lambda: None)
    assert states(worker) == {"cnn2": "done"}


def test_only_the_rows_that_were_asked_for_make_the_command_fail(start):
    worker = start("cnn2", "cnn3")
    worker.launcher.ends = {"cnn2_SMALL": [Outcome("bad input", "no such thing")]}
    assert worker.work(lambda: None) == ["cnn2"]
    assert start("cnn3").work(lambda: None) == []
    assert start("cnn2", "cnn3").work(lambda: None) == ["cnn2"]
    assert start("cnn2", "cnn3").work(lambda: None, at_most=1) == []  # it ran none


def test_more_rows_can_be_asked_for_later(start):
    start("cnn2").work(lambda: None)
    worker = start("cnn2", "cnn3")
    worker.work(lambda: None)
    assert worker.launcher.scripts("cnn2_SMALL") == []
    assert worker.launcher.scripts("cnn3_SMALL") == ["finetune.py", "evaluate.py"]


def test_a_row_that_fails_stops_no_other_and_is_run_again_when_asked_for(start):
    worker = start("cnn2", "cnn3", "pixels_ridge")
    worker.launcher.ends = {
        "cnn2_SMALL": [Outcome("failed", "out of memory")],
        "cnn3_SMALL": [Outcome("failed", "a node died"), Outcome("done")],
        "pixels_ridge_SMALL": [Outcome("bad input", "no such thing")],
    }
    worker.work(lambda: None)
    assert states(worker) == {"pixels_ridge": "failed", "cnn2": "failed", "cnn3": "done"}
    assert worker.folder.read_states()["cnn2"].reason == "out of memory"
    assert worker.launcher.scripts("cnn2_SMALL") == ["finetune.py", "finetune.py"]
    assert worker.launcher.scripts("pixels_ridge_SMALL") == ["probe.py"]  # another try would not help
    again = start("cnn2", "cnn3", "pixels_ridge")
    again.work(lambda: None)
    assert again.launcher.ran == []
    retrying = start("cnn2", "cnn3", "pixels_ridge", retries_failed=True)
    retrying.work(lambda: None)
    assert states(retrying) == dict.fromkeys(("pixels_ridge", "cnn2", "cnn3"), "done")


def test_a_search_that_is_run_again_retries_its_trials(start):
    worker = start("lr_x_optimizer")
    worker.launcher.ends = {"--processes": [Outcome("failed", "every trial failed")]}
    worker.work(lambda: None)
    assert not any("--retry-failed" in words for words in worker.launcher.ran)
    retrying = start("lr_x_optimizer", retries_failed=True)
    retrying.work(lambda: None)
    assert ["--retry-failed" in words for words in retrying.launcher.ran] == [True]
    assert states(retrying) == {"lr_x_optimizer": "done"}


def test_damaged_states_can_be_written_again(start):
    worker = start("cnn2", small=False)
    worker.folder.states.write_text("{")
    with pytest.raises(BadInput, match=r"is damaged .* remove it and run the study's command again"):
        start("cnn2", small=False)
    worker.folder.states.unlink()
    start("cnn2", small=False).work(lambda: None)
    assert states(worker) == {"cnn2": "done"}


def test_a_folder_holds_one_study(start, tmp_path, packed):
    start("cnn2")
    for options, expected in (
        ({"small": False}, "was begun with --small, not without it"),
        ({"selects_on": "val"}, "was begun with --select-on inner, not val"),
    ):
        with pytest.raises(BadInput, match=expected):
            start("cnn2", **options)
    with pytest.raises(BadInput, match="holds the study on other data"):
        open_study(StudyOptions(str(packed), tmp_path / "study", find_rows(["cnn2"]), True, "inner", 1), StopRequest())


def test_weights_that_are_missing_are_random_in_a_small_study_for_good(start):
    worker = start("resnet50_frozen", missing=("resnet50", "vgg16"))
    assert worker.facts.random_weights == ["resnet50", "vgg16"]
    assert "RANDOM weights instead of pretrained ones, which cannot be had: resnet50, vgg16" in worker.describe()
    assert start("resnet50_frozen").facts.random_weights == ["resnet50", "vgg16"]


def test_weights_that_are_missing_stop_the_whole_study_before_it_begins(start, tmp_path):
    with pytest.raises(BadInput, match=r"cannot be had \(resnet18\); --small begins .* Of the first: no resnet18"):
        start("cnn2", "resnet18_head", small=False, missing=("resnet18", "vgg16"))
    assert not (tmp_path / "study").exists()
    start("cnn2", small=False, missing=("resnet18",))


# ------------------------------------------------------------------------------------------------------ the command


@slow
@pytest.mark.usefixtures("started")
def test_a_small_study_trains_scores_and_compares(recording, tmp_path):
    """Two rows of it."""
    out = tmp_path / "study"
    words = ["--data", recording, "--out", out, "--small", "--rows", "pixels_ridge", "cnn2"]
    done = run_here("train/study.py", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "these scores say that everything runs, and nothing of the study" in done.stdout
    table = (out / "table.md").read_text()
    assert "### SMALL, not the study: Table I" in table
    assert "0.440" not in table  # published for ResNet-152
    for row in ("pixels_ridge", "cnn2"):
        metrics = json.loads((out / "rows" / f"{row}_SMALL" / "eval/val/metrics.json").read_text())
        assert f"{metrics['regression']['r2']['mean']:.3f}" in table
    assert load_recipe(out / "rows/pixels_ridge_SMALL/recipe.yaml", ProbeRecipe).components == 64
    page = (out / "report" / "report.html").read_text()
    assert "SMALL, not the study: Table I" in page
    assert "The rows of study were run at reduced size (--small)" in page
    assert yaml.safe_load((out / "rows.json").read_text()) == {"pixels_ridge": ["done", ""], "cnn2": ["done", ""]}
    again = run_here("train/study.py", *words)
    assert again.returncode == 0
    assert "started" not in again.stdout


def test_a_recording_without_scored_stimuli_is_refused(recording, tmp_path, monkeypatch):
    manifest = load_manifest(recording)
    del manifest.splits["val"]
    files = type("Files", (), {"manifest": lambda self: manifest})
    monkeypatch.setattr("train.sweeping.study.worker.open_files", lambda data: files())
    done = run_here("train/study.py", "--data", recording, "--out", tmp_path / "study")
    assert_refused(done, "has no responses in its val split")
    assert not (tmp_path / "study").exists()


@slow
def test_the_script_runs_two_processes_per_row(recording, tmp_path):
    words = ["--data", recording, "--out", tmp_path / "study", "--small", "--rows", "cnn2", "-n", "2"]
    done = subprocess.run(["bash", "launch/study.sh", *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 CPU processes each" in done.stdout
    assert "2 processes" in (tmp_path / "study/rows/cnn2.log").read_text()
