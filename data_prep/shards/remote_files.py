"""The files of a shard folder behind a URL: fetched when needed, verified, and cached on disk."""

import io
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.common.errors import BadInput, RunFailed
from data_prep.common.safe_reading import LARGEST_TEXT
from data_prep.remote.cache import FetchSettings, KnownContent, ShardCache, default_root
from data_prep.remote.downloader import (
    DiskError,
    Download,
    PartialFile,
    Retries,
    Unreachable,
    WrongContent,
    read_small_file,
)
from data_prep.remote.fsspec_transport import FsspecTransport
from data_prep.remote.http_transport import HttpTransport
from data_prep.remote.transport import Answer, FileRefused, Transport
from data_prep.remote.url import FolderUrl
from data_prep.shards.manifest import Manifest, Shard, parse_manifest

RETRIES = Retries(limit=4, first_pause=0.5, worthwhile=2**22, wrong_limit=2)


class WrongBytes(BadInput):
    """A file's bytes are not those that were packed."""


class RemoteFiles:
    """The files of a shard folder behind a URL. Instances can be passed to other processes.

    Args:
        url: of the folder.
        settings: how they are fetched and cached.

    Raises:
        BadInput: a driver for such URLs is missing, or the cache cannot be written.
    """

    def __init__(self, url: FolderUrl, settings: FetchSettings):
        self.url, self._settings = url, settings
        kind = HttpTransport if url.scheme in ("http", "https") else FsspecTransport
        self._transport: Transport = kind(url, settings.timeout)
        self._cache: ShardCache | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": None}

    @property
    def cache(self) -> ShardCache:
        """The local copies; opened when needed, as reading the manifest alone needs no cache."""
        if self._cache is None:
            self._cache = ShardCache(self._settings.folder or default_root(), self._settings.gib)
        return self._cache

    def manifest(self) -> Manifest:
        """The folder's manifest as it is now.

        Raises:
            BadInput: it cannot be read, or is damaged.
        """
        try:
            content = self._small_file("manifest.json")
        except FileRefused as error:
            if error.status not in (404, 410):
                raise
            raise BadInput(
                f"{error}; give the URL of a shard folder made by data_prep/pack.py (other tars are read from "
                "local folders only)"
            ) from None
        return parse_manifest(content, self.url / "manifest.json")

    def check(self, manifest: Manifest) -> None:
        """Refuse shards that do not fit into the cache. Missing shards are noticed only when they are fetched.

        Raises:
            BadInput: the largest exceeds the budget.
        """
        shards = [shard for split in manifest.splits.values() for shard in split.shards]
        largest = max(shards, key=lambda shard: shard.bytes)
        self.cache.check_room(largest, self.url / largest.file)

    def table(self, file: str, manifest: Manifest) -> BinaryIO:
        """One of the folder's tables, for reading; verified if the manifest lists its hash.

        Raises:
            BadInput, RunFailed: it cannot be fetched.
        """
        entry = manifest.files.get(file)
        if entry is None:
            return io.BytesIO(self._small_file(file))
        return io.BytesIO(self._read(entry, file, 0, entry.bytes))

    def member(self, shard: Shard, offset: int, size: int) -> memoryview:
        """Bytes of a shard, which is fetched if necessary.

        Raises:
            BadInput, RunFailed: it cannot be fetched.
        """
        return memoryview(self._read(shard, shard.file, offset, size))

    @contextmanager
    def local(self, shard: Shard) -> Iterator[Path]:
        """A copy of a shard, fetched if necessary, and not evicted within the block.

        Raises:
            BadInput, RunFailed: it cannot be fetched.
        """
        with self._copy(shard, shard.file):
            yield self.cache.path(shard)

    def state(self, shard: Shard) -> list[Any]:
        """The hash of a shard, which identifies its bytes."""
        return [shard.sha256]

    def fetch(self, shard: Shard, cancelled: Callable[[], bool], evict_last: Callable[[], Collection[str]]) -> bool:
        """Fetch a shard before it is used, unless another process is fetching it or the cache is full of files in use.

        Args:
            shard: to fetch.
            cancelled: returns whether it is no longer needed.
            evict_last: returns the hashes of shards to evict only after all others.

        Returns:
            Whether a copy exists now.

        Raises:
            Cancelled: `cancelled` became true.
            BadInput, RunFailed: it cannot be fetched.
        """
        return self._fetch(shard, shard.file, cancelled, wait=False, evict_last=evict_last)

    # ---- fetching --------------------------------------------------------------------------------------------------

    @contextmanager
    def _copy(self, content: KnownContent, file: str) -> Iterator[int]:
        """A descriptor of the copy of a file, fetched if there is none."""
        with ExitStack() as stack:
            while (copy := stack.enter_context(self.cache.open(content))) is None:
                self._fetch(content, file)
            yield copy

    def _read(self, content: KnownContent, file: str, offset: int, size: int) -> bytes:
        with self._copy(content, file) as copy:
            return os.pread(copy, size, offset)

    def _fetch(
        self,
        content: KnownContent,
        file: str,
        cancelled: Callable[[], bool] = lambda: False,
        wait: bool = True,
        evict_last: Callable[[], Collection[str]] = frozenset,
    ) -> bool:
        download = partial(self._download, content, file, cancelled)
        return self.cache.fetch(content, self.url / file, download, wait, evict_last)

    def _download(self, content: KnownContent, file: str, cancelled: Callable[[], bool], descriptor: int) -> None:
        """Write a file to a descriptor, which may hold its beginning.

        Raises:
            BadInput: the server refuses it, or its bytes are wrong every time.
            RunFailed: the network fails.
            Cancelled: it is no longer needed.
            OSError: the disk fails.
        """

        def request(start: int, _: str | None) -> AbstractContextManager[Answer]:
            return self._transport.open(file, start, content.bytes)

        def fault(part: PartialFile) -> str | None:
            return None if part.hexdigest == content.sha256 else "its sha256 differs"

        part = PartialFile(descriptor, "sha256")
        try:
            Download(request, part, fault, RETRIES, size=content.bytes, cancelled=cancelled).run()
        except DiskError as failure:
            raise failure.error from None
        except WrongContent:
            raise WrongBytes(
                f"{self.url / file}: these are not the bytes that were packed: manifest.json expects "
                f"{content.bytes:,} bytes of sha256 {content.sha256}, but {RETRIES.wrong_limit + 1} downloads differed "
                f"(the last: {part.size:,} bytes of {part.hexdigest}); upload the folder again"
            ) from None
        except Unreachable as error:
            raise RunFailed(
                f"{self.url / file} cannot be fetched ({self.url.hide(str(error))}; {part.size:,} of "
                f"{content.bytes:,} bytes arrived; {error.attempts} attempts); run it again with --resume when the "
                "network is up"
            ) from None

    def _small_file(self, file: str) -> bytes:
        """A file of unknown size and content.

        Raises:
            BadInput: it cannot be fetched.
        """
        try:
            return read_small_file(lambda *_: self._transport.open(file), self.url / file, LARGEST_TEXT, RETRIES)
        except Unreachable as error:
            raise BadInput(
                f"{self.url / file} cannot be read ({self.url.hide(str(error))}; {error.attempts} attempts); check "
                "the URL and the network"
            ) from None
