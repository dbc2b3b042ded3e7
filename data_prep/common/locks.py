"""File locks between processes (flock): the kernel releases a lock when its holder ends, however it ends."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

POLL_SECONDS = 0.1


@contextlib.contextmanager
def exclusive(path: Path, *, required: bool = True) -> Iterator[int]:
    """Hold the exclusive lock on a file, which is created if needed, or on a folder; yields its descriptor.

    Args:
        path: of the file or folder.
        required: False if going without the lock merely repeats work; some network file systems have no locks.

    Raises:
        OSError: the file cannot be opened, or `required` and the file system has no locks.
    """
    descriptor = open_lock(path)
    try:
        try:
            lock(descriptor)
        except OSError:
            if required:
                raise
        yield descriptor
    finally:
        os.close(descriptor)


def open_lock(path: Path) -> int:
    """Open a lock file, which is created if needed, or a folder; closing the descriptor releases its lock."""
    if path.is_dir():
        return os.open(path, os.O_RDONLY)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)


def lock(descriptor: int, *, shared: bool = False) -> None:
    """Wait for the lock on an open file; shared locks exclude exclusive ones only."""
    fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)


def try_lock(descriptor: int, seconds: float = 0) -> bool:
    """Take the exclusive lock on an open file if it is free, or becomes free within `seconds`.

    Returns:
        Whether this process holds it now.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
        time.sleep(POLL_SECONDS)


def is_locked(path: Path) -> bool:
    """Whether a process holds a lock on a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return not try_lock(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def byte_range(descriptor: int, start: int, length: int = 1) -> Iterator[None]:
    """Hold a lock on bytes of an open file.

    Unlike the other locks, it also works between processes that inherited the same descriptor.
    """
    fcntl.lockf(descriptor, fcntl.LOCK_EX, length, start)
    try:
        yield
    finally:
        fcntl.lockf(descriptor, fcntl.LOCK_UN, length, start)
