"""Verified copies of remote files on this machine's disk, shared by all its processes and jobs, within a budget.

    ROOT/<sha256>-<bytes>         a whole file whose bytes have that hash; its time is that of its last use
    ROOT/<sha256>-<bytes>.part    one that is being fetched, by the process that has it locked, or that was begun
    ROOT/lock                     held by whoever decides who fetches what and what goes for it

A file is content by its content, so that the same shard is kept once, whatever URL it came from. Locks (flock) are the
kernel's: they go with their process, however it ends. What a killed process had begun goes on where it stopped.
"""

import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
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
        gib: the most that the cache may take; by default half of the disk's free space.
        timeout: seconds after which a silent connection is given up.
    """

    folder: Path | None = None
    gib: float | None = None
    timeout: float = 30.0


class KnownContent(Protocol):
    """A file whose content is content beforehand: a shard, or a table of the manifest's."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class _Kept:
    """A file in the cache.

    Attributes:
        path: of the file.
        size: bytes that it takes, or may come to take.
        used: when it was used last.
        fetching: whether a process is fetching it.
    """

    path: Path
    size: int
    used: float
    fetching: bool


def default_root() -> Path:
    """Where copies are kept unless a folder is given: $XDG_CACHE_HOME/spiketune/shards, by default in ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "spiketune" / "shards"


class ShardCache:
    """The copies in one folder.

    Args:
        root: the folder; it is made.
        gib: budget of all that is in it; by default half of what is free on its disk, itself included.

    Raises:
        BadInput: the folder cannot be written.
    """

    def __init__(self, root: Path, gib: float | None):
        self.root = root
        with self._turn():
            used = sum(kept.size for kept in self._kept())
        free = shutil.disk_usage(root).free
        self.budget = int(DEFAULT_SHARE * (free + used)) if gib is None else int(gib * GIB)

    def _unusable(self, error: OSError) -> BadInput:
        return BadInput(f"{self.root}: remote shards cannot be kept there ({error.strerror}); set loader.shard_cache")

    def check_room(self, content: KnownContent, name: str) -> None:
        """Refuse a file that is too large for the budget.

        Raises:
            BadInput: it is.
        """
        if content.bytes > self.budget:
            raise BadInput(
                f"{name} has {content.bytes / GIB:.3g} GiB, more than the {self.budget / GIB:.3g} GiB that may be kept "
                f"in {self.root}; raise loader.shard_cache_gib, or choose another loader.shard_cache"
            )

    def holds(self, content: KnownContent) -> bool:
        """Whether a file is there; it then counts as used just now."""
        try:
            os.utime(self.path(content))
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self._unusable(error) from None
        return True

    @contextmanager
    def open(self, content: KnownContent) -> Iterator[int | None]:
        """A descriptor of a file, which is not given up meanwhile; None where the file is not there."""
        try:
            file = os.open(self.path(content), os.O_RDONLY)
        except FileNotFoundError:
            yield None
            return
        try:
            locks.lock(file, shared=True)
            os.utime(file)
            yield file
        finally:
            os.close(file)

    def fetch(
        self,
        content: KnownContent,
        name: str,
        download: Callable[[int], None],
        wait: bool = True,
        spared: Callable[[], Collection[str]] = frozenset,
    ) -> bool:
        """See to it that a file is there.

        Args:
            content: the file.
            name: for messages.
            download: writes it, whole and verified, to a descriptor that may hold its beginning.
            wait: until it is there, also where somebody else fetches it or there is no room for it just now.
            spared: gives the hashes of what is given up last.

        Returns:
            Whether it is there, which it always is with `wait`.

        Raises:
            BadInput: there is no room for it.
        """
        self.check_room(content, name)
        while not self.holds(content):
            part = self._claim(content, name, spared())
            if part is not None:
                self._fill(content, part, download)
            elif not wait:
                return False
            else:
                time.sleep(POLL_SECONDS)
        return True

    def _fill(self, content: KnownContent, part: int, download: Callable[[int], None]) -> None:
        try:
            download(part)
            os.fsync(part)  # before it gets its name, or a crash could leave a file of that name without its content
            os.utime(part)
            with self._turn():
                self._part(content).rename(self.path(content))
        except OSError as error:
            self._discard(content)
            raise self._unusable(error) from None
        except BadInput:  # these bytes are good for nothing
            self._discard(content)
            raise
        finally:
            os.close(part)

    def _discard(self, content: KnownContent) -> None:
        with suppress(OSError, BadInput), self._turn():
            self._part(content).unlink()

    def path(self, content: KnownContent) -> Path:
        """Where a file is kept, if it is there."""
        return self.root / f"{content.sha256}-{content.bytes}"

    def _part(self, content: KnownContent) -> Path:
        return self.root / f"{content.sha256}-{content.bytes}.part"

    @contextmanager
    def _turn(self) -> Iterator[None]:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = locks.open_lock(self.root / "lock")
        except OSError as error:
            raise self._unusable(error) from None
        try:
            locks.lock(lock)
            yield
        finally:
            os.close(lock)

    def _claim(self, content: KnownContent, name: str, spared: Collection[str]) -> int | None:
        """A locked descriptor to write a file to; None where it is being fetched, or room has to be waited for.

        Raises:
            BadInput: there is no room, and nobody is at work who would leave some.
        """
        with self._turn():
            if self.path(content).exists():
                return None
            part = os.open(self._part(content), os.O_RDWR | os.O_CREAT, 0o600)
            if locks.try_lock(part):
                others = [kept for kept in self._kept() if kept.path != self._part(content)]
                room = self._make_room(content, others, spared)
                if room:
                    return part
                if not os.fstat(part).st_size:
                    self._part(content).unlink()
                if room is None:
                    os.close(part)
                    raise self._full(content, name)
            os.close(part)
            return None

    def _full(self, content: KnownContent, name: str) -> BadInput:
        free = shutil.disk_usage(self.root).free
        return BadInput(
            f"{self.root}: no space for {name} ({content.bytes / GIB:.3g} GiB; the disk has {free / GIB:.3g} GiB left, "
            f"the budget is {self.budget / GIB:.3g} GiB); set loader.shard_cache, or make room"
        )

    def _make_room(self, content: KnownContent, others: list[_Kept], spared: Collection[str]) -> bool | None:
        """Give up what was not used for longest until a file fits in.

        Returns:
            Whether it fits in: not now, where others are at work with the rest; None where that would not help.
        """
        taken = sum(kept.size for kept in others)
        needed = content.bytes - self._part(content).stat().st_size
        needed += sum(kept.size - kept.path.stat().st_size for kept in others if kept.fetching)

        def fits() -> bool:
            return taken + content.bytes <= self.budget and shutil.disk_usage(self.root).free >= needed

        in_use = False
        for kept in sorted(others, key=lambda kept: (kept.path.name[:64] in spared, kept.used)):
            if fits():
                return True
            if not kept.fetching and _removed(kept.path):
                taken -= kept.size
            else:
                in_use = True
        return fits() or (False if in_use else None)

    def _kept(self) -> list[_Kept]:
        """All files; whoever calls has its turn."""
        found = []
        for path in self.root.iterdir():
            if (name := _NAME.fullmatch(path.name)) is None:
                continue
            with suppress(FileNotFoundError):  # somebody tidies up by hand
                status = path.stat()
                fetching = name[3] is not None and locks.is_locked(path)
                found.append(_Kept(path, int(name[2]) if fetching else status.st_size, status.st_mtime, fetching))
        return found


def _removed(path: Path) -> bool:
    """Remove a file that nobody is reading."""
    file = os.open(path, os.O_RDONLY)
    try:
        if not locks.try_lock(file):
            return False
        path.unlink()
        return True
    finally:
        os.close(file)
