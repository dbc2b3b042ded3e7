"""The cache of remote shards: shared by processes, never over its budget, never a damaged copy."""

import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers import ROOT, wait_for
from remote_shards import cached_files, fetch, opened, train_shard
from web_server import serve

from data_prep.common.errors import BadInput
from data_prep.remote import cache as shard_cache
from data_prep.remote.cache import GIB

pytestmark = pytest.mark.usefixtures("fast_retries")


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


def test_a_killed_download_is_resumed(web, packed, cache):
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
    ((_, requested_range),) = [request for request in web.asked[before:] if request[0] == "train-000000.tar"]
    assert int(requested_range.removeprefix("bytes=").rstrip("-")) > 4096
    assert not any(name.endswith("part") for name in cached_files(cache))


@pytest.mark.parametrize("content", [b"", b"not the beginning of it", bytes(10**6)], ids=len)
def test_a_wrong_beginning_is_noticed(web, packed, cache, content):
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
        assert sum(cached_files(cache).values()) <= 3.9 * size
    assert web.times()["train-000000.tar"] == 1
    assert f"{train_shard(shards, 5).sha256}-{train_shard(shards, 5).bytes}" in cached_files(cache)
    assert f"{train_shard(shards, 1).sha256}-{train_shard(shards, 1).bytes}" not in cached_files(cache)


def test_a_copy_in_use_is_not_evicted(web, packed, cache):
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
    assert sum(cached_files(cache).values()) <= 1.2 * size


def test_a_shard_that_never_fits_is_refused_at_once(web, cache):
    with pytest.raises(BadInput, match=r"train-\d+\.tar has .* GiB, more than .* loader\.shard_cache_gib"):
        opened(web.url, cache, 1e-6)


def test_a_full_disk_is_reported(web, cache, monkeypatch):
    shards = opened(web.url, cache)
    usage = shutil.disk_usage(cache)
    monkeypatch.setattr(shard_cache.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(BadInput, match=rf"{cache}: no space for {web.url}/train-000000\.tar .*loader\.shard_cache"):
        fetch(shards)
    assert not any(name.endswith("part") for name in cached_files(cache))


def test_a_cache_that_cannot_be_written_is_reported(web, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"file/cache cannot be used as a cache .*loader\.shard_cache"):
        opened(web.url, tmp_path / "file" / "cache")


def test_the_same_shard_from_two_places_is_kept_once(web, packed, cache):
    with serve(packed) as mirror:
        fetch(opened(web.url, cache))
        fetch(opened(mirror.url, cache))
        assert not mirror.times()
