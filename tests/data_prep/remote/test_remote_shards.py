"""Shards behind a URL: the same batches as from a folder, whatever the network does, within the room there is."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT, assert_refused, run_here
from launching import SMALL, kill_after_an_epoch, launch, losses
from make_sources import make_folder
from web_server import serve

from data_prep.common.errors import BadInput, RunFailed
from data_prep.remote import cache as shard_cache
from data_prep.remote import transport
from data_prep.remote.cache import GIB, FetchSettings
from data_prep.remote.url import (
    SIGNED,
    FolderUrl,
    move_secrets_to_environment,
    parse_location,
    public_location,
    without_secrets,
)
from data_prep.shards import remote_files
from data_prep.shards.folder import ShardFolder
from data_prep.shards.packing import pack
from data_prep.sources.folder import Folder
from train.data.image_cache import ImageCaches
from train.data.loader import TrainLoader, evaluation_loader
from train.data.recordings import Recordings
from train.data.stimuli import RecordingStimuli
from train.finetuning.data_notes import notes_on_remote_shards
from train.finetuning.preparation import training_stimuli
from train.run.checkpoint import load_progress
from train.run.recipe import Loader, Recipe

SHOW = "data_prep/show.py"


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """100 PNGs, 60 of them for training, in shards of 6."""
    path = tmp_path_factory.mktemp("packed")
    made = make_folder(path / "src", n=100, splits=True)
    made.rates[::7, 2] = np.nan
    np.save(path / "src" / "rates.npy", made.rates)
    pack(Folder(source=path / "src").open(), path / "shards", stimuli_per_shard=6, workers=1)
    return path / "shards"


@pytest.fixture
def web(packed):
    with serve(packed) as server:
        yield server


@pytest.fixture(autouse=True)
def impatient(monkeypatch, tmp_path):
    """Pauses of milliseconds; copies go to a folder of the test's own."""
    monkeypatch.setattr(remote_files, "RETRIES", replace(remote_files.RETRIES, first_pause=0.01))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(SIGNED, raising=False)


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def opened(url, cache: Path, gib: float | None = None, timeout: float = 5.0) -> ShardFolder:
    return ShardFolder(url, FetchSettings(cache, gib, timeout))


def loader_of(shards: ShardFolder, rank=0, ranks=1, workers=0, block_shards=None, **options) -> TrainLoader:
    stimuli = RecordingStimuli(shards.split("train"), 32, **options)
    common = {"seed": 3, "global_size": 8, "per_device": None, "workers": workers, "pin": False}
    return TrainLoader(stimuli, rank=rank, ranks=ranks, block_shards=block_shards, **common)


def read(loader: TrainLoader, epoch: int = 0, first_step: int = 0) -> list[tuple[torch.Tensor, ...]]:
    steps = loader.epoch(epoch, first_step)
    return [(batch.positions, batch.images.clone(), batch.rates.nan_to_num(-1)) for step in steps for batch in step]


def assert_same(one: list, other: list) -> None:
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def train_shard(shards: ShardFolder, number: int = 0):
    return shards.manifest.splits["train"].shards[number]


def fetch(shards: ShardFolder, number: int = 0) -> bytes:
    """All bytes of a train shard."""
    with shards.split("train").files.local(train_shard(shards, number)) as path:
        return path.read_bytes()


def kept(cache: Path) -> dict[str, int]:
    """The files in a cache and their sizes."""
    return {path.name: path.stat().st_size for path in cache.iterdir() if path.name != "lock"}


# ---- what is delivered ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("block_shards", [None, 3])
def test_batches_are_those_of_the_folder(web, packed, cache, workers, block_shards):
    near, far = ShardFolder(packed), opened(web.url, cache)
    for rank in range(2):
        local = loader_of(near, rank, 2, block_shards=block_shards)
        distant = loader_of(far, rank, 2, workers, block_shards)
        for epoch, first_step in ((0, 0), (1, 3)):
            assert_same(read(distant, epoch, first_step), read(local, epoch, first_step))
    assert far.split("val").labels().tolist() == near.split("val").labels().tolist()
    assert [far.split("train").meta(i) for i in range(60)] == [near.split("train").meta(i) for i in range(60)]
    assert set(web.times().values()) == {1}


def test_opening_fetches_tables_and_no_shard(web, cache):
    shards = opened(web.url, cache)
    assert shards.split("train").rates().shape == (60, 10)
    shards.split("train").labels()
    assert sorted(file for file, _ in web.asked) == ["index.npz", "manifest.json", "targets.npz"]


def test_a_folder_without_a_table_of_responses_is_read_shard_by_shard(packed, tmp_path, cache):
    shutil.copytree(packed, tmp_path / "old")
    manifest = json.loads((tmp_path / "old" / "manifest.json").read_text())
    del manifest["files"], manifest["checksum"]
    (tmp_path / "old" / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "old" / "targets.npz").unlink()
    with serve(tmp_path / "old") as web:
        far = opened(web.url, cache)
        assert np.array_equal(far.split("train").rates(), ShardFolder(packed).split("train").rates(), equal_nan=True)
        assert not far.has_response_table
        assert_same(read(loader_of(far)), read(loader_of(ShardFolder(packed))))


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_other_urls_are_read_through_fsspec(packed, cache, scheme):
    url = packed.as_uri()
    if scheme == "memory":
        url = f"memory://bucket/{cache.parent.name}"
        fsspec.filesystem("memory").put(str(packed), url, recursive=True)
    assert_same(read(loader_of(opened(url, cache))), read(loader_of(ShardFolder(packed))))
    assert cache.exists() == (scheme == "memory")


def test_parts_that_fsspec_gives_are_put_together(packed, cache, monkeypatch):
    monkeypatch.setattr(transport, "PART", 1000)
    fsspec.filesystem("memory").put(str(packed), "memory://bucket/parts", recursive=True)
    assert fetch(opened("memory://bucket/parts", cache)) == (packed / "train-000000.tar").read_bytes()


def test_kept_images_need_no_shard(web, cache):
    shards = opened(web.url, cache)
    loader = loader_of(shards, caches=ImageCaches(Loader(cache="ram")))
    before = [read(loader, epoch) for epoch in range(2)]
    shutil.rmtree(cache)
    asked = len(web.asked)
    assert_same(read(loader, 1), before[1])
    assert len(web.asked) == asked


# ---- what networks do ----------------------------------------------------------------------------------------------


def test_a_cut_connection_goes_on_where_it_stopped(web, packed, cache):
    web.faults["train-000000.tar"].extend([("cut", 5000), ("cut", 0), ("cut", 7000)])
    assert fetch(opened(web.url, cache)) == (packed / "train-000000.tar").read_bytes()
    ranges = [asked for file, asked in web.asked if file == "train-000000.tar"]
    assert ranges == [None, "bytes=5000-", "bytes=5000-", "bytes=12000-"]


def test_a_server_that_knows_no_ranges_sends_everything_again(web, packed, cache):
    web.ranges = False
    web.faults["train-000000.tar"].extend([("cut", 5000), ("cut", 9000)])
    assert fetch(opened(web.url, cache)) == (packed / "train-000000.tar").read_bytes()
    assert web.times()["train-000000.tar"] == 3


@pytest.mark.parametrize(
    "fault", [("status", 503), ("status", 429), ("slow", 1.0), ("drip", 0.05), ("wrong",)], ids=str
)
def test_what_may_go_better_the_next_time_is_tried_again(web, packed, cache, fault):
    for file in ("manifest.json", "index.npz", "train-000000.tar"):
        if fault != ("wrong",) or file != "manifest.json":  # nothing tells what its bytes should be
            web.faults[file].append(fault)
    shards = opened(web.url, cache, timeout=0.3)
    assert fetch(shards) == (packed / "train-000000.tar").read_bytes()
    assert web.times()["train-000000.tar"] == 2


def test_wrong_bytes_are_never_used(web, cache):
    web.always["train-000003.tar"] = ("wrong",)
    shards = opened(web.url, cache)
    shard = train_shard(shards, 3)
    with pytest.raises(BadInput) as caught:
        fetch(shards, 3)
    message = str(caught.value)
    assert f"{web.url}/train-000003.tar" in message
    assert shard.sha256 in message
    assert "\n" not in message
    assert web.times()["train-000003.tar"] == remote_files.RETRIES.wrong_limit + 1
    assert not any(name.startswith(shard.sha256) for name in kept(cache))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_reader_of_wrong_bytes_is_told(web, cache, workers):
    web.always["train-000003.tar"] = ("wrong",)
    with pytest.raises(BadInput, match=r"train-000003\.tar: these are not the bytes that were packed"):
        read(loader_of(opened(web.url, cache), workers=workers))


@pytest.mark.parametrize("change", [-1000, 1000])
def test_a_file_of_another_length_is_refused(packed, tmp_path, cache, change):
    shutil.copytree(packed, tmp_path / "copy")
    tar = tmp_path / "copy" / "train-000000.tar"
    with serve(tmp_path / "copy") as web:
        shards = opened(web.url, cache)
        os.truncate(tar, tar.stat().st_size + change)
        with pytest.raises(BadInput, match=train_shard(shards).sha256):
            fetch(shards)


def test_a_network_that_stays_down_ends_in_one_sentence(web, cache):
    shards = opened(web.url, cache)
    web.always["train-000000.tar"] = ("cut", 0)
    with pytest.raises(
        RunFailed, match=rf"{web.url}/train-000000\.tar cannot be fetched .*0 of [\d,]+ bytes .*5 attempts"
    ):
        fetch(shards)


def test_a_run_of_cuts_is_outlasted_as_long_as_something_comes(web, packed, cache, monkeypatch):
    monkeypatch.setattr(remote_files, "RETRIES", replace(remote_files.RETRIES, worthwhile=500))
    web.always["train-000000.tar"] = ("cut", 1000)
    shards = opened(web.url, cache)
    assert fetch(shards) == (packed / "train-000000.tar").read_bytes()
    assert web.times()["train-000000.tar"] > remote_files.RETRIES.limit + 1


def test_a_page_in_place_of_a_manifest_is_refused(web, cache):
    web.always["manifest.json"] = ("html",)
    with pytest.raises(BadInput, match=rf"{web.url}/manifest\.json: "):
        opened(web.url, cache)


# ---- copies --------------------------------------------------------------------------------------------------------

READER = """
import sys
from pathlib import Path
from data_prep.remote.cache import FetchSettings
from data_prep.shards.folder import ShardFolder
split = ShardFolder(sys.argv[1], FetchSettings(Path(sys.argv[2]), float(sys.argv[3]))).split("train")
for position in range(len(split)):
    split.image(position)
"""


def start_reader(url: str, cache: Path, gib: float = 1.0) -> subprocess.Popen:
    words = [sys.executable, "-c", READER, url, str(cache), str(gib)]
    return subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def test_processes_fetch_each_shard_once(web, cache):
    web.pace = 0.005
    readers = [start_reader(web.url, cache) for _ in range(3)]
    assert [(reader.wait(60), reader.stderr.read()) for reader in readers] == [(0, "")] * 3
    assert set(web.times().values()) == {1}
    assert len(web.times()) == 10


def wait_for(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_a_killed_process_has_begun_is_taken_up(web, packed, cache):
    shards = opened(web.url, cache)
    shard = train_shard(shards)
    part = cache / f"{shard.sha256}-{shard.bytes}.part"
    web.pace = 0.1
    reader = start_reader(web.url, cache)
    wait_for(lambda: part.exists() and part.stat().st_size > 4096)
    reader.send_signal(signal.SIGKILL)
    reader.wait()
    web.pace, before = 0.0, len(web.asked)
    assert fetch(shards) == (packed / "train-000000.tar").read_bytes()
    ((_, asked),) = [request for request in web.asked[before:] if request[0] == "train-000000.tar"]
    assert int(asked.removeprefix("bytes=").rstrip("-")) > 4096
    assert not any(name.endswith("part") for name in kept(cache))


@pytest.mark.parametrize("content", [b"", b"not the beginning of it", bytes(10**6)], ids=len)
def test_a_strange_beginning_does_not_deceive(web, packed, cache, content):
    shards = opened(web.url, cache)
    shard = train_shard(shards)
    (cache / f"{shard.sha256}-{shard.bytes}.part").write_bytes(content)
    assert fetch(shards) == (packed / "train-000000.tar").read_bytes()


def test_copies_stay_within_their_budget_and_those_used_last_remain(web, packed, cache):
    size = max(path.stat().st_size for path in packed.glob("*.tar"))
    shards = opened(web.url, cache, 3.9 * size / GIB)
    for number in range(6):
        fetch(shards, number)
        fetch(shards, 0)
        assert sum(kept(cache).values()) <= 3.9 * size
    assert web.times()["train-000000.tar"] == 1
    assert f"{train_shard(shards, 5).sha256}-{train_shard(shards, 5).bytes}" in kept(cache)
    assert f"{train_shard(shards, 1).sha256}-{train_shard(shards, 1).bytes}" not in kept(cache)


def test_a_copy_in_use_is_not_given_up_and_who_needs_its_room_waits(web, packed, cache):
    size = max(path.stat().st_size for path in packed.glob("*.tar"))
    shards = opened(web.url, cache, 1.5 * size / GIB)
    files = shards.split("train").files
    with files.local(train_shard(shards, 0)) as path:
        waiting = threading.Thread(target=fetch, args=(shards, 1))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        assert path.read_bytes() == (packed / "train-000000.tar").read_bytes()
    waiting.join(10)
    assert not waiting.is_alive()
    assert not path.exists()


def test_many_readers_of_a_small_cache_do_not_stop_each_other(web, packed, cache):
    size = max(path.stat().st_size for path in packed.glob("*.tar"))
    readers = [start_reader(web.url, cache, 1.2 * size / GIB) for _ in range(3)]
    assert [(reader.wait(60), reader.stderr.read()) for reader in readers] == [(0, "")] * 3
    assert sum(kept(cache).values()) <= 1.2 * size


def test_a_shard_that_never_fits_is_refused_at_once(web, cache):
    with pytest.raises(BadInput, match=r"train-\d+\.tar has .* GiB, more than .* loader\.shard_cache_gib"):
        opened(web.url, cache, 1e-6)


def test_a_full_disk_is_told(web, cache, monkeypatch):
    shards = opened(web.url, cache)
    usage = shutil.disk_usage(cache)
    monkeypatch.setattr(shard_cache.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(BadInput, match=rf"{cache}: no space for {web.url}/train-000000\.tar .*loader\.shard_cache"):
        fetch(shards)
    assert not any(name.endswith("part") for name in kept(cache))


def test_a_cache_that_cannot_be_written_is_told(web, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"file/cache: remote shards cannot be kept there .*loader\.shard_cache"):
        opened(web.url, tmp_path / "file" / "cache")


def test_the_same_shard_from_two_places_is_kept_once(web, packed, cache):
    with serve(packed) as other:
        fetch(opened(web.url, cache))
        fetch(opened(other.url, cache))
        assert not other.times()


# ---- ahead of the reader -------------------------------------------------------------------------------------------


def test_the_order_by_blocks_fetches_each_shard_once_an_epoch(web, packed, cache):
    """Though no more than five of its ten shards are ever kept."""
    size = max(path.stat().st_size for path in packed.glob("train-*.tar"))
    loader = loader_of(opened(web.url, cache, 5.2 * size / GIB), block_shards=3)
    local = loader_of(ShardFolder(packed), block_shards=3)
    for epoch in range(3):
        assert_same(read(loader, epoch), read(local, epoch))
        times = web.times()
        assert sum(times.values()) <= 10 * (epoch + 1)
        assert max(times.values()) <= epoch + 1
        assert sum(kept(cache).values()) <= 5.2 * size


def test_shards_are_there_before_they_are_needed(web, cache):
    loader = loader_of(opened(web.url, cache), block_shards=1)
    steps = loader.epoch(0)
    next(steps)
    wait_for(lambda: len(web.times()) == 10)
    asked = len(web.asked)
    list(steps)
    assert len(web.asked) == asked


def test_fetching_ahead_ends_with_the_reader(web, cache):
    web.pace = 0.02
    steps = loader_of(opened(web.url, cache), block_shards=1).epoch(0)
    next(steps)
    steps.close()
    time.sleep(0.3)
    asked = len(web.asked)
    time.sleep(0.5)
    assert len(web.asked) == asked < 13


def test_an_evaluation_reads_each_shard_once_however_little_is_kept(web, packed, cache):
    size = max(path.stat().st_size for path in packed.glob("*.tar"))
    stimuli = RecordingStimuli(opened(web.url, cache, 2.5 * size / GIB).split("train"), 32)
    list(evaluation_loader(stimuli, size=7, rank=0, ranks=1, workers=0, pin=False))
    assert sorted(web.times().values()) == [1] * 10


def test_a_run_is_told_that_its_order_does_not_fit(web, packed, cache):
    size = max(path.stat().st_size for path in packed.glob("*.tar"))
    small, large = (opened(web.url, cache, shards * size / GIB) for shards in (5, 11))
    (note,) = notes_on_remote_shards([small], Loader())
    assert "loader.order shuffled needs" in note
    assert "loader.order blocks" in note
    (note,) = notes_on_remote_shards([small], Loader(order="blocks", block_shards=5))
    assert "lower loader.block_shards" in note
    assert (
        notes_on_remote_shards([small], Loader(order="blocks", block_shards=4))
        == notes_on_remote_shards([large], Loader())
        == []
    )
    assert notes_on_remote_shards([ShardFolder(packed)], Loader()) == []


def test_the_inner_part_is_read_once_where_all_images_do_not_fit(web, cache):
    """Under order blocks: it lies in all shards, and memory holds it and little more."""
    settings = {"order": "blocks", "block_shards": 2, "shard_cache": str(cache), "cache": "ram"}
    recipe = Recipe.model_validate({"loader": settings | {"cache_gib": 9 * 32 * 32 * 3 / GIB}, "images": {"size": 32}})
    recordings = Recordings([opened(web.url, cache)])
    divided = recordings.divide(recipe)
    fit, inner = training_stimuli(recordings, divided, recipe)
    assert (len(fit), len(inner)) == (54, 6)
    plain = training_stimuli(recordings, divided, recipe.model_copy(update={"loader": Loader(cache="off")}))
    images = []
    for stimuli in (inner, inner, plain[1]):
        if stimuli is inner and images:
            shutil.rmtree(cache)
            asked = len(web.asked)
        batches = evaluation_loader(stimuli, size=4, rank=0, ranks=1, workers=0, pin=False)
        images.append(torch.cat([batch.images.clone() for batch in batches]))
        if len(images) == 2:
            assert len(web.asked) == asked
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])


# ---- refusals ------------------------------------------------------------------------------------------------------


def show(url: str, cache: Path, *words):
    return run_here(SHOW, url, "--shard-cache", cache, "--contact-sheet", cache.parent / "sheet.png", *words)


def test_show_prints_verifies_and_draws(web, packed, cache):
    done = show(web.url, cache, "--verify")
    assert done.returncode == 0, done.stderr
    assert "verified: all 18 shards are as they were packed" in done.stdout
    assert f"in {web.url}" in done.stdout
    assert "contact sheet of train-000000.tar" in done.stdout
    web.always["val-000001.tar"] = ("wrong",)
    shutil.rmtree(cache)
    done = show(web.url, cache, "--verify")
    assert_refused(done, "1 of 18 shards")
    assert f"{web.url}/val-000001.tar" in done.stderr


def test_the_contact_sheet_needs_a_single_shard(web, cache):
    assert show(web.url, cache).returncode == 0
    assert web.times() == {"train-000000.tar": 1}


REFUSED = {
    "nothing there": ("{url}/elsewhere", ("manifest.json does not exist (HTTP 404)",)),
    "no driver": ("s3://bucket/folder", ("s3://bucket/folder", "s3fs", "pip install s3fs")),
    "no driver for Google's": ("gs://bucket/folder", ("pip install gcsfs",)),
    "unknown": ("htp://host/folder", ("htp:// is not known",)),
    "no host": ("https:///folder", ("names no host",)),
    "chained": ("simplecache::s3://bucket/folder", ("chained",)),
    "nobody there": ("http://127.0.0.1:9/folder", ("127.0.0.1:9/folder/manifest.json cannot be read", "refused")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_url_that_cannot_be_read_is_refused_in_a_sentence(packed, tmp_path, cache, case):
    (tmp_path / "empty").mkdir()
    url, words = REFUSED[case]
    with serve(tmp_path / "empty") as web:
        assert_refused(show(url.format(url=web.url), cache), *words)


def test_tars_of_others_are_refused_behind_a_url(packed, tmp_path, cache):
    """They have no manifest that would tell what to fetch, and to derive one all of them would have to be read."""
    for tar in packed.glob("*.tar"):
        (tmp_path / "tars" / tar.name).parent.mkdir(exist_ok=True)
        shutil.copy(tar, tmp_path / "tars")
    assert len(ShardFolder(tmp_path / "tars").split("train")) == 60
    with serve(tmp_path / "tars") as web:
        assert_refused(show(web.url, cache), f"{web.url}/manifest.json does not exist", "of other origin")


def test_tables_that_were_made_anew_are_those_that_are_fetched(packed, tmp_path, cache):
    """The manifest tells their hashes, so that it has to follow them."""
    folder = tmp_path / "copy"
    shutil.copytree(packed, folder)
    (folder / "index.npz").unlink()
    (folder / "targets.npz").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"files": {}, "checksum": None}))
    assert run_here(SHOW, folder, "--index").returncode == 0
    for file in ("index.npz", "targets.npz", "manifest.json"):
        assert (folder / file).read_bytes() == (packed / file).read_bytes()
    with serve(folder) as web:
        assert_same(read(loader_of(opened(web.url, cache))), read(loader_of(ShardFolder(packed))))
        assert_refused(show(web.url, cache, "--index"), web.url, "where they lie")


def test_the_streaming_engine_is_for_folders_of_this_machine(web, tmp_path):
    stream = ["--loader.engine", "webdataset"]
    refused = run_here("train/finetune.py", "--out", tmp_path / "out", *SMALL, *stream, "--data", web.url)
    assert_refused(refused, "loader.engine", web.url, "blocks")
    blocks = ["--loader.order", "blocks"]
    refused = run_here("train/finetune.py", "--out", tmp_path / "out", *SMALL, *stream, *blocks, "--data", web.url)
    assert_refused(refused, "loader.order (blocks)", "loader.engine indexed")


@pytest.mark.parametrize("status", [401, 403])
def test_no_permission_is_told_and_not_asked_for_again(web, cache, status):
    web.always["manifest.json"] = ("status", status)
    assert_refused(show(web.url, cache), f"{web.url}/manifest.json cannot be read: permission denied", str(status))
    assert len(web.asked) == 1


COMMANDS = {
    "finetune": ["train/finetune.py", "--out", "OUT", *SMALL],
    "probe": ["train/probe.py", "--out", "OUT", "--layers", "pixels"],
    "sweep": ["train/sweep.py", "train/recipes/sweeps/lr_x_optimizer.yaml", "--out", "OUT"],
    "plan": ["train/plan.py", "--gpus", "1", "--memory", "8"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_a_url_and_says_what_is_wrong_with_it(web, tmp_path, command):
    web.always["manifest.json"] = ("status", 404)
    words = [tmp_path / "out" if word == "OUT" else word for word in COMMANDS[command]]
    assert_refused(run_here(*words, "--data", web.url), f"{web.url}/manifest.json does not exist")
    assert not (tmp_path / "out").exists()


# ---- secrets -------------------------------------------------------------------------------------------------------


def test_secrets_are_asked_for_and_never_shown(web, packed, cache):
    web.authorization = f"Basic {base64.b64encode(b'me:pass/word').decode()}"
    web.query = "signature=hush&expires=1"
    url = web.url.replace("://", "://me:pass%2Fword@") + "/?signature=hush&expires=1"
    shards = opened(url, cache)
    assert fetch(shards) == (packed / "train-000000.tar").read_bytes()
    web.query = "another"
    assert repr(shards.folder) == "FolderUrl()"
    for thing in (
        str(shards.folder),
        shards.folder / "x.tar",
        public_location(url),
        *without_secrets([url, f"--data={url}"]),
    ):
        assert web.url in thing
        assert not any(secret in thing for secret in ("me:", "pass", "hush"))
    with pytest.raises(BadInput, match="permission denied") as caught:
        fetch(shards, 1)
    assert "hush" not in str(caught.value)
    assert FolderUrl(url).hide(f"cannot read {url}/x: hush?") == f"cannot read {FolderUrl(url).hide(url)}/x: hush?"
    assert "hush" not in FolderUrl(url).hide(url)
    assert "word" not in FolderUrl(url).hide(url)


def test_processes_that_are_started_inherit_the_secrets(monkeypatch):
    secret = "https://me:word@host/folder?signature=hush"
    monkeypatch.setenv(SIGNED, "")
    shown = move_secrets_to_environment(secret)
    assert shown == "https://host/folder"
    assert parse_location(shown).text == secret
    assert parse_location("https://host/other").text == "https://host/other"
    assert move_secrets_to_environment("some/folder") == "some/folder"


def test_secrets_are_not_for_where_one_is_sent_to(packed, cache):
    request = transport.HttpTransport(FolderUrl("https://me:word@host/folder"), 1).request("a.tar")
    assert request.full_url == "https://host/folder/a.tar"
    assert "Authorization" in request.unredirected_hdrs
    assert "Authorization" not in request.headers


# ---- runs ----------------------------------------------------------------------------------------------------------


def test_a_run_on_a_bad_network_ends_as_one_on_the_folder(recording, trained, tmp_path, monkeypatch):
    """Two processes, killed in the middle and resumed at the URL of the run's own recipe."""
    with serve(recording) as web:
        web.query = "signature=hush"
        web.faults["train-000000.tar"].extend([("cut", 3000), ("wrong",), ("status", 503)])
        web.faults["train-000001.tar"].extend([("slow", 3.0), ("cut", 9000)])
        where = ["--loader.shard-cache", tmp_path / "cache", "--loader.fetch-timeout", "1", "--loader.cache", "off"]
        command = ["train/finetune.py", "--out", tmp_path / "run"]
        data = ["--data", f"{web.url}?signature=hush"]
        kill_after_an_epoch(2, tmp_path / "run", *data, *SMALL, *where, "--checkpoint.every-steps", "1")
        assert load_progress(tmp_path / "run" / "checkpoints" / "last").epoch < 2, (
            "it was over before it could be killed"
        )
        done = launch(2, *command, "--resume", **{SIGNED: f"{web.url}?signature=hush"})
        assert done.returncode == 0, done.stderr
        monkeypatch.setenv(SIGNED, f"{web.url}?signature=hush")
        done = run_here("train/evaluate.py", tmp_path / "run", "--workers", "0")
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(trained), rel=1e-5)
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["data"] == web.url
    assert json.loads((tmp_path / "run" / "env.json").read_text())["data"] == web.url
    texts = [path.read_text(errors="replace") for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any("hush" in text for text in texts)
