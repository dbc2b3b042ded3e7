"""Shards behind a URL: the same data as in a local folder, whatever the network does."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from helpers import assert_refused, run_here, succeed_here
from remote_shards import assert_same, cached_files, fetch, loader_of, opened, read, train_shard
from web_server import serve

from data_prep.common.errors import BadInput, RunFailed
from data_prep.remote import fsspec_transport
from data_prep.shards import remote_files
from data_prep.shards.folder import ShardFolder

pytestmark = pytest.mark.usefixtures("fast_retries")


SHOW = "data_prep/show.py"


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
    monkeypatch.setattr(fsspec_transport, "PART", 1000)
    fsspec.filesystem("memory").put(str(packed), "memory://bucket/parts", recursive=True)
    assert fetch(opened("memory://bucket/parts", cache)) == (packed / "train-000000.tar").read_bytes()


# ---- what networks do -----------------------------------------------------------------------------------------------


def test_a_cut_connection_is_resumed(web, packed, cache):
    web.faults["train-000000.tar"].extend([("cut", 5000), ("cut", 0), ("cut", 7000)])
    assert fetch(opened(web.url, cache)) == (packed / "train-000000.tar").read_bytes()
    ranges = [requested_range for file, requested_range in web.asked if file == "train-000000.tar"]
    assert ranges == [None, "bytes=5000-", "bytes=5000-", "bytes=12000-"]


def test_a_server_that_knows_no_ranges_sends_everything_again(web, packed, cache):
    web.ranges = False
    web.faults["train-000000.tar"].extend([("cut", 5000), ("cut", 9000)])
    assert fetch(opened(web.url, cache)) == (packed / "train-000000.tar").read_bytes()
    assert web.times()["train-000000.tar"] == 3


@pytest.mark.parametrize(
    "fault", [("status", 503), ("status", 429), ("slow", 1.0), ("drip", 0.05), ("wrong",)], ids=str
)
def test_passing_faults_are_retried(web, packed, cache, fault):
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
    assert not any(name.startswith(shard.sha256) for name in cached_files(cache))


@pytest.mark.parametrize("workers", [0, 1])
def test_wrong_bytes_end_the_reading(web, cache, workers):
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


def test_cuts_are_outlasted_as_long_as_bytes_arrive(web, packed, cache, monkeypatch):
    monkeypatch.setattr(remote_files, "RETRIES", replace(remote_files.RETRIES, worthwhile=500))
    web.always["train-000000.tar"] = ("cut", 1000)
    shards = opened(web.url, cache)
    assert fetch(shards) == (packed / "train-000000.tar").read_bytes()
    assert web.times()["train-000000.tar"] > remote_files.RETRIES.limit + 1


def test_a_page_in_place_of_a_manifest_is_refused(web, cache):
    web.always["manifest.json"] = ("html",)
    with pytest.raises(BadInput, match=rf"{web.url}/manifest\.json is not readable as JSON"):
        opened(web.url, cache)


# ---- show.py, and what it refuses -----------------------------------------------------------------------------------


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
    "no host": ("https:///folder", ("has no host",)),
    "chained": ("simplecache::s3://bucket/folder", ("chained",)),
    "nobody there": ("http://127.0.0.1:9/folder", ("127.0.0.1:9/folder/manifest.json cannot be read", "refused")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_url_that_cannot_be_read_is_refused_in_a_sentence(packed, tmp_path, cache, case):
    (tmp_path / "empty").mkdir()
    url, words = REFUSED[case]
    with serve(tmp_path / "empty") as web:
        assert_refused(show(url.format(url=web.url), cache), *words)


def test_foreign_tars_are_refused_behind_a_url(packed, tmp_path, cache):
    """Without a manifest, all of them would have to be read first."""
    for tar in packed.glob("*.tar"):
        (tmp_path / "tars" / tar.name).parent.mkdir(exist_ok=True)
        shutil.copy(tar, tmp_path / "tars")
    assert len(ShardFolder(tmp_path / "tars").split("train")) == 60
    with serve(tmp_path / "tars") as web:
        assert_refused(show(web.url, cache), f"{web.url}/manifest.json does not exist", "local folders only")


def test_rewritten_tables_are_fetched_again(packed, tmp_path, cache):
    """The manifest holds their hashes."""
    folder = tmp_path / "copy"
    shutil.copytree(packed, folder)
    (folder / "index.npz").unlink()
    (folder / "targets.npz").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"files": {}, "checksum": None}))
    succeed_here(SHOW, folder, "--index")
    for file in ("index.npz", "targets.npz", "manifest.json"):
        assert (folder / file).read_bytes() == (packed / file).read_bytes()
    with serve(folder) as web:
        assert_same(read(loader_of(opened(web.url, cache))), read(loader_of(ShardFolder(packed))))
        assert_refused(show(web.url, cache, "--index"), web.url, "local folders only")


@pytest.mark.parametrize("status", [401, 403])
def test_denied_permission_is_reported_and_not_retried(web, cache, status):
    web.always["manifest.json"] = ("status", status)
    assert_refused(show(web.url, cache), f"{web.url}/manifest.json cannot be read: permission denied", str(status))
    assert len(web.asked) == 1
