"""Fetch remote shards in the background, before the order needs them, as far ahead as the local copies have room."""

import threading
import time
from collections import Counter, deque
from collections.abc import Sequence

import numpy as np

from data_prep.common.errors import BadInput, RunFailed
from data_prep.remote.downloader import Cancelled
from data_prep.shards.folder import ShardSplit
from train.distributed.launch_environment import ranks_on_machine

STREAMS = 4  # shards that a machine fetches at the same time; one stream rarely fills a network
SECONDS_BETWEEN_LOOKS = 0.1


class ShardPrefetcher:
    """Follows a reader through its work and keeps fetched what it needs next.

    What it looks ahead at, from where the reader is, never has more bytes than may be kept. A shard that cannot be
    fetched is left to the reader, who says so when it is needed.

    Args:
        splits: what is read; of those in remote folders shards are fetched, into one cache.
        needs: for each piece of work, in order, the remote shards it reads, int, counted through those of all splits.
    """

    def __init__(self, splits: Sequence[ShardSplit], needs: Sequence[np.ndarray]):
        self._shards = [(split.files, shard) for split in splits for shard in split.shards]
        self._needs = needs
        remote = [split for split in splits if split.is_remote]
        largest = max(shard.bytes for split in remote for shard in split.shards)
        self._room = remote[0].files.cache.budget - largest  # the reader may have to fetch one itself
        self._reader, self._seen = 0, 0  # pieces of work that are done, and that are looked at
        self._in_sight: Counter[int] = Counter()  # pieces between the two that need each shard
        self._bytes = 0
        self._wanted: deque[int] = deque()
        self._changed = threading.Condition()
        self._ended = False

    def __enter__(self) -> "ShardPrefetcher":
        with self._changed:
            self._look_ahead()
        for _ in range(max(STREAMS // ranks_on_machine(), 1)):
            threading.Thread(target=self._fetch, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def passed(self) -> None:
        """The reader has done the next piece of its work."""
        with self._changed:
            if self._reader < self._seen:
                self._lose_sight(self._needs[self._reader])
            self._reader += 1
            self._seen = max(self._seen, self._reader)
            self._look_ahead()
            self._changed.notify_all()

    def _lose_sight(self, shards: np.ndarray) -> None:
        for shard in shards.tolist():
            self._in_sight[shard] -= 1
            if not self._in_sight[shard]:
                del self._in_sight[shard]
                self._bytes -= self._size(shard)

    def _size(self, shard: int) -> int:
        return self._shards[shard][1].bytes

    def _look_ahead(self) -> None:
        while self._seen < len(self._needs):
            shards = self._needs[self._seen].tolist()
            new = [shard for shard in shards if shard not in self._in_sight]
            size = sum(map(self._size, new))
            if self._bytes + size > self._room:
                return
            self._in_sight.update(shards)
            self._bytes += size
            self._wanted.extend(new)
            self._seen += 1

    def _next(self) -> int | None:
        """The next shard to fetch, which is waited for; None at the end."""
        with self._changed:
            while not self._ended:
                while self._wanted:
                    if (shard := self._wanted.popleft()) in self._in_sight:
                        return shard
                self._changed.wait()
        return None

    def _spared(self) -> set[str]:
        with self._changed:
            return {self._shards[shard][1].sha256 for shard in self._in_sight}

    def _fetch(self) -> None:
        while (shard := self._next()) is not None:
            files, wanted = self._shards[shard]
            try:
                if files.fetch(wanted, lambda: self._ended, self._spared):
                    continue
            except (BadInput, RunFailed):
                continue
            except Cancelled:
                return
            time.sleep(SECONDS_BETWEEN_LOOKS)  # another process is at it, or there is no room just now
            with self._changed:
                self._wanted.append(shard)
