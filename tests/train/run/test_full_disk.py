"""On a full or read-only disk a run says so, and its files stay intact."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from helpers import run_here, succeed_here
from launching import SMALL, STOP_WHILE_SCORING, largest_difference, losses, run_patched, weights

from data_prep.common.errors import FAILURE, STOPPED
from train.run.checkpoint import newest_intact
from train.run.folder import RunFolder

PAGE = 4096


def mount(*words) -> None:
    subprocess.run(["mount", *map(str, words)], check=True, capture_output=True)


@contextmanager
def mounted(place: Path, *words) -> Iterator[None]:
    """Mount something on a path while the block runs."""
    mount(*words, place)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def small_disk(place: Path, size: int):
    """A disk of this size in bytes."""
    place.mkdir(exist_ok=True)
    return mounted(place, "-t", "tmpfs", "-o", f"size={size}", "none")


def fill(folder: Path) -> None:
    """Write until nothing more fits."""
    with suppress(OSError), (folder / "rubbish").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(PAGE))


@pytest.fixture(scope="module", autouse=True)
def _may_mount(tmp_path_factory):
    try:
        with small_disk(tmp_path_factory.mktemp("disk"), PAGE):
            pass
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"disks cannot be mounted here ({error})")


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def assert_ended_in_a_sentence(done, *words: str) -> None:
    assert done.returncode == FAILURE, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for word in words:
        assert word in error


def assert_goes_on(run: Path, trained: Path) -> None:
    """The run resumes from its newest, intact checkpoint and ends like an undisturbed one."""
    checkpoint, faults = newest_intact(run / "checkpoints")
    assert checkpoint is not None
    assert faults == []
    assert not list((run / "checkpoints").glob(".step_*"))
    succeed_here("train/finetune.py", "--data", *RunFolder(run).data_folders(), "--out", run, "--resume")
    assert losses(run) == losses(trained)
    assert largest_difference(weights(run), weights(trained)) == 0


def test_a_checkpoint_that_does_not_fit_on_the_disk(recording, trained, tmp_path):
    room = int(1.5 * bytes_of(trained / "checkpoints" / "last")) + 2**18
    disk = tmp_path / "disk"
    with small_disk(disk, room):
        done = run_here("train/finetune.py", "--data", recording, "--out", disk / "run", *SMALL)
        assert_ended_in_a_sentence(done, "checkpoint step_", "No space left on device", "earlier ones are kept")
        mount("-o", f"remount,size={4 * room}", disk)
        assert_goes_on(disk / "run", trained)


# The disk is changed just before something of the second epoch is written.
LOG, CHECKPOINT = ("EpochLog.epoch", "self._progress"), ("CheckpointWriter.save", "args[0]")  # method, its progress
BREAK_DISK_BEFORE = """
import subprocess
write = module.{method}
def break_disk_and_write(self, *args):
    if {progress}.epoch == 2:
        subprocess.run({command}, shell=True)
    return write(self, *args)
module.{method} = break_disk_and_write
"""


# On a full disk a line more still fits into the last block of a file that is there.
@pytest.mark.parametrize(
    ("fault", "before", "words"),
    [
        ("full", LOG, ("cannot be saved", "No space left on device")),
        ("read-only", LOG, ("history.jsonl cannot be written", "Read-only file system")),
        ("read-only", CHECKPOINT, ("cannot be saved", "Read-only file system")),
    ],
)
def test_a_disk_that_is_full_or_read_only_ends_the_run_in_a_sentence(
    recording, trained, tmp_path, fault, before, words
):
    disk = tmp_path / "disk"
    run = disk / "run"
    commands = {
        "full": (f"cat /dev/zero > {disk}/rubbish", f"rm {disk}/rubbish"),
        "read-only": (f"mount --bind {run} {run} && mount -o remount,bind,ro {run}", f"umount --lazy {run}"),
    }
    break_it, mend_it = commands[fault]
    with small_disk(disk, 2**26):
        patch = BREAK_DISK_BEFORE.format(method=before[0], progress=before[1], command=repr(break_it))
        done = run_patched("finetuning.loop", patch, "--data", recording, "--out", run, *SMALL)
        subprocess.run(mend_it, shell=True, check=True)
        assert_ended_in_a_sentence(done, *words)
        assert_goes_on(run, trained)


def test_charts_and_log_that_cannot_be_written_do_not_end_a_run(recording, trained, tmp_path):
    run, disk = tmp_path / "run", tmp_path / "disk"
    options = ["--data", recording, "--out", run]
    assert run_patched("finetuning.selection_scoring", STOP_WHILE_SCORING, *options, *SMALL).returncode == STOPPED
    with small_disk(disk, 16 * PAGE):
        (disk / "log.txt").write_bytes(bytes(PAGE))
        (disk / "tensorboard").mkdir()
        (run / "tensorboard").mkdir()  # as in runs of earlier versions, which continue there
        fill(disk)
        with (
            mounted(run / "log.txt", "--bind", disk / "log.txt"),
            mounted(run / "tensorboard", "--bind", disk / "tensorboard"),
        ):
            done = run_here("train/finetune.py", *options, "--resume")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count("cannot be written (No space left on device); continuing without charts") == 1
    assert done.stderr.count("log.txt cannot be written") == 1
    assert losses(run) == losses(trained)
    assert largest_difference(weights(run), weights(trained)) == 0
