"""Cached images give the same batches, are shared, stay within the budget and vanish with their users."""

import errno
import gc
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from cached_images import memory_of_images
from forked_python import forked_python
from helpers import ROOT, succeed_here, wait_for
from launching import SMALL, losses, succeed
from make_sources import make_folder

from data_prep.common.errors import BadInput
from data_prep.shards.folder import ShardFolder
from data_prep.shards.index import index_shard
from data_prep.shards.members import MEMBERS
from data_prep.shards.packing import pack
from data_prep.sources.folder import Folder
from train.data import cache_holders, image_cache
from train.data.free_memory import free_memory
from train.data.image_cache import GIB, ImageCaches
from train.data.loader import TrainLoader, evaluation_loader
from train.data.mapped_file import HUGE_PAGE, MappedFile
from train.data.stimuli import RecordingStimuli
from train.run.recipe import Loader, Recipe, load_recipe, save_recipe

IMAGE = 32 * 32 * 3


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> list[Path]:
    """Two recordings of 50 PNGs each, 30 of them for training."""
    folders = []
    for seed in range(2):
        path = tmp_path_factory.mktemp("packed")
        make_folder(path / "src", n=50, splits=True, seed=seed)
        pack(Folder(source=path / "src").open(), path / "shards", stimuli_per_shard=12, workers=1)
        folders.append(path / "shards")
    return folders


@pytest.fixture
def shards(packed, tmp_path) -> ShardFolder:
    """A fresh copy for every test, so that tests share no cache."""
    return copied(packed[0], tmp_path / "shards")


def copied(folder: Path, to: Path) -> ShardFolder:
    shutil.copytree(folder, to)
    return ShardFolder(to)


def opened(shards, mode="ram", gib=None, **options) -> RecordingStimuli:
    return RecordingStimuli(shards.split("train"), 32, caches=ImageCaches(Loader(cache=mode, cache_gib=gib)), **options)


def loader_of(stimuli, workers=0, rank=0, ranks=1) -> TrainLoader:
    return TrainLoader(stimuli, seed=3, global_size=8, per_device=3, rank=rank, ranks=ranks, workers=workers, pin=False)


def images(loader, epoch=0, first_step=0) -> torch.Tensor:
    """The images of an epoch, in order."""
    return torch.cat([batch.images for step in loader.epoch(epoch, first_step) for batch in step])


def evaluated(stimuli, workers=0, **options) -> torch.Tensor:
    options = {"size": 8, "rank": 0, "ranks": 1, "pin": False} | options
    return torch.cat([batch.images for batch in evaluation_loader(stimuli, workers=workers, **options)])


def destroy(shards) -> None:
    """Overwrite the images in the tars, so that reading one of them fails."""
    png = MEMBERS.index("png")
    for tar in shards.folder.glob("*.tar"):
        status, index, data = tar.stat(), index_shard(tar), bytearray(tar.read_bytes())
        for offset, size in zip(index.offset[:, png], index.size[:, png], strict=True):
            data[offset : offset + size] = bytes(size)
        tar.write_bytes(data)
        os.utime(tar, ns=(status.st_atime_ns, status.st_mtime_ns))


def holders() -> list[str]:
    path = cache_holders._list_path()
    return path.read_text().splitlines() if path.exists() else []


def held_by(shards) -> list[str]:
    key = image_cache.pixel_key(shards.split("train"), 32)
    return [line for line in holders() if line.startswith(key)]


# ---- what is delivered ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode", ["ram", "disk", "auto"])
def test_batches_are_the_same_however_images_are_kept(shards, mode, workers):
    plain, cached = loader_of(opened(shards, "off")), loader_of(opened(shards, mode), workers)
    for epoch, first_step in ((0, 0), (1, 0), (2, 2)):
        assert torch.equal(images(cached, epoch, first_step), images(plain, epoch, first_step))


@pytest.mark.parametrize("small", [True, False])
def test_large_images_are_the_same_in_pages_of_any_size(shards, monkeypatch, small):
    """At 256 px, the 30 images fill two pages of 2 MiB and a part of a third."""
    if small:
        monkeypatch.setattr(MappedFile, "make_huge", lambda file, start: False)
    split = shards.split("train")
    cached, later = (RecordingStimuli(split, 256, caches=ImageCaches(Loader(cache="ram"))) for _ in range(2))
    expected = evaluated(RecordingStimuli(split, 256))
    assert torch.equal(evaluated(cached), expected)
    destroy(shards)
    assert torch.equal(evaluated(later), expected)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_decoded_image_is_never_read_again(shards, ranks):
    """By none of the ranks, nor by a rank that joins later, nor when the epoch's order is another."""
    everyone = [opened(shards) for _ in range(ranks)]
    expected = evaluated(opened(shards, "off"))
    shown = [evaluated(stimuli, rank=rank, ranks=ranks) for rank, stimuli in enumerate(everyone)]
    assert sum(map(len, shown)) >= 30
    destroy(shards)
    for stimuli in (*everyone, opened(shards)):
        assert torch.equal(evaluated(stimuli), expected)
        images(loader_of(stimuli), epoch=5)
    with pytest.raises(BadInput, match="not the bytes that were packed"):
        evaluated(opened(shards, "off"))


def test_workers_fill_what_their_parent_and_its_other_workers_read(shards):
    stimuli = opened(shards)
    expected = evaluated(stimuli, workers=2)
    destroy(shards)
    assert torch.equal(evaluated(stimuli), expected)
    assert torch.equal(evaluated(stimuli, workers=1), expected)


def test_parts_of_a_split_share_its_images(shards):
    caches = ImageCaches(Loader(cache="ram"))
    split = shards.split("train")
    one, other = (RecordingStimuli(split, 32, np.arange(first, 30, 2), caches=caches) for first in (0, 1))
    whole = opened(shards)
    expected = evaluated(opened(shards, "off"))[:30]
    assert torch.equal(evaluated(one)[:15], expected[::2])
    assert torch.equal(evaluated(other)[:15], expected[1::2])
    destroy(shards)
    assert torch.equal(evaluated(whole)[:30], expected)


def test_runs_on_other_data_or_at_another_size_do_not_mix(shards, packed, tmp_path):
    others, copy = copied(packed[1], tmp_path / "other"), copied(packed[0], tmp_path / "copy")
    assert copy.manifest.splits["train"].shards == shards.manifest.splits["train"].shards
    cached = [opened(shards), opened(others), opened(copy)]
    plain = [opened(folder, "off") for folder in (shards, others, copy)]
    shown = [evaluated(stimuli) for stimuli in cached]
    assert not torch.equal(shown[0], shown[1])
    for one, other in zip(shown, plain, strict=True):
        assert torch.equal(one, evaluated(other))
    small, val = (
        RecordingStimuli(shards.split(name), size, caches=ImageCaches(Loader(cache="ram")))
        for name, size in (("train", 16), ("val", 32))
    )
    assert torch.equal(evaluated(small), evaluated(RecordingStimuli(shards.split("train"), 16)))
    assert torch.equal(evaluated(val), evaluated(RecordingStimuli(shards.split("val"), 32)))


def test_a_damaged_image_is_named_and_not_kept(shards):
    tar = shards.folder / "train-000001.tar"
    index, png = index_shard(tar), MEMBERS.index("png")
    data = bytearray(tar.read_bytes())
    data[index.offset[2, png] + index.size[2, png] // 2] ^= 0xFF
    tar.write_bytes(data)
    stimuli = opened(shards)
    for workers in (0, 1, 0):
        with pytest.raises(BadInput, match=rf"{tar}: {index.stimulus_id[2]}\.png: these are not the bytes"):
            evaluated(stimuli, workers)


def test_repacked_shards_are_decoded_again(shards):
    before = opened(shards)
    evaluated(before)
    tar = shards.folder / "train-000000.tar"
    os.utime(tar, ns=(0, 0))
    destroy(shards)
    with pytest.raises(BadInput, match="not the bytes that were packed"):
        evaluated(opened(shards))


# ---- how much is kept ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fit", [0, 1, 17, 30])
def test_as_many_images_as_fit_are_cached_and_one_line_says_so(shards, fit, workers, capfd):
    limited = [opened(shards, gib=(fit * IMAGE + 100) / GIB) for _ in range(2)]
    plain = loader_of(opened(shards, "off"))
    for epoch in range(2):
        for stimuli in limited:
            assert torch.equal(images(loader_of(stimuli, workers), epoch), images(plain, epoch))
    evaluated(limited[1])
    messages = [line for line in capfd.readouterr().err.splitlines() if line.startswith("loader.cache: ")]
    assert len(messages) == (fit < 30)
    assert all(f"{fit} of 30 decoded images of 32 px fit" in line for line in messages)
    assert int(limited[0]._cache._present.sum()) == fit


def test_all_caches_of_a_run_share_its_budget(shards, capfd):
    caches = ImageCaches(Loader(cache="ram", cache_gib=(35 * IMAGE + 100) / GIB))
    train, val = (RecordingStimuli(shards.split(name), 32, caches=caches) for name in ("train", "val"))
    assert train._cache.capacity == 30
    assert val._cache.capacity == 5
    assert "5 of 10 decoded images of 32 px fit" in capfd.readouterr().err


def test_a_full_disk_ends_keeping_and_not_the_run(shards, monkeypatch, capfd):
    write, room = os.pwrite, 12 * IMAGE

    def full(descriptor, data, offset):
        if memoryview(data).nbytes == IMAGE and offset >= HUGE_PAGE + room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    stimuli = opened(shards, "disk")
    assert torch.equal(evaluated(stimuli), evaluated(opened(shards, "off")))
    evaluated(stimuli)
    message = capfd.readouterr().err
    assert message.count("loader.cache:") == 1
    assert "12 decoded images of 32 px are cached, and no more (No space left on device)" in message


def test_no_free_memory_is_reported_and_survived(shards, monkeypatch, capfd):
    def none(mode):
        raise OSError(errno.ENFILE, "Too many open files in system")

    monkeypatch.setattr(image_cache, "_nameless_file", none)
    assert torch.equal(evaluated(opened(shards)), evaluated(opened(shards, "off")))
    assert "decoded images are not cached (Too many open files in system)" in capfd.readouterr().err


def test_auto_keeps_nothing_that_is_read_once(shards):
    split = shards.split("train")
    assert ImageCaches(Loader(), single_pass=True).open(split, 32) is None
    assert ImageCaches(Loader()).open(split, 32) is not None
    assert ImageCaches(Loader(cache="ram"), single_pass=True).open(split, 32) is not None


def test_the_budget_is_at_most_half_of_the_free_memory(monkeypatch):
    monkeypatch.setattr(image_cache, "free_memory", lambda: 10 * GIB)
    assert image_cache._budget("ram", None) == 5 * GIB
    assert image_cache._budget("ram", 2) == 2 * GIB
    assert image_cache._budget("ram", 100) == 9 * GIB


def test_control_groups_limit_memory(tmp_path):
    job = tmp_path / "slurm" / "job_7"
    job.mkdir(parents=True)
    (tmp_path / "own").write_text("0::/slurm/job_7/step_0\n")
    (job / "memory.max").write_text("5000\n")
    (job / "memory.current").write_text("3000\n")
    (job / "memory.stat").write_text("anon 100\ninactive_file 500\n")
    (job.parent / "memory.max").write_text("max\n")
    assert free_memory(tmp_path, tmp_path / "own") == 2500
    (tmp_path / "own").write_text("4:cpu,memory:/job_7\n3:pids:/\n0::/\n")
    old = tmp_path / "memory" / "job_7"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("900\n")
    (old / "memory.usage_in_bytes").write_text("1000\n")
    (old / "memory.stat").write_text("total_inactive_file 50\n")
    assert free_memory(tmp_path, tmp_path / "own") == 0
    assert free_memory(tmp_path / "none", tmp_path / "none") > 2**20


def test_settings_survive_yaml(tmp_path):
    """YAML reads a bare `off` as false."""
    (tmp_path / "by_hand.yaml").write_text("loader: {cache: off}\n")
    assert load_recipe(tmp_path / "by_hand.yaml", Recipe).loader.cache == "off"
    save_recipe(Recipe(loader=Loader(cache="off", cache_gib=1.5)), tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml", Recipe).loader == Loader(cache="off", cache_gib=1.5)


# ---- nothing stays behind ------------------------------------------------------------------------------------------


def test_descriptors_and_memory_stay_flat(shards):
    def used() -> tuple[int, int]:
        gc.collect()  # or what other tests have left would be counted until it is collected
        return len(os.listdir("/proc/self/fd")), len(held_by(shards))

    loader = loader_of(opened(shards), workers=1)
    images(loader)
    before = used()
    for epoch in range(1, 51):
        images(loader, epoch)
    assert used() == before
    del loader
    start = used()
    for _ in range(20):
        evaluated(opened(shards))
    assert used() == start


def test_resident_memory_stays_flat(shards):
    """An epoch delivers 5 MB here: forgotten batches would show."""
    stimuli = RecordingStimuli(shards.split("train"), 256, caches=ImageCaches(Loader(cache="ram")))
    loader = loader_of(stimuli)
    for epoch in range(3):
        images(loader, epoch)
    before = psutil.Process().memory_info().rss
    for epoch in range(3, 53):
        images(loader, epoch)
    assert psutil.Process().memory_info().rss - before < 40e6


# A rank of a run: joins the cache, sees to it that all images are there, and then does as it is told. A worker gets the
# cache in the way in which a DataLoader's workers do, but without torch, which takes seconds to import.
RANK = """
import multiprocessing, os, sys, time
import numpy as np
from data_prep.common.worker_processes import serve_parent
from data_prep.shards.folder import ShardFolder
from train.data.decoding import decode_into
from train.data.image_cache import ImageCaches
from train.run.recipe import Loader

def fill(split, cache):
    for place in range(len(split)):
        image = np.empty((1, 32, 32, 3), np.uint8)
        if len(cache.read(np.array([place]), image)):
            decode_into(image[0], *split.image(place))
            cache.write(place, image[0])

def work(split, cache, done):
    serve_parent()
    fill(split, cache)
    done.set()
    time.sleep(600)

if __name__ == "__main__":
    split, workers, end = ShardFolder(sys.argv[1]).split("train"), int(sys.argv[2]), sys.argv[3]
    cache = ImageCaches(Loader(cache="ram")).open(split, 32)
    context = multiprocessing.get_context("forkserver")
    for _ in range(workers):
        done = context.Event()
        context.Process(target=work, args=(split, cache, done), daemon=True).start()
        done.wait()
    fill(split, cache)
    print(os.getpid(), flush=True)
    sys.stdin.readline()
    if end == "raise":
        raise SystemError("as told")
"""


class Rank:
    """A process as above."""

    def __init__(self, shards, tmp_path, workers, end="leave"):
        script = tmp_path / "rank.py"
        script.write_text(RANK)
        self.process = subprocess.Popen(
            [forked_python(), script, shards.folder, str(workers), end],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def wait_until_ready(self) -> None:
        self.pid = int(self.process.stdout.readline())

    def end(self, sent_signal: int | None) -> None:
        if sent_signal is not None:
            os.kill(self.pid, sent_signal)
        self.process.communicate("\n", timeout=60)


@pytest.mark.skipif(sys.platform != "linux", reason="counts what processes hold in /proc")
@pytest.mark.parametrize(
    ("end", "signals"),
    [
        ("leave", [None, None]),
        ("raise", [None, None]),
        ("leave", [signal.SIGTERM, signal.SIGTERM]),
        ("leave", [signal.SIGKILL, None]),
        ("leave", [signal.SIGKILL, signal.SIGKILL]),
    ],
    ids=["exit", "exception", "SIGTERM", "SIGKILL of one", "SIGKILL of all"],
)
def test_however_ranks_end_their_memory_is_freed_at_once(shards, tmp_path, end, signals):
    ranks = [Rank(shards, tmp_path, workers, end) for workers, _ in enumerate(signals)]
    for rank in ranks:
        rank.wait_until_ready()
    size, holding = memory_of_images(shards)
    assert 30 * IMAGE <= size < 2 * 30 * IMAGE  # kept once, not twice
    assert len(holding) == 3
    assert len(held_by(shards)) == 2
    for rank, sent_signal in zip(ranks, signals, strict=True):
        rank.end(sent_signal)
    wait_for(lambda: memory_of_images(shards) == (0, set()))
    if signal.SIGKILL not in signals and signal.SIGTERM not in signals:
        assert not held_by(shards)
    # What a killed rank could not strike off the list, the next start does.
    del opened(shards)._cache
    assert not held_by(shards)


@pytest.mark.skipif(sys.platform != "linux", reason="counts what processes hold in /proc")
def test_a_killed_worker_costs_nothing(shards, tmp_path):
    rank = Rank(shards, tmp_path, 1)
    rank.wait_until_ready()
    (worker,) = memory_of_images(shards)[1] - {rank.pid}
    os.kill(worker, signal.SIGKILL)
    rank.end(None)
    wait_for(lambda: memory_of_images(shards) == (0, set()))


def test_a_restarted_rank_reuses_the_cache_of_the_others(shards, tmp_path):
    first, second = Rank(shards, tmp_path, 0), Rank(shards, tmp_path, 0)
    first.wait_until_ready()
    second.wait_until_ready()
    first.end(signal.SIGKILL)
    destroy(shards)
    third = Rank(shards, tmp_path, 0)
    third.wait_until_ready()
    for rank in (second, third):
        rank.end(None)


def test_a_corrupt_or_foreign_cache_list_is_harmless(shards, monkeypatch, tmp_path):
    path = tmp_path / "list"
    monkeypatch.setattr(cache_holders, "_list_path", lambda: path)
    path.write_bytes(b"\xff\0 nonsense\n" + b"a" * 64 + b" 1 0\n" + b"b" * 64 + b" 99999")
    stimuli = opened(shards)
    assert len(path.read_text().splitlines()) == 1
    expected = evaluated(stimuli)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert torch.equal(evaluated(opened(shards)), expected)


# ---- whole runs ----------------------------------------------------------------------------------------------------


def test_a_run_scores_the_same_with_and_without(recording, tmp_path):
    """On two processes, which share the images; resumed on one with another setting, it goes on."""
    runs = {}
    for mode in ("off", "ram"):
        runs[mode] = tmp_path / mode
        command = ["train/finetune.py", "--data", recording, "--out", runs[mode], *SMALL]
        succeed(2, *command, "--loader.cache", mode)
    assert losses(runs["off"]) == losses(runs["ram"])
    resume = ["train/finetune.py", "--data", recording, "--out", runs["ram"], *SMALL, "--resume"]
    succeed_here(*resume, "--loader.cache", "disk", "--loader.cache-gib", "0.1")
