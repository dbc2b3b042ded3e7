"""However a rank ends, its workers, shared memory and cached images are gone."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from cached_images import memory_of_images
from forked_python import forked_python
from helpers import ROOT, wait_for
from make_sources import make_folder

from data_prep.shards.folder import ShardFolder
from data_prep.shards.packing import pack
from data_prep.sources.folder import Folder
from train.data.image_cache import ImageCaches
from train.data.loader import TrainLoader
from train.data.stimuli import RecordingStimuli
from train.run.recipe import Loader

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at what processes hold in /proc")

# Holds a batch that lies in shared memory, waits, goes on for ever where nobody stops it, or does as it is told.
RANK = """
import os, sys
from data_prep.common.errors import run_command
from data_prep.shards.folder import ShardFolder
from train.data.loader import TrainLoader
from train.data.stimuli import RecordingStimuli
from train.data.image_cache import ImageCaches
from train.run.recipe import Loader

def main():
    stimuli = RecordingStimuli(ShardFolder(sys.argv[1]).split("train"), 32, caches=ImageCaches(Loader(cache="ram")))
    loader = TrainLoader(stimuli, seed=0, global_size=4, per_device=None, rank=0, ranks=1, workers=2, pin=False)
    steps = loader.epoch(0)
    held = next(steps)
    print(os.getpid(), flush=True)
    told = sys.stdin.readline().strip()
    for epoch in range(1, 2 if told == "leave" else 10**9):
        if told == "raise":
            raise SystemError("as told")
        for held in loader.epoch(epoch):
            pass

if __name__ == "__main__":
    run_command(main, on_ranks=True)
"""

ENDS = {
    "exit": ("leave", None, 0),
    "exception": ("raise", None, 1),
    "SIGTERM": ("go on", signal.SIGTERM, -signal.SIGTERM),
    "SIGKILL": ("go on", signal.SIGKILL, -signal.SIGKILL),
    "SIGKILL of a worker": ("go on", None, 1),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardFolder:
    path = tmp_path_factory.mktemp("leaks")
    make_folder(path / "src", n=40, splits=True)
    return pack(Folder(source=path / "src").open(), path / "shards", stimuli_per_shard=12, workers=1)


@pytest.fixture(scope="module")
def ranks(shards, tmp_path_factory) -> dict[str, SimpleNamespace]:
    """One working rank per way to end, each with two workers, all sharing the cached images."""
    script = tmp_path_factory.mktemp("rank") / "rank.py"
    script.write_text(RANK)
    started = {}
    for end in ENDS:
        process = subprocess.Popen(
            [forked_python(), script, shards.folder],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started[end] = SimpleNamespace(process=process)
    for rank in started.values():
        rank.pid = int(rank.process.stdout.readline())
        rank.helpers = psutil.Process(rank.pid).children(recursive=True)
    return started


def workers_of(rank) -> list[psutil.Process]:
    """The worker processes of a rank, recognised by the cached images they share with it."""
    return [
        helper
        for helper in rank.helpers
        if any("spiketune-images" in os.readlink(file) for file in Path(f"/proc/{helper.pid}/fd").iterdir())
    ]


def segments_of(rank) -> list[str]:
    """Named segments of shared memory, which outlive their process."""
    pids = {str(pid) for pid in (rank.pid, *(helper.pid for helper in rank.helpers))}
    return [path.name for path in Path("/dev/shm").iterdir() if pids & set(path.name.split("_"))]


@pytest.mark.parametrize("end", ENDS)
def test_nothing_of_a_rank_is_left(shards, ranks, end):
    rank, (instruction, sent_signal, code) = ranks[end], ENDS[end]
    pid = rank.pid
    workers = workers_of(rank)
    assert len(workers) == 2
    assert "/torch_" in Path(f"/proc/{pid}/maps").read_text()  # the batch it holds
    rank.process.stdin.write(f"{instruction}\n")
    rank.process.stdin.flush()
    if sent_signal is not None:
        os.kill(pid, sent_signal)
    if "worker" in end:
        workers[0].kill()
    _, errors = rank.process.communicate(timeout=60)
    assert rank.process.returncode == code
    wait_for(lambda: not any(helper.is_running() for helper in rank.helpers))
    assert segments_of(rank) == []
    assert pid not in memory_of_images(shards)[1]
    if "worker" in end:
        assert errors.startswith("error: a decoding process was killed")
        assert len(errors.splitlines()) == 1


def test_when_all_have_ended_their_images_are_freed(shards, ranks):
    for rank in ranks.values():
        rank.process.kill()
        rank.process.wait()
    wait_for(lambda: memory_of_images(shards) == (0, set()))


def test_epochs_with_workers_leave_memory_and_descriptors_flat(shards):
    stimuli = RecordingStimuli(shards.split("train"), 256, caches=ImageCaches(Loader(cache="ram")))
    loader = TrainLoader(stimuli, seed=0, global_size=4, per_device=None, rank=0, ranks=1, workers=2, pin=False)

    def after(epochs: range) -> tuple[int, int]:
        for epoch in epochs:
            for _ in loader.epoch(epoch):
                pass
        this = psutil.Process()
        family = [this, *this.children(recursive=True)]
        return sum(process.memory_full_info().uss for process in family), sum(process.num_fds() for process in family)

    memory, descriptors = after(range(10))
    memory_later, descriptors_later = after(range(10, 60))
    assert descriptors_later - descriptors < 20  # batches under way; an epoch has six, each with one
    assert memory_later - memory < 80e6  # 50 epochs deliver 236 MB
