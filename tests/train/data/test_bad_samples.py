"""`on_bad_sample: skip`: bad stimuli are counted and named, the others are dealt with as if nothing had been, and no
score hides that it is of fewer; and two processes at one folder."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, assert_refused, run_here, succeed_here
from hostile import FIRST, edit, flip, place_in, reindexed, rewritten
from launching import SMALL, metrics, predictions
from make_sources import make_folder
from make_tars import npy

from data_prep.common.errors import BadInput
from data_prep.shards.folder import ShardFolder
from data_prep.shards.packing import pack
from data_prep.sources.folder import Folder
from train.data.bad_samples import BadSamples
from train.data.recordings import Recordings
from train.data.stimuli import StimulusSet
from train.finetuning.setup.preparation import training_stimuli
from train.run.folder import RunFolder
from train.run.recipe import Loader, Recipe

FINETUNE, EVALUATE, PROBE = "train/finetune.py", "train/evaluate.py", "train/probe.py"
OPTIONS = [*SMALL, "--epochs", "1", "--batch.global-size", "8"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """60 stimuli of 32 px, 36 to train on, in shards of 8."""
    folder = tmp_path_factory.mktemp("whole")
    make_folder(folder / "src", n=60, splits=True, sites=4)
    return pack(Folder(source=folder / "src").open(), folder / "shards", stimuli_per_shard=8, workers=1).folder


@pytest.fixture(scope="module")
def run(packed, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    succeed_here(FINETUNE, "--data", packed, "--out", out, *OPTIONS)
    return out


@pytest.fixture
def copied(packed, tmp_path) -> Path:
    return shutil.copytree(packed, tmp_path / "shards")


@pytest.fixture
def damaged(copied) -> tuple[Path, list[str]]:
    """Two train stimuli and one val stimulus are bad: a flipped bit, responses of other sites, no image."""
    rewritten(copied, "rates.npy", npy(np.zeros(9, np.float32)), "train-000001.tar")
    rewritten(copied, "png", b"no image", "val-000000.tar")
    offset, size = place_in(copied, "png", 2)
    flip(copied / FIRST, offset + size // 2)
    train, val = (ShardFolder(copied).split(name).stimulus_ids for name in ("train", "val"))
    return copied, [train[2], train[8], val[0]]


def test_a_run_names_what_it_leaves_out_and_trains_on_the_rest(damaged, tmp_path):
    folder, (flipped, other_sites, _) = damaged
    out = tmp_path / "out"
    assert_refused(run_here(FINETUNE, "--data", folder, "--out", out, *OPTIONS), other_sites, "9")
    assert not out.exists()
    done = succeed_here(FINETUNE, "--data", folder, "--out", out, *OPTIONS, "--on-bad-sample", "skip")
    for words in ("WARNING: 2 of 36 stimuli of train", "LEFT OUT", f"{flipped}.png", f"{other_sites}.rates.npy"):
        assert words in done.stdout
        assert words in (out / "log.txt").read_text()
    left_out = json.loads((out / "env.json").read_text())["left_out"]["train"]
    assert (left_out["count"], left_out["of"]) == (2, 36)
    assert left_out["stimuli"].keys() == {flipped, other_sites}


def test_a_flipped_image_stops_a_run_at_the_sample(copied, tmp_path):
    offset, size = place_in(copied, "png", 5)
    flip(copied / FIRST, offset + size // 2)
    done = run_here(FINETUNE, "--data", copied, "--out", tmp_path / "out", *OPTIONS)
    assert_refused(done, FIRST, ShardFolder(copied).split("train").stimulus_ids[5], "checksum")


def test_the_streaming_engine_notices_it_too(copied, tmp_path):
    offset, size = place_in(copied, "png", 5)
    flip(copied / FIRST, offset + size // 2)
    stream = ["--loader.engine", "webdataset", "--early-stopping.split", "val"]
    done = run_here(FINETUNE, "--data", copied, "--out", tmp_path / "out", *OPTIONS, *stream)
    assert_refused(done, FIRST, "checksum")
    done = run_here(
        FINETUNE, "--data", copied, "--out", tmp_path / "skipped", *OPTIONS, *stream, "--on-bad-sample", "skip"
    )
    assert done.returncode == 0, done.stderr


def stimuli_of(recipe: Recipe, *folders: Path) -> tuple[StimulusSet, StimulusSet]:
    recordings = Recordings([ShardFolder(folder) for folder in folders])
    return training_stimuli(recordings, recordings.divide(recipe), recipe)


def test_leaving_stimuli_out_does_not_move_the_others_between_parts(packed, damaged):
    folder, bad = damaged
    recipe = Recipe.model_validate({"loader": {"on_bad_sample": "skip"}})
    all_stimuli = stimuli_of(Recipe(), packed)
    rest = stimuli_of(recipe, folder)
    for before, after in zip(all_stimuli, rest, strict=True):
        readable = [name not in bad for name in before.stimulus_ids]
        assert after.stimulus_ids == [name for name in before.stimulus_ids if name not in bad]
        assert np.array_equal(after.rates, before.rates[readable])


def test_an_evaluation_says_loudly_that_it_scores_fewer(run, damaged, tmp_path):
    folder, (*_, bad) = damaged
    copy = shutil.copytree(run, tmp_path / "run", symlinks=True)
    assert_refused(run_here(EVALUATE, copy, "--data", folder), f"{bad}.png")
    assert not (copy / "eval").exists()
    done = succeed_here(EVALUATE, copy, "--data", folder, "--on-bad-sample", "skip")
    assert "WARNING: 1 of 12 stimuli of val cannot be read and are LEFT OUT" in done.stderr
    assert bad in done.stderr
    scores = metrics(copy)
    assert scores["stimuli"] == 11
    assert scores["left_out"]["val"]["count"] == 1
    assert scores["left_out"]["val"]["of"] == 12
    assert list(scores["left_out"]["val"]["stimuli"]) == [bad]
    assert bad not in predictions(copy)["stimulus_id"].tolist()
    of_last = run_here(EVALUATE, copy, "--checkpoint", "last", "--on-bad-sample", "skip")
    assert "LEFT OUT" not in of_last.stderr
    assert "left_out" not in metrics(copy, "val_last")
    assert metrics(copy, "val_last")["fingerprint"] != scores["fingerprint"]


def test_a_probe_says_so_as_well(damaged, tmp_path):
    folder, bad = damaged
    command = [PROBE, "--data", folder, "--layers", "pixels", "--components", "8"]
    assert_refused(run_here(*command, "--out", tmp_path / "a"), bad[1])
    done = succeed_here(*command, "--out", tmp_path / "b", "--on-bad-sample", "skip")
    assert "WARNING: 2 of 36 stimuli of train" in done.stdout
    left_out = metrics(tmp_path / "b")["left_out"]
    assert {name for record in left_out.values() for name in record["stimuli"]} == set(bad)


def test_nothing_left_is_refused(copied):
    for tar in sorted(copied.glob("val-*.tar")):
        tar.write_bytes(tar.read_bytes().replace(b"\x89PNG", b"\x89PGN"))
    split = ShardFolder(reindexed(copied)).split("val")
    with pytest.raises(BadInput, match=r"no stimulus of val can be read: .*val-000000\.tar"):
        BadSamples(Loader(on_bad_sample="skip")).usable_positions(split, 32, responses=True, classes=False)


# ---- two at one folder ---------------------------------------------------------------------------------------------


def test_of_two_runs_into_one_folder_one_wins_and_the_other_is_refused(packed, tmp_path):
    """Both find the folder free; the one that claims it second is refused."""
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    for folder in (first, second):
        folder.check_free()
    first.claim(Recipe(), [packed], {"processes": "first"})
    with pytest.raises(BadInput, match="another process is writing"):
        second.claim(Recipe(), [packed], {"processes": "second"})
    first.close()
    with pytest.raises(BadInput, match="already holds a run"):
        second.claim(Recipe(), [packed], {"processes": "second"})
    assert json.loads(first.env.read_text())["processes"] == "first"


def test_however_close_the_race_one_run_wins(packed, tmp_path):
    for number in range(20):
        folders, start = [RunFolder(tmp_path / f"run{number}") for _ in range(3)], threading.Barrier(3)
        outcomes: list[str] = []

        def contend(folder: RunFolder, start=start, outcomes=outcomes) -> None:
            start.wait()
            try:
                folder.claim(Recipe(), [packed], {})
                outcomes.append("won")
            except BadInput:
                outcomes.append("told")

        threads = [threading.Thread(target=contend, args=(folder,)) for folder in folders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["told", "told", "won"]
        for folder in folders:
            folder.close()


def test_a_run_that_is_being_written_is_not_resumed_beside_it(run, packed, tmp_path, monkeypatch):
    copy = shutil.copytree(run, tmp_path / "run", symlinks=True)
    monkeypatch.setattr(RunFolder.lock, "__defaults__", (0.2,))
    holder = RunFolder(copy)
    holder.lock()
    resume = [FINETUNE, "--data", packed, "--out", copy, "--resume"]
    assert_refused(run_here(*resume), copy, "another process is writing")
    holder.close()
    succeed_here(*resume)


def test_a_killed_process_leaves_the_folder_free(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from train.run.folder import RunFolder; "
        "RunFolder(Path(sys.argv[1])).lock(); print('held', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=environment)
    try:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(BadInput, match="another process is writing"):
            RunFolder(tmp_path).lock(0)
    finally:
        process.kill()
        process.wait()
    free = RunFolder(tmp_path)
    free.lock(5)
    free.close()


def test_a_checkpoint_that_changes_meanwhile_is_not_mixed_with_the_next(run, packed, tmp_path, monkeypatch):
    """`best` is resolved once, so that progress and weights come from one checkpoint."""
    from train.evaluation import evaluation_job
    from train.evaluation.options import Evaluate

    copy = shutil.copytree(run, tmp_path / "run", symlinks=True)
    folder = copy / "checkpoints"
    (step,) = folder.glob("step_*")
    load = evaluation_job.load_progress

    def overtaken(path: Path):
        tensors = load(path)
        shutil.copytree(step, folder / "step_900")
        edit(folder / "step_900" / "progress.json", lambda content: content.update(epoch=9, step=900))
        (folder / "best").unlink()
        (folder / "best").symlink_to("step_900")
        return tensors

    with monkeypatch.context() as patched:
        patched.setattr(evaluation_job, "load_progress", overtaken)
        (job,) = evaluation_job.prepare(Evaluate(runs=[copy], data=[str(packed)]), copy, "val")
    assert job.run.checkpoint.name == step.name
    assert job.run.progress.step != 900


def test_a_report_over_a_run_in_progress(run, tmp_path):
    """With half a line of history and no scores, the report says what is missing and leaves the run unchanged."""
    copy = shutil.copytree(run, tmp_path / "run", symlinks=True)
    with (copy / "history.jsonl").open("a") as file:
        file.write('{"epoch": 2, "lo')
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    started = time.monotonic()
    done = run_here("train/report.py", copy, "--out", tmp_path / "report")
    assert done.returncode in (0, 1, 2), done.stderr
    assert "Traceback" not in done.stderr
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before
    assert time.monotonic() - started < 60
