"""A search runs each point once, whichever workers run or are killed, and reports the results."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml
from forked_python import forked_python
from helpers import ROOT, assert_refused, finish, run_here, slow, start_group, started_as, wait_for
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_prep.common import locks
from data_prep.common.errors import BadInput
from data_prep.common.process_identity import own_identity
from data_prep.shards.manifest import load_manifest
from train.run.folder import RunFolder
from train.run.progress import Progress
from train.run.recipe import Recipe, load_recipe
from train.sweeping import publishing
from train.sweeping.plan import load_plan, setting_of
from train.sweeping.queue import TrialStatus, open_study
from train.sweeping.search_figures import SettingAxis, best_points, draw_search
from train.sweeping.standings import rank
from train.sweeping.supervised_process import Heartbeat, hold_lock, run_supervised, seconds_since
from train.sweeping.sweep_folder import SweepFolder
from train.sweeping.trial import Launcher, Outcome, outcome
from train.sweeping.worker import Worker

SMALL = {
    "backbone": {"name": "test_convnext", "weights": "random"},
    "precision": "fp32",
    "epochs": 1,
    "batch": {"global_size": 32},
    "images": {"size": 32},
    "optimizer": {"lr": 3e-3},
    "loader": {"workers": 0},
}
GRID = {"grid": {"optimizer.lr": [1e-3, "3e-3"], "optimizer.name": ["nadam", "sgd"]}}
SPACE = {
    "space": {"optimizer.lr": {"low": 1e-5, "high": 1e-2, "log": True}, "epochs": {"low": 1, "high": 4}},
    "trials": 6,
}


def written(folder: Path, content: dict, recipe: dict = SMALL) -> Path:
    """A sweep file and its recipe, in a folder."""
    (folder / "small.yaml").write_text(yaml.safe_dump(recipe))
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"recipe": "small.yaml", **content}, sort_keys=False))
    return path


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "table.csv").open() as file:
        return list(csv.DictReader(file))


def processes_of(folder: Path) -> list[psutil.Process]:
    """All live processes of a run."""
    processes = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if any(str(folder) in word for word in words) and process.info["status"] != psutil.STATUS_ZOMBIE:
            processes.append(process)
    return processes


# ------------------------------------------------------------------------------------------------- real searches


def start_worker(*command, **environment: str) -> subprocess.Popen:
    """Start a worker of a search."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return start_group([forked_python(), *command], env=variables)


def test_two_workers_run_each_point_of_a_grid_once(recording, tmp_path):
    """One of its four points diverges."""
    grid = {"optimizer.lr": [1e-3, 1000], "optimizer.name": ["adamw", "sgd"]}
    command = ["train/sweep.py", written(tmp_path, {"grid": grid}), "--data", recording, "--out", tmp_path / "out"]
    workers = [start_worker(*command) for _ in range(2)]
    ended = [finish(worker, timeout=300) for worker in workers]
    assert [done.returncode for done in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    started = [line.split()[0] for done in ended for line in done.stdout.splitlines() if " started" in line]
    assert sorted(started) == ["0000", "0001", "0002", "0003"]
    assert all("started" in done.stdout for done in ended)
    out = tmp_path / "out"
    for run in started:
        assert (out / "trials" / f"{run}.log").read_text().count("stimuli to train on") == 1
    table = rows(out)
    assert [row["state"] for row in table] == ["done", "done", "done", "failed"]
    scores = [float(row["r2 on inner"]) for row in table[:3]]
    assert scores == sorted(scores, reverse=True)
    assert (float(table[3]["optimizer.lr"]), table[3]["optimizer.name"]) == (1000, "sgd")
    assert "the training diverged" in table[3]["reason"]
    text = (out / "table.md").read_text()
    assert "val and test selected nothing" in text
    assert f"Reported on val, which selected nothing: trial {table[0]['trial']}: R2" in text
    assert sum(done.stdout.count("scoring") for done in ended) == 1
    best = load_recipe(out / "best.yaml", Recipe)
    assert best.optimizer.name == table[0]["optimizer.name"]
    assert best == load_recipe(Path(table[0]["run"]) / "recipe.yaml", Recipe)
    assert Image.open(out / "heatmap.png").size[0] > 300
    for run in started:
        (board,) = [folder for folder in (out / "tensorboard").iterdir() if folder.name == run]
        assert "_hparams_/session_start_info" in EventAccumulator(str(board)).Reload().PluginTagToContent("hparams")
    again = run_here(*command)
    assert again.returncode == 0
    assert "started" not in again.stdout


@slow
def test_the_trial_of_a_killed_worker_is_resumed_by_another(recording, tmp_path):
    """In the same run folder, from the last epoch; no process of the killed worker is left."""
    sweep = {
        "set": {"epochs": 400, "early_stopping.patience": 400},
        "grid": {"optimizer.lr": [1e-9], "optimizer.name": ["sgd"]},
        "stale_seconds": 5,
    }
    command = ["train/sweep.py", written(tmp_path, sweep), "--data", recording, "--out", tmp_path / "out"]
    command += ["--processes", "2"]
    launchers = {"SPIKETUNE_FRESH_LAUNCHERS": "1", "PYTHON_EXEC": forked_python()}  # with forked ranks
    run = tmp_path / "out" / "trials" / "0000"
    killed = start_worker(*command, **launchers)
    wait_for(run.with_suffix(".beat").exists, process=killed, seconds=300)
    other = start_worker(*command, **launchers)
    wait_for((run / "checkpoints" / "last").exists, process=killed, seconds=300)
    before = processes_of(run)
    assert len(before) >= 4  # supervisor, launcher and two ranks
    killed.kill()
    killed.wait()
    psutil.wait_procs(before, timeout=15)
    assert not any(process.is_running() for process in before)
    wait_for(lambda: "resumed after epoch" in (run / "log.txt").read_text(), process=other, seconds=300)
    other.terminate()
    done = finish(other, timeout=60)
    assert done.returncode == 143, done.stderr
    assert "0000 started again" in done.stdout
    assert not processes_of(run)
    study = json.loads((tmp_path / "out" / "study.json").read_text())["study"]
    assert study.startswith("out-")


# ------------------------------------------------------------------------- the queue, with runs that are made up


class MadeUpRuns:
    """A launcher that does not train: `ends(recipe)` gives the outcome of a run, or its value.

    Attributes:
        started: the recipe of every run that was started, and whether it was to be resumed.
    """

    processes = 1

    def __init__(self, manifest, ends):
        self._manifest, self._ends, self.started = manifest, ends, []

    def command(self, config, script, *words):
        return [script, *map(str, words)]

    def run(self, command, heartbeat, lock, log, check):
        if command[0] == "evaluate.py":
            path = RunFolder(Path(command[1])).evaluation("val") / "metrics.json"
            path.parent.mkdir(parents=True)
            path.write_text('{"regression": {"r2": {"mean": 0.25}}}')
            return Outcome("done")
        recipe, run = load_recipe(Path(command[1]), Recipe), RunFolder(Path(command[command.index("--out") + 1]))
        self.started.append((recipe, "--resume" in command))
        end = self._ends(recipe)
        (run.checkpoints / "best").mkdir(parents=True, exist_ok=True)
        shutil.copy(command[1], run.recipe)
        if isinstance(end, Outcome):
            return end
        run.history.write_text('{"epoch": 1, "train_seconds": 2, "score_seconds": 1}\n')
        progress = Progress(
            epoch=1,
            best=end,
            best_epoch=1,
            recording=self._manifest.fingerprint,
            selection_metric=recipe.selection_metric,
            selection_split="inner",
            site_ids=self._manifest.site_ids,
            classes=None,
            image_size=32,
        )
        (run.checkpoints / "best" / "progress.json").write_text(progress.model_dump_json())
        return Outcome("done")


class NeverStop:
    def check(self):
        pass


@pytest.fixture
def worker(recording, tmp_path, monkeypatch):
    """A function that makes workers of a search with simulated runs; workers of one search share its folder."""
    monkeypatch.setattr("train.sweeping.publishing.draw_search", lambda standings: b"")
    manifest = load_manifest(recording)

    def make(content, ends=lambda recipe: recipe.optimizer.lr) -> Worker:
        plan, folder = load_plan(written(tmp_path, content)), SweepFolder(tmp_path / "out")
        study = open_study(folder, plan, manifest)
        return Worker(recording, plan, manifest, folder, study, MadeUpRuns(manifest, ends), NeverStop())

    return make


@pytest.mark.usefixtures("figures")
def test_a_sampled_search_runs_as_many_points_as_were_asked_for(worker, tmp_path):
    content = SPACE | {"storage": f"sqlite:///{tmp_path}/study.db"}
    first, second = worker(content), worker(content)
    for searcher in (first, second, first):
        searcher.run_trial(searcher.study.claim())
    second.work()
    assert first.study.claim() is None
    recipes = [recipe for recipe, _ in first.launcher.started + second.launcher.started]
    assert len(recipes) == len({recipe.optimizer.lr for recipe in recipes}) == 6
    assert all(1e-5 <= recipe.optimizer.lr <= 1e-2 and 1 <= recipe.epochs <= 4 for recipe in recipes)
    standings = second.score_best(second.publish())
    assert [entry.state for entry in standings.trials] == ["done"] * 6
    table = rows(tmp_path / "out")
    assert float(table[0]["optimizer.lr"]) == max(recipe.optimizer.lr for recipe in recipes)
    assert load_recipe(tmp_path / "out" / "best.yaml", Recipe).optimizer.lr == float(table[0]["optimizer.lr"])
    assert "trial " + table[0]["trial"] + ": R2 0.2500" in (tmp_path / "out" / "table.md").read_text()
    assert draw_search(standings).startswith(b"\x89PNG")


def test_a_best_trial_whose_scores_have_no_value_is_published(tmp_path):
    """No site varies on the reported split."""
    path = tmp_path / "eval" / "val" / "metrics.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"regression": {"r2": {"mean": None}}, "seen": {"dropped": 3}}))
    folder = SimpleNamespace(run=lambda name: tmp_path)
    standings = SimpleNamespace(settled=True, best=SimpleNamespace(run="0001"))
    (_, line) = publishing._reported_scores(folder, standings)
    assert line.endswith("trial 0001: no score has a value (seen before: 3 dropped)")


def test_a_sampled_search_is_the_same_with_the_same_seed(worker, tmp_path):
    few, sampled = SPACE | {"trials": 2}, []
    for content in (few, few, few | {"seed": 1}):
        solo = worker(content)
        solo.work()
        sampled.append([recipe for recipe, _ in solo.launcher.started])
        shutil.rmtree(tmp_path / "out")
    assert sampled[0] == sampled[1]
    assert sampled[0] != sampled[2]


def test_a_failed_run_is_retried_once_and_a_diverged_one_is_not(worker):
    ends = {1e-3: Outcome("failed", "killed by SIGKILL"), 3e-3: Outcome("diverged", "the training diverged: step 1")}
    solo = worker(GRID, lambda recipe: ends[recipe.optimizer.lr] if recipe.optimizer.name == "sgd" else 0.5)
    solo.work()
    started = [
        (recipe.optimizer.lr, resumed) for recipe, resumed in solo.launcher.started if recipe.optimizer.name == "sgd"
    ]
    assert started == [(1e-3, False), (3e-3, False), (1e-3, True)]
    entries = solo.publish().trials
    assert [entry.state for entry in entries] == ["done", "done", "failed", "failed"]
    assert {entry.settings["optimizer.lr"]: entry.reason for entry in entries[2:]} == {
        1e-3: "killed by SIGKILL",
        3e-3: "the training diverged: step 1",
    }


def test_bad_input_stops_the_search_until_it_is_fixed(worker):
    with pytest.raises(BadInput, match=r"nowhere.pth is no file \(trial 0000"):
        worker(GRID, lambda _: Outcome("bad input", "nowhere.pth is no file")).work()
    solo = worker(GRID)
    solo.work()
    assert [entry.state for entry in solo.publish().trials] == ["done"] * 4


def test_an_interrupted_trial_is_queued_again(worker):
    def interrupted(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        worker(GRID, interrupted).work()
    solo = worker(GRID)
    assert {entry.state for entry in solo.study.trials()} == {"waiting"}
    solo.work()
    assert len(solo.launcher.started) == 4


def test_a_trial_without_a_sign_of_life_is_picked_up_and_its_first_worker_records_nothing(worker, tmp_path):
    slow, quick = worker(GRID), worker(GRID)
    lost = slow.study.claim()
    heartbeat = tmp_path / "out" / "trials" / "0000.beat"
    os.utime(heartbeat, (time.time() - 100, time.time() - 100))
    taken = [quick.study.claim() for _ in range(3)]
    assert [claim.run for claim in taken] == ["0001", "0002", "0003"]  # 100 seconds are not too long yet
    os.utime(heartbeat, (time.time() - 200, time.time() - 200))
    with locks.exclusive(slow.folder.lock):
        quick.study._requeue_stale()
    assert not slow.study.owns(lost)
    slow.study.succeed(lost, 0.9, {})
    again = quick.study.claim()
    assert (again.run, again.settings) == (lost.run, lost.settings)
    assert not slow.study.owns(lost)
    slow.study.succeed(lost, 0.9, {})
    slow.study.release(lost, failed=True)
    assert quick.study.claim() is None
    quick.study.succeed(again, 0.1, {"best_epoch": 1, "epochs": 1, "seconds": 1.0})
    assert next(entry for entry in quick.study.trials() if entry.run == "0000").value == 0.1


def test_settings_are_ranked_by_their_mean_over_seeds(worker, tmp_path):
    """A setting that is best with one seed only, or failed with another, does not win."""
    values = {(1e-2, 0): 0.9, (1e-2, 1): 0.1, (1e-3, 0): 0.6, (1e-3, 1): 0.5, (1e-4, 0): 0.8}
    diverged = Outcome("diverged", "the training diverged: step 1")
    grid = {"optimizer.lr": [1e-2, 1e-3, 1e-4], "seed": [0, 1]}
    solo = worker({"grid": grid}, lambda recipe: values.get((recipe.optimizer.lr, recipe.seed), diverged))
    solo.work()
    table = rows(solo.folder.path) if solo.publish() else []
    assert [(float(row["optimizer.lr"]), int(row["seed"])) for row in table] == [
        *((1e-3, 0), (1e-3, 1), (1e-2, 0), (1e-2, 1), (1e-4, 0), (1e-4, 1))
    ]
    assert [float(row["mean over 2 seeds"]) for row in table[:4]] == pytest.approx([0.55, 0.55, 0.5, 0.5])
    assert load_recipe(tmp_path / "out" / "best.yaml", Recipe).seed == 0
    assert [(point.x, point.state) for point in best_points(solo.publish(), SettingAxis("optimizer.lr", []), None)] == [
        *((1e-3, "done"), (1e-2, "done"), (1e-4, "failed"))
    ]
    assert "ranked by their mean over the seeds 0, 1" in (tmp_path / "out" / "table.md").read_text()


def test_trials_that_have_failed_are_run_again_when_asked_for(worker):
    diverged = Outcome("diverged", "the training diverged: step 1")
    solo = worker(GRID, lambda recipe: diverged if recipe.optimizer.name == "sgd" else 0.5)
    solo.work()
    again = open_study(solo.folder, solo.plan, solo.manifest)
    assert [entry.state for entry in again.trials()] == ["done", "failed", "done", "failed"]
    again = open_study(solo.folder, solo.plan, solo.manifest, again=True)
    assert [entry.state for entry in again.trials()] == ["done", "waiting", "done", "waiting"]


def test_a_metric_that_is_better_when_lower_is_minimised(worker):
    solo = worker(GRID | {"set": {"early_stopping.metric": "mse"}})
    solo.work()
    assert [entry.value for entry in solo.publish().trials] == [1e-3, 1e-3, 3e-3, 3e-3]


@pytest.mark.usefixtures("figures")
@pytest.mark.parametrize(
    "grid",
    [
        {"optimizer.lr": [1e-3, 1e-2]},
        {"optimizer.name": ["sgd"]},
        {"optimizer.name": ["sgd", "adam"], "schedule.kind": ["cosine", "constant"], "epochs": [1, 2]},
        {"optimizer.clip_norm": [None, 1.0], "optimizer.name": ["sgd", "adam"]},
    ],
)
def test_every_search_has_a_figure(worker, grid):
    solo = worker({"grid": grid})
    solo.run_trial(solo.study.claim())
    assert min(Image.open(io.BytesIO(draw_search(solo.publish()))).size) > 300


# ------------------------------------------------------------------------------------------------------- refusals

REFUSED = {
    "unknown key": ({"grid": {"optimizer.learning_rat": [1]}}, ["grid", "optimizer.learning_rat is not a setting"]),
    "nearest key": ({"grid": {"optimizer.weight_deca": [1]}}, ["did you mean optimizer.weight_decay?"]),
    "key without its section": ({"grid": {"lr": [1]}}, ["did you mean optimizer.lr?"]),
    "section": ({"grid": {"optimizer": [1]}}, ["optimizer is a section", "optimizer.name"]),
    "unknown key under set": (GRID | {"set": {"epoch": 3}}, ["set: epoch is not a setting", "epochs"]),
    "bad value": ({"grid": {"optimizer.lr": [1e-3, -1]}}, ["grid: optimizer.lr", "greater than 0", "-1"]),
    "no list": ({"grid": {"optimizer.lr": 1e-3}}, ["grid.optimizer.lr", "list"]),
    "value twice": ({"grid": {"optimizer.lr": [1e-3, "1e-3"]}}, ["optimizer.lr lists a value twice"]),
    "contradiction": ({"grid": {"batch.per_device": [8, 64]}}, ["batch.per_device (64)", "batch.global_size (32)"]),
    "network": ({"grid": {"backbone.name": ["resnet18", "resnet51"]}}, ["resnet51"]),
    "selection on val": (GRID | {"set": {"early_stopping.split": "val"}}, ["early_stopping.split is val", "inner"]),
    "split varies": ({"grid": {"early_stopping.split": ["inner", "val"]}}, ["early_stopping.split cannot vary"]),
    "metric varies": ({"grid": {"early_stopping.metric": ["r2", "mse"]}}, ["early_stopping.metric cannot vary"]),
    "task varies": ({"grid": {"task.kind": ["regression", "hybrid"]}}, ["task.kind cannot vary"]),
    "set and varied": (GRID | {"set": {"optimizer.lr": 1}}, ["optimizer.lr is under `set` and under `grid`"]),
    "nothing varies": ({}, ["either `grid`", "`space`"]),
    "both": (GRID | SPACE, ["either `grid`", "`space`"]),
    "no number of trials": ({"space": SPACE["space"]}, ["trials", "number of points"]),
    "trials of a grid": (GRID | {"trials": 3}, ["trials belongs to `space`"]),
    "seeds alone": ({"grid": {"seed": [0, 1]}}, ["seed alone"]),
    "sampled seed": ({"space": {"seed": {"low": 0, "high": 9}}, "trials": 3}, ["seed would be selected for its luck"]),
    "empty interval": ({"space": {"optimizer.lr": {"low": 1, "high": 1}}, "trials": 3}, ["low (1)", "high (1)"]),
    "interval of names": ({"space": {"optimizer.name": {"low": 1, "high": 2}}, "trials": 3}, ["optimizer.name"]),
    "interval's fields": (
        {"space": {"epochs": {"low": 1, "high": 2, "lgo": True}}, "trials": 3},
        ["space: epochs: lgo is not a setting", "did you mean"],
    ),
    "out of bounds": ({"space": {"optimizer.lr": {"low": 0, "high": 1}}, "trials": 3}, ["optimizer.lr", "greater"]),
    "logarithm of 0": (
        {"space": {"optimizer.weight_decay": {"low": 0, "high": 1, "log": True}}, "trials": 3},
        ["optimizer.weight_decay", "low > 0"],
    ),
    "unknown setting": (GRID | {"trails": 3}, ["trails is not a setting", "trials"]),
    "no recipe": (GRID | {"recipe": "nowhere.yaml"}, ["recipe", "nowhere.yaml"]),
    "storage": (GRID | {"storage": "sqlite:////nowhere/study.db"}, ["storage", "/nowhere/study.db"]),
    "no such database": (GRID | {"storage": "mydb://user:secret@host/study"}, ["storage", "mydb"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_searches_are_refused_in_a_sentence_and_leave_nothing(recording, tmp_path, case):
    content, words = REFUSED[case]
    done = run_here("train/sweep.py", written(tmp_path, content), "--data", recording, "--out", tmp_path / "out")
    assert_refused(done, *words)
    assert "secret" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_missing_search_file_or_missing_data_is_refused(recording, tmp_path):
    sweep = written(tmp_path, GRID)
    out = ["--out", tmp_path / "out"]
    assert_refused(
        run_here("train/sweep.py", tmp_path / "nowhere.yaml", "--data", recording, *out), "no such sweep file"
    )
    assert_refused(run_here("train/sweep.py", sweep, "--data", tmp_path, *out), "has no manifest.json")
    more = ["--processes", "64"]
    assert_refused(run_here("train/sweep.py", sweep, "--data", recording, *out, *more), "64 processes cannot share")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    assert_refused(run_here("train/sweep.py", sweep, "--data", recording, *out), "is not an empty folder")


def test_a_search_of_ones_own_names_a_recipe_of_ours(tmp_path):
    sweep = tmp_path / "mine.yaml"
    for name, backbone in (("quickstart.yaml", "tf_efficientnet_lite0"), ("train/recipes/resnet18.yaml", "resnet18")):
        sweep.write_text(f"recipe: {name}\ngrid: {{optimizer.lr: [1e-3, 1e-2]}}\n")
        assert load_plan(sweep).base.backbone.name == backbone
    (tmp_path / "quickstart.yaml").write_text("epochs: 7\n")  # what lies beside the file comes first
    sweep.write_text("recipe: quickstart.yaml\ngrid: {optimizer.lr: [1e-3, 1e-2]}\n")
    assert load_plan(sweep).base.epochs == 7
    sweep.write_text("recipe: quikstart.yaml\ngrid: {optimizer.lr: [1e-3, 1e-2]}\n")
    with pytest.raises(BadInput, match=r"quikstart\.yaml is neither in .*; did you mean .*quickstart\.yaml\?"):
        load_plan(sweep)


def test_a_worker_within_another_job_says_what_to_unset(monkeypatch):
    for name, value in started_as(0, 2).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        BadInput, match=r"starts processes itself.*\(unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE\)"
    ):
        Launcher(1)


def test_joining_with_another_search_or_other_data_is_refused(worker, recording, tmp_path):
    worker(GRID)
    command = ["--data", recording, "--out", tmp_path / "out"]
    other = {"grid": GRID["grid"] | {"optimizer.lr": [1e-3, 1e-2]}}
    done = run_here("train/sweep.py", written(tmp_path, other), *command)
    assert_refused(done, "holds another sweep", "grid.optimizer.lr: [0.001, 0.003] -> [0.001, 0.01]")
    done = run_here("train/sweep.py", written(tmp_path, GRID, SMALL | {"epochs": 2}), *command)
    assert_refused(done, "holds another sweep", "recipe.epochs: 1 -> 2")
    elsewhere = shutil.copytree(recording, tmp_path / "elsewhere")
    manifest = json.loads((elsewhere / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["sha256"] = "0" * 64
    manifest["checksum"] = None
    (elsewhere / "manifest.json").write_text(json.dumps(manifest))
    done = run_here("train/sweep.py", written(tmp_path, GRID), "--data", elsewhere, "--out", tmp_path / "out")
    assert_refused(done, "holds a sweep on other data")
    lost = GRID | {"storage": f"sqlite:///{tmp_path}/other.db"}
    assert_refused(run_here("train/sweep.py", written(tmp_path, lost), *command), "is not in the storage")


# ---------------------------------------------------------------------------------------------------------- parts


def test_values_are_read_as_the_recipe_reads_them(tmp_path):
    """YAML reads 1e-3 as text."""
    plan = load_plan(written(tmp_path, {"grid": {"optimizer.lr": ["1e-3", 1], "images.size": [32, None]}}))
    assert plan.choices == {"optimizer.lr": [1e-3, 1.0], "images.size": [32, None]}
    assert [plan.recipe(point).images.size for point in plan.points] == [32, None, 32, None]
    space = {"optimizer.lr": {"low": "1e-4", "high": 1}, "epochs": {"low": 2, "high": 8, "step": 2}}
    plan = load_plan(written(tmp_path, {"space": space, "trials": 2}))
    assert (plan.ranges["optimizer.lr"].low, type(plan.ranges["optimizer.lr"].high)) == (1e-4, float)
    assert (plan.ranges["epochs"].low, plan.ranges["epochs"].step) == (2, 2)


@pytest.mark.parametrize("path", sorted(ROOT.glob("train/recipes/sweeps/*.yaml")), ids=lambda path: path.stem)
def test_presets_are_valid(path):
    plan = load_plan(path)
    known = {"lr_x_optimizer": "nadam", "best": "adamw"}[path.stem]
    assert known in {setting_of(plan.recipe(point), "optimizer.name") for point in plan.points}


@pytest.mark.parametrize(
    ("code", "printed", "expected"),
    [
        (0, "", Outcome("done")),
        (1, "error: no such\nreturned non-zero exit status 2.", Outcome("bad input", "no such")),
        (1, "error: no such\n  exitcode  : -15 (pid: 1)\n  exitcode  : 2 (pid: 2)", Outcome("bad input", "no such")),
        (
            1,
            "error: the training diverged: step 3\nexit status 1.",
            Outcome("diverged", "the training diverged: step 3"),
        ),
        (1, "error: the disk is full\nexit status 1.", Outcome("failed", "the disk is full")),
        (
            1,
            "torch.OutOfMemoryError: CUDA\nsubprocess.CalledProcessError: exit status 1.",
            "torch.OutOfMemoryError: CUDA",
        ),
        (1, "died with <Signals.SIGKILL: 9>.", "killed by SIGKILL (out of memory?)"),
        (1, "  exitcode  : -15 (pid: 1)\n  exitcode  : -11 (pid: 2)", "killed by SIGSEGV"),
        (-9, "", "killed by SIGKILL (out of memory?)"),
        (1, "nothing known", "ended with exit code 1"),
    ],
)
def test_the_outcome_of_a_trial_is_read_from_its_output(code, printed, expected):
    if isinstance(expected, str):
        expected = Outcome("failed", f"{expected}; see run.log")
    assert outcome(code, printed, Path("run.log")) == expected


def test_a_trial_sees_nothing_of_the_launcher_that_started_the_worker(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    environment = Launcher(1).environment()
    assert not {"SLURM_STEP_NUM_TASKS", "ACCELERATE_MIXED_PRECISION"} & environment.keys()
    assert environment["OMP_NUM_THREADS"] == "3"
    for name, value in started_as(rank=0, ranks=2).items():
        monkeypatch.setenv(name, value)
    own_identity.cache_clear()
    with pytest.raises(BadInput, match="plain python"):
        Launcher(1)


ORPHAN = "import subprocess, time; subprocess.Popen(['sleep', '1000'], start_new_session=True); time.sleep(1000)"
WORKER = f"""
import os, sys
from pathlib import Path
from types import SimpleNamespace
from train.sweeping.supervised_process import Heartbeat, hold_lock, run_supervised
heartbeat = Heartbeat(Path(sys.argv[1]), "mine", 0.1)
with hold_lock(heartbeat.path, int) as lock:
    log = Path(sys.argv[1] + ".log")
    print(run_supervised([sys.executable, "-c", {ORPHAN!r}], heartbeat, lock, log, os.environ, int))
"""


@pytest.mark.parametrize("end", ["killed", "interrupted", "taken over"])
def test_warm_processes_end_with_their_worker_and_release_its_lock(tmp_path, end):
    heartbeat = tmp_path / "beat"
    heartbeat.write_text("mine")
    worker = subprocess.Popen([sys.executable, "-c", WORKER, heartbeat], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: len(psutil.Process(worker.pid).children(recursive=True)) == 3, process=worker)
    family = psutil.Process(worker.pid).children(recursive=True)
    assert seconds_since([heartbeat])[0] < 5
    if end == "taken over":
        heartbeat.write_text("another's")
        assert worker.communicate()[0] == f"{128 + signal.SIGTERM}\n"
    else:
        worker.send_signal(signal.SIGKILL if end == "killed" else signal.SIGINT)
        worker.communicate()
    with hold_lock(heartbeat, int):
        gone, alive = psutil.wait_procs(family, timeout=5)
    assert not alive
    assert len(gone) == 3


def test_a_warm_commands_exit_code_and_output_are_passed_on(tmp_path):
    heartbeat, log = Heartbeat(tmp_path / "beat", "mine", 0.1), tmp_path / "log"
    heartbeat.path.write_text("mine")
    for script, code in (("print('hello'); raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)):
        with hold_lock(heartbeat.path, int) as lock:
            assert run_supervised([sys.executable, "-c", script], heartbeat, lock, log, os.environ, int) == code
    assert log.read_text() == "hello\n"
    assert seconds_since([tmp_path / "nowhere"]) == [float("inf")]


def test_points_that_have_not_been_sampled_come_last(tmp_path):
    plan = load_plan(written(tmp_path, SPACE))
    entries = [
        TrialStatus("0000", {}, "waiting"),
        TrialStatus("0001", {"epochs": 1}, "failed"),
        TrialStatus("0002", {"epochs": 2}, "done", 0.1),
    ]
    assert [entry.run for entry in rank(plan, entries).trials] == ["0002", "0001", "0000"]
