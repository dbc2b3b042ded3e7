"""A run that is killed while it saves has a whole checkpoint, whatever it was doing at that moment."""

import os
import sys
import warnings
from pathlib import Path

import pytest
import torch

from data_prep.common import atomic_writes
from train.run import checkpoint
from train.run.checkpoint import load_tensors, newest_intact, resolve_checkpoint, restore_checkpoints, save_checkpoint
from train.run.progress import Progress

KILLED = 9
OPERATIONS = ("os.rename", "os.remove", "os.rmdir", "os.symlink", "os.mkdir", "open", "shutil.rmtree", "ctypes.dlopen")


def progress(step: int, epoch: int) -> Progress:
    return Progress(
        recording="r",
        selection_metric="r2",
        selection_split="inner",
        site_ids=["a"],
        classes=None,
        image_size=8,
        step=step,
        epoch=epoch,
    )


def save(folder: Path, step: int, value: float) -> None:
    save_checkpoint(folder, {"network": {"weight": torch.full((3,), value)}}, progress(step, epoch=int(value)), keep=1)


def killed_at(operation: int, folder: Path, step: int, value: float) -> bool:
    """Save in a child that dies just before its n-th operation on files; whether it has got as far as that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking where there are threads: the child uses none
        child = os.fork()
    if child == 0:
        operations_left = [operation]

        def count(event: str, _arguments: object) -> None:
            if event in OPERATIONS:
                operations_left[0] -= 1
                if operations_left[0] == 0:
                    os._exit(KILLED)

        sys.addaudithook(count)
        try:
            save(folder, step, value)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == KILLED


@pytest.mark.parametrize("exchanges_names", [True, False])
@pytest.mark.parametrize("step", [1, 2])
def test_a_run_killed_while_it_saves_keeps_a_whole_checkpoint(tmp_path, monkeypatch, step, exchanges_names):
    """Of the same step as the one before (an epoch that ends where it was saved midway), or of the next."""
    if not exchanges_names:
        monkeypatch.setattr(checkpoint, "exchange", lambda _path, _other: False)
    operation, found = 0, set()
    while True:
        operation += 1
        folder = tmp_path / str(operation)
        save(folder, 1, 1.0)
        was_killed = killed_at(operation, folder, step, 2.0)
        if exchanges_names:  # and not only once the run resumes
            assert newest_intact(folder)[0] is not None
            assert load_tensors(resolve_checkpoint(folder, "last"), "network")
        restore_checkpoints(folder)
        newest, faults = newest_intact(folder)
        assert newest is not None
        assert faults == []
        value = load_tensors(newest, "network")["weight"][0].item()
        assert value == checkpoint.load_progress(newest).epoch
        found.add(value)
        if not was_killed:
            break
    assert operation > 15
    assert found == {1.0, 2.0}
    assert sorted(path.name for path in folder.iterdir()) == ["last", f"step_{step}"]


def test_names_are_exchanged_or_nothing_happens(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").mkdir()
    with pytest.raises(FileNotFoundError):
        atomic_writes.exchange(tmp_path / "a", tmp_path / "c")
    if atomic_writes.exchange(tmp_path / "a", tmp_path / "b"):
        assert (tmp_path / "b").read_text() == "1"
        assert (tmp_path / "a").is_dir()
    monkeypatch.setattr(atomic_writes.ctypes, "CDLL", lambda *_args, **_options: object())
    assert not atomic_writes.exchange(tmp_path / "a", tmp_path / "b")
