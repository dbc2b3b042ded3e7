"""The engine `webdataset` pairs images with their responses, and gives every rank as many steps."""

import itertools
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_refused, run_here, slow, succeed_here
from launching import SMALL, losses, metrics, succeed
from make_tars import IMAGES, RATES, members_of, sample, write_samples, write_tar

from data_prep.common.errors import BadInput
from data_prep.shards.folder import ShardFolder
from train.data.stimuli import RecordingStimuli
from train.data.streaming import StreamLoader

STREAM = ("--loader.engine", "webdataset")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two train tars with 14 stimuli, and one val tar with six."""
    path = tmp_path_factory.mktemp("foreign")
    write_samples(path / "train-0.tar", range(8), prefix="sub/s")
    write_samples(path / "train-1.tar", range(8, 14), prefix="sub/s")
    write_samples(path / "val-0.tar", range(14, 20))
    return path


@pytest.fixture(scope="module")
def stimuli(folder) -> RecordingStimuli:
    return RecordingStimuli(ShardFolder(folder).split("train"), 24)


def stream(stimuli, rank=0, ranks=1, workers=0, seed=3, **options) -> StreamLoader:
    sizes = {"global_size": 5, "per_device": 2} | options
    return StreamLoader(stimuli, seed=seed, rank=rank, ranks=ranks, workers=workers, pin=False, **sizes)


def shown(loader, epochs=1, first_step=0) -> list[list[int]]:
    """The positions with weight in every micro-batch."""
    batches = [batch for epoch in range(epochs) for step in loader.epoch(epoch, first_step) for batch in step]
    return [batch.positions[batch.weight > 0].tolist() for batch in batches]


# ---- what is in a batch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_comes_with_its_own_responses(stimuli, workers):
    seen = set()
    loader = stream(stimuli, workers=workers, draws=2)
    for epoch in range(6):
        for step in loader.epoch(epoch):
            for batch in step:
                rows = batch.positions.numpy()
                assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), IMAGES[rows])
                assert np.array_equal(batch.rates.numpy(), RATES[rows], equal_nan=True)
                assert batch.draws.shape == (len(rows), 2)
                seen |= set(rows.tolist())
    assert seen == set(range(14))


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_every_rank_takes_the_same_steps_and_its_share(stimuli, ranks):
    everyone = [list(stream(stimuli, rank, ranks).epoch(0)) for rank in range(ranks)]
    assert {len(steps) for steps in everyone} == {2}
    for step in range(2):
        assert len({len(steps[step]) for steps in everyone}) == 1
        batches = [batch for steps in everyone for batch in steps[step]]
        assert sum(float(batch.weight.sum()) for batch in batches) == 5
        assert {batch.global_stimuli for batch in batches} == {5}
        assert {batch.global_observed for batch in batches} == {25}  # of 5 stimuli with 5 sites; 1 in 70 is missing


def test_stimuli_that_are_held_out_are_never_shown(folder):
    subset = np.array([0, 2, 3, 9, 13])
    part = RecordingStimuli(ShardFolder(folder).split("train"), 24, subset)
    loader = stream(part, global_size=5)
    taken = {position for epoch in range(8) for batch in shown(loader, epoch + 1) for position in batch}
    assert taken == set(range(5))
    for batch, *_ in loader.epoch(0):
        assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), IMAGES[subset[batch.positions.numpy()]])


def test_it_repeats_and_ranks_workers_seeds_and_beginnings_differ(stimuli):
    first = shown(stream(stimuli), 4)
    assert first == shown(stream(stimuli), 4)
    assert shown(stream(stimuli, workers=2), 4) == shown(stream(stimuli, workers=2), 4)
    others = [{"seed": 4}, {"rank": 1, "ranks": 2}, {"rank": 0, "ranks": 2}, {"workers": 2}]
    drawn = [first, shown(stream(stimuli), 4, first_step=1)]
    drawn += [shown(stream(stimuli, **other), 4) for other in others]
    assert len({tuple(itertools.chain(*batches))[:12] for batches in drawn}) == 6


def test_a_resumed_epoch_begins_a_repeatable_stream(stimuli):
    def resumed() -> list[list[int]]:
        loader = stream(stimuli)
        steps = [*loader.epoch(1, first_step=1), *loader.epoch(2)]
        assert len(steps) == 3
        return [batch.positions.tolist() for step in steps for batch in step]

    assert resumed() == resumed()
    broken_off = stream(stimuli)
    next(broken_off.epoch(0))
    assert shown(broken_off) == shown(stream(stimuli))


def test_captions_and_files_of_macos_are_passed_over(tmp_path):
    members = members_of({f"s{row:02d}": sample(row, txt=b"a caption") for row in range(6)})
    write_tar(tmp_path / "train.tar", [("._s00.png", b"\0\5\x16\7"), *members])
    stimuli = RecordingStimuli(ShardFolder(tmp_path).split("train"), 24)
    drawn = {position for batch in shown(stream(stimuli), epochs=4) for position in batch}
    assert drawn == set(range(6))


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("s00.png", b"no image")], "s00.png: these are not the bytes"),
        ([("s00.pyd", b"")], "s00.pyd: not plain data"),
        ([("new.png", sample(0)["png"])], "new: was added after the run began"),
    ],
)
def test_a_missing_or_damaged_tar_is_reported_in_one_sentence(tmp_path, members, words, workers):
    """Tars are checked when they are indexed, and not trusted later."""
    tar = write_samples(tmp_path / "train.tar", range(3))
    stimuli = RecordingStimuli(ShardFolder(tmp_path).split("train"), 24)
    write_tar(tar, members)
    with pytest.raises(BadInput, match=words) as caught:
        list(stream(stimuli, workers=workers, global_size=3).epoch(0))
    assert str(tar) in str(caught.value)


@pytest.mark.parametrize("change", [lambda tar: os.truncate(tar, tar.stat().st_size - 512), Path.unlink])
def test_a_tar_that_is_cut_or_gone_is_named(tmp_path, change):
    tar = write_samples(tmp_path / "train.tar", range(3))
    stimuli = RecordingStimuli(ShardFolder(tmp_path).split("train"), 24)
    change(tar)
    with pytest.raises(BadInput, match=r"train\.tar (has .* bytes, but had .* when|cannot be read .*No such file)"):
        list(stream(stimuli, global_size=3).epoch(0))


def test_it_is_never_used_to_score(folder, tmp_path):
    refused = run_here("train/probe.py", "--data", folder, "--out", tmp_path / "probe", "--layers", "pixels", *STREAM)
    assert_refused(refused, "loader.engine", "training only", "indexed")


# ---- whole runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tars(recording, tmp_path_factory) -> Path:
    """The tars of a packed recording without its manifest and index, like tars from elsewhere."""
    path = tmp_path_factory.mktemp("elsewhere")
    for tar in recording.glob("*.tar"):
        shutil.copy(tar, path)
    return path


@pytest.mark.parametrize("processes", [1, 2, pytest.param(3, marks=slow)])
def test_a_run_on_foreign_tars_and_its_scores(tars, tmp_path, processes):
    """Fed by streams on 1, 2 and 3 processes, scored on every stimulus once, resumed on one process."""
    out = tmp_path / "run"
    command = ["train/finetune.py", "--data", tars, "--out", out, *SMALL, *STREAM, "--checkpoint.every-steps", "2"]
    command += ["--checkpoint.keep", "9"]
    output = succeed(processes, *command, "--loader.workers", str(processes % 2))
    assert "drawn with replacement" in output
    assert len(losses(out)) == 2
    assert np.isfinite(losses(out)).all()
    if processes == 1:
        succeed_here("train/evaluate.py", out, "--split", "val")
        assert metrics(out)["stimuli"] == len(ShardFolder(tars).split("val"))
    if processes == 2:
        for step in (10, 8):  # as if it had been killed after step 7
            shutil.rmtree(out / "checkpoints" / f"step_{step}")
        resumed = run_here(*command, "--resume", "--loader.workers", "0")
        assert resumed.returncode == 0, resumed.stderr
        assert "resumed after epoch 1, step 1 of the next (step 6)" in resumed.stdout
        assert len(losses(out)) == 2


def test_classes_alone_can_be_learned(tmp_path):
    samples = {f"{row:02d}": {"png": sample(row)["png"], "cls": str(row % 2).encode()} for row in range(20)}
    write_tar(tmp_path / "tars" / "train.tar", members_of(dict(list(samples.items())[:14])))
    write_tar(tmp_path / "tars" / "val.tar", members_of(dict(list(samples.items())[14:])))
    command = ["train/finetune.py", "--data", tmp_path / "tars", "--out", tmp_path / "run", *SMALL]
    assert_refused(run_here(*command), "no responses")
    learned = run_here(*command, "--task.kind", "classification", "--images.size", "32")
    assert learned.returncode == 0, learned.stderr
