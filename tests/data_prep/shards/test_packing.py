"""Packing on any number of processes writes the same bytes, and a fault in one is one error message."""

import os
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_refused, finish, run_command, start_command
from make_sources import make_folder

from data_prep.common.worker_processes import usable_cores
from data_prep.shards.folder import ShardFolder
from data_prep.shards.packing import pack
from data_prep.sources.folder import Folder

PACK = "data_prep/pack.py"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Enough JPEGs (160 px, about 4 kB each) for a pack to be interrupted."""
    path = tmp_path_factory.mktemp("source") / "src"
    make_folder(path, n=600, size=160, sites=4, splits=True, trials=3, encoding="jpg")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "index.npz"}


def packing_processes(pid: int) -> list[int]:
    """The processes that pack for a command: children of the server that starts them."""
    children = {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    family = {child: Path(f"/proc/{child}/task/{child}/children").read_text().split() for child in children}
    return [int(child) for grandchildren in family.values() for child in grandchildren]


def test_any_number_of_workers_writes_the_same_bytes(source, tmp_path):
    folders = []
    for workers in (1, 2, 5):
        recording = Folder(source=source, name="same").open()
        folders.append(pack(recording, tmp_path / str(workers), stimuli_per_shard=64, workers=workers))
        assert [fault for _, fault in folders[-1].verify()] == [None] * 10  # walking the tars finds the same index
    first = contents(tmp_path / "1")
    assert len(first) == 12
    assert contents(tmp_path / "2") == contents(tmp_path / "5") == first
    for name in ("train", "val", "test"):
        splits = [folder.split(name) for folder in folders]
        assert splits[0].stimulus_ids == splits[1].stimulus_ids == splits[2].stimulus_ids
        assert np.array_equal(splits[0].trials(), splits[2].trials(), equal_nan=True)


def test_encoded_images_are_never_encoded_again(source, tmp_path):
    split = pack(Folder(source=source).open(), tmp_path / "out", stimuli_per_shard=200, workers=2).split("train")
    for position in range(0, len(split), 50):
        file = source / "images" / f"{split.stimulus_ids[position]}.jpg"
        assert bytes(split.image(position)[0]) == file.read_bytes()


def test_by_default_there_is_a_worker_for_each_core_that_may_be_used():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert usable_cores() == len(before)


def said(done) -> list[str]:
    """Standard error of a command without progress lines, which only a slow machine shows."""
    return [line for line in done.stderr.splitlines() if not line.startswith("packing: ")]


def test_a_fault_in_one_of_several_workers_is_one_sentence(source, tmp_path):
    make_folder(tmp_path / "src", n=60, splits=True)
    image = tmp_path / "src" / "images" / "stim0042.png"
    image.write_bytes(image.read_bytes()[:-20])
    done = run_command([PACK, "folder", tmp_path / "src", "--out", tmp_path / "out", "--workers", 3])
    assert_refused(done, "stim0042", "cut short")
    assert len(said(done)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(source, tmp_path):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    out = tmp_path / "out"
    done = run_command([PACK, "folder", source, "--out", out, "--workers", 2], preexec_fn=limit)
    assert done.returncode == 1
    (sentence,) = said(done)
    assert sentence.startswith("error: ")
    assert "File too large; nothing was packed" in sentence
    assert list(tmp_path.iterdir()) == []


def test_a_killed_worker_is_one_sentence_and_leaves_nothing(source, tmp_path):
    out = tmp_path / "out"
    process = start_command([PACK, "folder", source, "--out", out, "--workers", 2, "--stimuli-per-shard", 2])
    while not any(tmp_path.glob(".out.*/*.tar")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    workers = packing_processes(process.pid)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    done = finish(process)
    assert done.returncode == 1
    assert said(done) == ["error: a packing process was killed (out of memory?); nothing was packed"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("length", [90, 97, 300])
def test_names_that_are_too_long_for_a_plain_header_are_found_too(source, tmp_path, length):
    written = make_folder(tmp_path / "src", n=9, splits=True)
    table = tmp_path / "src" / "stimuli.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0], *(f"{'x' * length}{line}" for line in lines[1:])]))
    split = pack(Folder(source=tmp_path / "src").open(), tmp_path / "out", 4, workers=1).split("train")
    rows = [row for row, name in enumerate(written.splits) if name == "train"]
    assert split.stimulus_ids == ["x" * length + written.ids[row] for row in rows]
    assert np.array_equal(split.rates(), written.rates[rows])
    assert [fault for _, fault in ShardFolder(tmp_path / "out").verify()] == [None] * 4
