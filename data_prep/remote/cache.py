"""Verified copies of remote files on this machine's disk, shared by all its processes and jobs, within a budget.

    ROOT/<sha256>-<bytes>         a complete file with that hash; its modification time is that of its last use
    ROOT/<sha256>-<bytes>.part    an incomplete file; the process that is fetching it holds its lock
    ROOT/lock                     held while a process decides what to fetch and what to evict for it

Files are named by their content, so a shard is kept once, whatever URLs it comes from. Locks end with their process;
the next process resumes what a killed one began.
"""

import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from data_prep.common import locks
from data_prep.common.errors import BadInput

GIB = 2**30
DEFAULT_SHARE = 0.5  # of the disk's free space
POLL_SECONDS = 0.05
_NAME = re.compile(r"([0-9a-f]{64})-(\d+)(\.part)?")


@dataclass(frozen=True)
class FetchSettings:
    """How remote files are fetched and cached.

    Attributes:
        folder: of the cache; by default `default_root`.
        gib: size limit of the cache; by default half of the disk's free space.
        timeout: seconds without data after which a connection is given up.
    """

    folder: Path | None = None
    gib: float | None = None
    timeout: float = 30.0


class KnownContent(Protocol):
    """Size and hash of a file, known before it is fetched: of a shard, or of a table that the manifest lists."""

    @property
    def bytes(self) -> int:
        """Size."""
        ...

    @property
    def sha256(self) -> str:
        """Hash, in hexadecimal digits."""
        ...


@dataclass(frozen=True)
class _CachedFile:
    """A file in the cache.

    Attributes:
        path: of the file.
        size: bytes that it takes, or will take when it is complete.
        used: when it was used last.
        is_arriving: whether a process is fetching it.
    """

    path: Path
    size: int
    used: float
    is_arriving: bool

    @property
    def sha256(self) -> str:
        """Hash of the complete file."""
        return self.path.name[:64]


def default_root() -> Path:
    """The cache unless a folder is given: $XDG_CACHE_HOME/spiketune/shards, by default in ~/.cache."""
    return user_cache() / "shards"


def user_cache() -> Path:
    """The folder for whatever can be made again: $XDG_CACHE_HOME/spiketune, by default in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spiketune"


class ShardCache:
    """A cache of files in one folder.

    Args:
        root: the folder, which is created if needed.
        gib: size limit of its files; by default half of the disk's free space, these files included.

    Raises:
        BadInput: the folder cannot be written.
    """

    def __init__(self, root: Path, gib: float | None):
        self.root = root
        with self._lock():
            used = sum(file.size for file in self._files())
        free = shutil.disk_usage(root).free
        self.budget = int(DEFAULT_SHARE * (free + used)) if gib is None else int(gib * GIB)

    def check_room(self, content: KnownContent, name: str) -> None:
        """Refuse a file that is larger than the budget.

        Raises:
            BadInput: it is.
        """
        if content.bytes > self.budget:
            raise BadInput(
                f"{name} has {content.bytes / GIB:.3g} GiB, more than the cache {self.root} may hold "
                f"({self.budget / GIB:.3g} GiB); raise loader.shard_cache_gib, or choose another loader.shard_cache"
            )

    def holds(self, content: KnownContent) -> bool:
        """Whether there is a copy; if so, marks it as used now."""
        try:
            os.utime(self.path(content))
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self._unusable(error) from None
        return True

    @contextmanager
    def open(self, content: KnownContent) -> Iterator[int | None]:
        """A descriptor of a copy, which is not evicted within the block; None if there is no copy."""
        try:
            descriptor = os.open(self.path(content), os.O_RDONLY)
        except FileNotFoundError:
            yield None
            return
        try:
            locks.lock(descriptor, shared=True)
            os.utime(descriptor)
            yield descriptor
        finally:
            os.close(descriptor)

    def fetch(
        self,
        content: KnownContent,
        name: str,
        download: Callable[[int], None],
        wait: bool = True,
        evict_last: Callable[[], Collection[str]] = frozenset,
    ) -> bool:
        """Make sure that there is a copy of a file.

        Args:
            content: of the file.
            name: of the file, for messages.
            download: writes it, complete and verified, to a descriptor that may hold its beginning.
            wait: until there is a copy, even if another process is fetching it or the cache is full of files in use.
            evict_last: returns the hashes of files to evict only after all others.

        Returns:
            Whether there is a copy, which is always true with `wait`.

        Raises:
            BadInput: the cache has no room for it.
        """
        self.check_room(content, name)
        while not self.holds(content):
            part = self._claim(content, name, evict_last())
            if part is not None:
                self._fill(content, part, download)
            elif not wait:
                return False
            else:
                time.sleep(POLL_SECONDS)
        return True

    def path(self, content: KnownContent) -> Path:
        """The path of a file's copy, whether or not it exists."""
        return self.root / f"{content.sha256}-{content.bytes}"

    def _part_path(self, content: KnownContent) -> Path:
        return self.root / f"{content.sha256}-{content.bytes}.part"

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with ExitStack() as stack:
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locks.exclusive(self.root / "lock"))
            except OSError as error:
                raise self._unusable(error) from None
            yield

    def _unusable(self, error: OSError) -> BadInput:
        return BadInput(f"{self.root} cannot be used as a cache ({error.strerror}); choose another loader.shard_cache")

    # ---- fetching --------------------------------------------------------------------------------------------------

    def _claim(self, content: KnownContent, name: str, evict_last: Collection[str]) -> int | None:
        """A locked descriptor to write a file to; None if another process is fetching it or uses the space it needs.

        Raises:
            BadInput: there is no room, and none of the other files is in use, so waiting would not help.
        """
        with self._lock():
            if self.path(content).exists():
                return None
            part_path = self._part_path(content)
            part = os.open(part_path, os.O_RDWR | os.O_CREAT, 0o600)
            if not locks.try_lock(part):
                os.close(part)
                return None
            others = [file for file in self._files() if file.path != part_path]
            fits = self._evict(content, others, evict_last)
            if fits:
                return part
            if not os.fstat(part).st_size:
                part_path.unlink()
            os.close(part)
            if fits is None:
                raise self._full(content, name)
            return None

    def _fill(self, content: KnownContent, part: int, download: Callable[[int], None]) -> None:
        try:
            download(part)
            os.fsync(part)  # before the rename, or a crash could leave a file with that name but without its content
            os.utime(part)
            with self._lock():
                self._part_path(content).rename(self.path(content))
        except OSError as error:
            self._discard_part(content)
            raise self._unusable(error) from None
        except BadInput:  # the bytes are useless
            self._discard_part(content)
            raise
        finally:
            os.close(part)

    def _discard_part(self, content: KnownContent) -> None:
        with suppress(OSError, BadInput), self._lock():
            self._part_path(content).unlink()

    # ---- room ------------------------------------------------------------------------------------------------------

    def _evict(self, content: KnownContent, others: list[_CachedFile], evict_last: Collection[str]) -> bool | None:
        """Remove the least recently used files until a new one fits.

        Returns:
            Whether it fits; None if it does not and no file is in use, so waiting would not help.
        """
        taken = sum(file.size for file in others)
        missing = content.bytes - self._part_path(content).stat().st_size
        missing += sum(file.size - file.path.stat().st_size for file in others if file.is_arriving)

        def fits() -> bool:
            return taken + content.bytes <= self.budget and shutil.disk_usage(self.root).free >= missing

        any_in_use = False
        for file in sorted(others, key=lambda file: (file.sha256 in evict_last, file.used)):
            if fits():
                return True
            if not file.is_arriving and _removed(file.path):
                taken -= file.size
            else:
                any_in_use = True
        if fits():
            return True
        return False if any_in_use else None

    def _full(self, content: KnownContent, name: str) -> BadInput:
        free = shutil.disk_usage(self.root).free
        return BadInput(
            f"{self.root}: no space for {name} ({content.bytes / GIB:.3g} GiB; the disk has {free / GIB:.3g} GiB left, "
            f"the budget is {self.budget / GIB:.3g} GiB); set loader.shard_cache, or free some space"
        )

    def _files(self) -> list[_CachedFile]:
        """All files; the caller holds the lock."""
        files = []
        for path in self.root.iterdir():
            name = _NAME.fullmatch(path.name)
            if name is None:
                continue
            with suppress(FileNotFoundError):  # deleted by hand meanwhile
                status = path.stat()
                is_arriving = name[3] is not None and locks.is_locked(path)
                size = int(name[2]) if is_arriving else status.st_size
                files.append(_CachedFile(path, size, status.st_mtime, is_arriving))
        return files


def _removed(path: Path) -> bool:
    """Remove a file unless a process is reading it; returns whether it was removed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if not locks.try_lock(descriptor):
            return False
        path.unlink()
        return True
    finally:
        os.close(descriptor)
