"""The files of a shard folder behind a URL: fetched when they are needed, verified, and kept on disk for a while."""

import hashlib
import io
import os
import random
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.common.errors import BadInput, RunFailed
from data_prep.common.safe_reading import LARGEST_TEXT
from data_prep.remote.cache import Known, ShardCache, default_root
from data_prep.remote.transport import RangeRefused, Transport, transport
from data_prep.remote.url import FolderUrl
from data_prep.shards.manifest import Manifest, Shard, parse_manifest

TRIES = 5  # in a row that brought next to nothing
WRONG_TRIES = 3  # of a whole file whose bytes are wrong
WORTHWHILE = 2**22  # bytes that make a try count as none
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds before the second try, doubled for each further one


@dataclass(frozen=True)
class FetchSettings:
    """How remote shards are fetched and kept.

    Attributes:
        folder: for copies; by default that of the user (`shard_cache.default_root`).
        gib: budget of the copies; by default half of what is free on the disk.
        timeout: seconds after which a silent connection is given up.
    """

    folder: Path | None = None
    gib: float | None = None
    timeout: float = 30.0


class WrongBytes(BadInput):
    """A file's bytes are not those that were packed."""


class Cancelled(Exception):
    """Nobody waits for the file any more."""


class RemoteFiles:
    """The files of a shard folder behind a URL. It can be passed to other processes.

    Args:
        url: of the folder.
        settings: how they are fetched and kept.

    Raises:
        BadInput: a driver for such URLs is missing, or copies cannot be kept.
    """

    def __init__(self, url: FolderUrl, settings: FetchSettings):
        self.url, self._settings = url, settings
        self._transport: Transport = transport(url, settings.timeout)
        self._copies: ShardCache | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_copies": None}

    @property
    def cache(self) -> ShardCache:
        """Where copies are kept; made when it is needed, as the manifest alone needs none."""
        if self._copies is None:
            self._copies = ShardCache(self._settings.folder or default_root(), self._settings.gib)
        return self._copies

    def manifest(self) -> Manifest:
        """The folder's manifest, as it is there now.

        Raises:
            BadInput: it cannot be had, or is none.
        """
        return parse_manifest(self._small("manifest.json"), self.url / "manifest.json")

    def check(self, manifest: Manifest) -> None:
        """Refuse shards that cannot be kept; whether they are there is found when they are fetched.

        Raises:
            BadInput: the largest is larger than the budget.
        """
        shards = [shard for split in manifest.splits.values() for shard in split.shards]
        largest = max(shards, key=lambda shard: shard.bytes)
        self.cache.check_room(largest, self.url / largest.file)

    def table(self, file: str, manifest: Manifest) -> BinaryIO:
        """One of the folder's tables, for reading; verified where the manifest tells its hash.

        Raises:
            BadInput: it cannot be had.
        """
        known = manifest.files.get(file)
        if known is None:
            return io.BytesIO(self._small(file))
        return io.BytesIO(self._read(known, file, 0, known.bytes))

    def member(self, shard: Shard, offset: int, size: int) -> memoryview:
        """Bytes of a shard, which is fetched if it is not there.

        Raises:
            BadInput, RunFailed: it cannot be had.
        """
        return memoryview(self._read(shard, shard.file, offset, size))

    @contextmanager
    def local(self, shard: Shard) -> Iterator[Path]:
        """A copy of a shard, fetched if it is not there, and not given up within the block.

        Raises:
            BadInput, RunFailed: it cannot be had.
        """
        with self._copy(shard, shard.file):
            yield self.cache.path(shard)

    def state(self, shard: Shard) -> list[Any]:
        """What a shard's bytes depend on."""
        return [shard.sha256]

    def fetch(self, shard: Shard, cancelled: Callable[[], bool], spared: Callable[[], Collection[str]]) -> bool:
        """Fetch a shard ahead of its use, unless another process is at it or there is no room for it just now.

        Args:
            shard: to fetch.
            cancelled: whether nobody waits for it any more.
            spared: gives the hashes of the shards that are given up last when room is needed.

        Returns:
            Whether it is there.

        Raises:
            Cancelled: `cancelled` became true.
            BadInput, RunFailed: it cannot be had.
        """
        return self._fetch(shard, shard.file, cancelled, wait=False, spared=spared)

    # ---- fetching --------------------------------------------------------------------------------------------------

    @contextmanager
    def _copy(self, known: Known, file: str) -> Iterator[int]:
        """A descriptor of the copy of a file, fetched if it is not there."""
        with ExitStack() as stack:
            while (copy := stack.enter_context(self.cache.open(known))) is None:
                self._fetch(known, file)
            yield copy

    def _read(self, known: Known, file: str, offset: int, size: int) -> bytes:
        with self._copy(known, file) as copy:
            return os.pread(copy, size, offset)

    def _fetch(self, known: Known, file: str, cancelled: Callable[[], bool] = lambda: False, **options: Any) -> bool:
        def download(part: int) -> None:
            _Download(self._transport, self.url, known, file, part, cancelled).run()

        return self.cache.fetch(known, self.url / file, download, **options)

    def _small(self, file: str) -> bytes:
        """A file whose content is not known beforehand.

        Raises:
            BadInput: it cannot be had.
        """
        tries = _Tries()
        while True:
            try:
                return self._at_most(LARGEST_TEXT, file)
            except OSError as error:
                if not tries.again():
                    raise BadInput(
                        f"{self.url / file} cannot be read ({self.url.hide(said(error))}; {tries.made} tries); "
                        "is the URL right and the network up?"
                    ) from None

    def _at_most(self, largest: int, file: str) -> bytes:
        content = bytearray()
        for block in self._transport.read(file, 0, None):
            content += block
            if len(content) > largest:
                raise BadInput(f"{self.url / file} has more than {largest:,} bytes; a shard folder's has not")
        return bytes(content)


class _Tries:
    """Counts tries that led nowhere, and pauses between them."""

    def __init__(self):
        self.made = 0

    def again(self) -> bool:
        """Whether to try again, after a pause; with chance in it, so that not all come back at the same time."""
        self.made += 1
        if self.made >= TRIES:
            return False
        time.sleep(min(FIRST_PAUSE * 2 ** (self.made - 1), LONGEST_PAUSE) * random.uniform(0.5, 1))
        return True

    def forget(self) -> None:
        """It went on."""
        self.made = 0


class _Download:
    """Writes one file to a descriptor, from where an earlier download broke off."""

    def __init__(
        self, source: Transport, url: FolderUrl, known: Known, file: str, part: int, cancelled: Callable[[], bool]
    ):
        self._source, self._url, self._known, self._file, self._part = source, url, known, file, part
        self._cancelled = cancelled
        self._hash, self._there = hashlib.sha256(), 0

    def run(self) -> None:
        """Until it is whole and its bytes are right.

        Raises:
            BadInput: they are wrong every time, or it cannot be read.
            RunFailed: the network is not up to it.
            Cancelled: nobody waits for it any more.
        """
        tries, wrong = _Tries(), 0
        self._take_up()
        while True:
            before = self._there
            try:
                self._go_on()
                if self._hash.hexdigest() == self._known.sha256:
                    return
            except _Disk as error:
                raise error.error from None
            except RangeRefused:  # another file than the one that was begun, or that was packed
                pass
            except OSError as error:
                if self._there - before >= WORTHWHILE:
                    tries.forget()
                if not tries.again():
                    raise self._unreachable(error, tries.made) from None
                continue
            wrong += 1
            if wrong == WRONG_TRIES:
                raise self._wrong_bytes()
            self._start_over()

    def _take_up(self) -> None:
        while block := os.pread(self._part, 2**20, self._there):
            self._hash.update(block)
            self._there += len(block)
        if self._there > self._known.bytes:
            self._start_over()

    def _start_over(self) -> None:
        os.ftruncate(self._part, 0)
        self._hash, self._there = hashlib.sha256(), 0

    def _go_on(self) -> None:
        """Fetch what is missing, or until something is wrong."""
        if self._cancelled():
            raise Cancelled
        if self._there == self._known.bytes:
            return
        for block in self._source.read(self._file, self._there, self._known.bytes):
            if self._cancelled():
                raise Cancelled
            if len(block) > self._known.bytes - self._there:  # it is another file
                self._hash.update(block)
                return
            self._write(block)
        if self._there < self._known.bytes:
            raise RangeRefused("the file ended")

    def _write(self, block: bytes) -> None:
        try:
            written = os.pwrite(self._part, block, self._there)
        except OSError as error:
            raise _Disk(error) from None
        self._hash.update(memoryview(block)[:written])
        self._there += written
        if written < len(block):
            self._write(block[written:])

    def _wrong_bytes(self) -> WrongBytes:
        return WrongBytes(
            f"{self._url / self._file}: these are not the bytes that were packed: manifest.json expects "
            f"{self._known.bytes:,} of sha256 {self._known.sha256}, and {WRONG_TRIES} times others came (the last time "
            f"{self._there:,} of {self._hash.hexdigest()}); copy the folder to its place again"
        )

    def _unreachable(self, error: OSError, tries: int) -> RunFailed:
        return RunFailed(
            f"{self._url / self._file} cannot be fetched ({self._url.hide(said(error))}; {self._there:,} of "
            f"{self._known.bytes:,} bytes came; {tries} tries); start again with --resume when the network is up"
        )


class _Disk(Exception):
    """The disk's error, apart from those of the network."""

    def __init__(self, error: OSError):
        self.error = error


def said(error: OSError) -> str:
    """What an error of the network says, in a few words."""
    return error.strerror or str(error) or type(error).__name__
