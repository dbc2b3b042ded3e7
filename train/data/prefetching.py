"""Fetches remote shards in the background before they are needed, as far ahead as the cache has room."""

import threading
import time
from collections import Counter, deque
from collections.abc import Sequence

import numpy as np

from data_prep.common.errors import BadInput, RunFailed
from data_prep.remote.downloader import Cancelled
from data_prep.shards.folder import ShardSplit
from data_prep.shards.remote_files import RemoteFiles
from train.distributed.launch_environment import this_process

STREAMS = 4  # shards that a machine fetches at the same time; one stream rarely fills a network
RETRY_SECONDS = 0.1


class ShardPrefetcher:
    """Follows a reader through its requests and fetches the shards that it needs next.

    The shards of the requests in view, which start at the reader's position, never exceed the cache's budget. A
    shard that cannot be fetched is left to the reader, which raises the error when it needs the shard.

    Args:
        splits: that the requests read; at least one is remote, and all remote ones share one cache.
        needs: for each request, in order, the remote shards that it reads, int, counted through those of all splits.
    """

    def __init__(self, splits: Sequence[ShardSplit], needs: Sequence[np.ndarray]):
        self._shards = [(split.files, shard) for split in splits for shard in split.shards]
        self._needs = needs
        remote = [(split.files, split.shards) for split in splits if isinstance(split.files, RemoteFiles)]
        largest = max(shard.bytes for _, shards in remote for shard in shards)
        self._room = remote[0][0].cache.budget - largest  # the reader may have to fetch one itself
        self._read, self._viewed = 0, 0  # numbers of requests
        self._in_view: Counter[int] = Counter()  # number of requests in view that need each shard
        self._bytes_in_view = 0
        self._queue: deque[int] = deque()
        self._changed = threading.Condition()
        self._ended = False

    def __enter__(self) -> "ShardPrefetcher":
        with self._changed:
            self._extend_view()
        for _ in range(max(STREAMS // this_process().ranks_on_machine, 1)):
            threading.Thread(target=self._fetch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def advance(self) -> None:
        """The reader has read its next request."""
        with self._changed:
            if self._read < self._viewed:
                self._drop_from_view(self._needs[self._read])
            self._read += 1
            self._viewed = max(self._viewed, self._read)
            self._extend_view()
            self._changed.notify_all()

    def _drop_from_view(self, shards: np.ndarray) -> None:
        for shard in shards.tolist():
            self._in_view[shard] -= 1
            if not self._in_view[shard]:
                del self._in_view[shard]
                self._bytes_in_view -= self._size(shard)

    def _size(self, shard: int) -> int:
        return self._shards[shard][1].bytes

    def _extend_view(self) -> None:
        while self._viewed < len(self._needs):
            shards = self._needs[self._viewed].tolist()
            new = [shard for shard in shards if shard not in self._in_view]
            size = sum(map(self._size, new))
            if self._bytes_in_view + size > self._room:
                return
            self._in_view.update(shards)
            self._bytes_in_view += size
            self._queue.extend(new)
            self._viewed += 1

    def _next(self) -> int | None:
        """The next shard to fetch, as soon as there is one; None at the end."""
        with self._changed:
            while not self._ended:
                while self._queue:
                    if (shard := self._queue.popleft()) in self._in_view:
                        return shard
                self._changed.wait()
        return None

    def _hashes_in_view(self) -> set[str]:
        with self._changed:
            return {self._shards[shard][1].sha256 for shard in self._in_view}

    def _fetch(self) -> None:
        while (number := self._next()) is not None:
            files, shard = self._shards[number]
            assert isinstance(files, RemoteFiles)
            try:
                if files.fetch(shard, lambda: self._ended, self._hashes_in_view):
                    continue
            except (BadInput, RunFailed):
                continue
            except Cancelled:
                return
            time.sleep(RETRY_SECONDS)  # another process is fetching it, or there is no room at the moment
            with self._changed:
                self._queue.append(number)
