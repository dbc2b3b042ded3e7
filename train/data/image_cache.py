"""Decoded images, kept once per machine and shared by all processes there that read the same ones.

They lie in a file that has no name, in memory or on disk. The kernel frees it when the last process that holds it is
gone, however it went, so there is nothing to clean up after a kill. A process that comes later opens it through
/proc/PID/fd/FD of one that holds it; who holds what is written in one small file (`_Holders`), guarded by a lock.

The file is filled by whoever decodes an image first. Two processes may write the same one: they write the same bytes.

    0            key (64 bytes), number of images there is room for (int64), whether the disk is full (uint8)
    4096         uint8 (images,), 1 once an image is there
    4096 * more  uint8 (images, size, size, 3)
"""

import hashlib
import mmap
import os
import re
import shutil
import stat
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common import locks
from data_prep.shards.folder import ShardSplit
from train.data.decoding import VERSION
from train.data.free_memory import free_memory
from train.run.recipe import Loader

GIB = 2**30
DEFAULT_SHARE = 0.5  # of what is free
LARGEST_SHARE = 0.9  # whatever was asked for
PAGE = 4096
_KEY_BYTES, _FULL_AT = 64, 72


def pixel_key(split: ShardSplit, size: int, subset: np.ndarray | None = None) -> str:
    """64 hexadecimal digits that name all that the pixels of a split, or of a subset of it, depend on."""
    part = "" if subset is None else f", of {hashlib.sha256(np.ascontiguousarray(subset, np.int64)).hexdigest()}"
    return split.fingerprint(f"images of {size} px, decoder {VERSION}{part}")


class ImageCache:
    """The decoded images of a split, as far as there is room; those of the first stimuli are kept.

    It can be passed to a process that is being started, which then shares it.

    Args:
        descriptor: of an open file as described at the top; it is closed with this object.
        size: side of the images in pixels.
        listed: whether the list of holders names this descriptor.
    """

    def __init__(self, descriptor: int, size: int, listed: bool = False):
        self.size = size
        self._descriptor = descriptor
        self.capacity = int.from_bytes(os.pread(descriptor, 8, _KEY_BYTES), "little")
        self._bytes = size * size * 3
        self._start = _start_of_pixels(self.capacity)
        whole = np.frombuffer(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ), np.uint8)
        self._is_full = whole[_FULL_AT : _FULL_AT + 1]
        self._there = whole[PAGE : PAGE + self.capacity]
        self._pixels = whole[self._start :].reshape(self.capacity, self._bytes)
        weakref.finalize(self, _release, descriptor, os.getpid() if listed else None)

    def __getstate__(self) -> dict[str, Any]:
        return {"descriptor": reduction.DupFd(self._descriptor), "size": self.size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["descriptor"].detach(), state["size"])

    def read(self, places: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Copy the images that are there.

        Args:
            places: int64 (b,), of the stimuli in their split.
            out: uint8 (b, size, size, 3), contiguous.

        Returns:
            The rows of `out` whose images are not there, int64.
        """
        rows = out.reshape(len(places), self._bytes)
        there = self.holds(places)
        if there.all():
            np.take(self._pixels, places, axis=0, out=rows, mode="clip")  # any other mode copies twice
            return np.empty(0, np.int64)
        for row in np.flatnonzero(there):
            rows[row] = self._pixels[places[row]]
        return np.flatnonzero(~there)

    def holds(self, places: np.ndarray) -> np.ndarray:
        """Which images are there, bool (b,)."""
        there = places < self.capacity
        there[there] = self._there[places[there]]
        return there

    def write(self, place: int, image: np.ndarray) -> None:
        """Keep an image, uint8 (size, size, 3), contiguous, if there is room for it."""
        if place >= self.capacity or self._there[place] or self._is_full[0]:
            return
        # Written by system calls: on a full disk these fail, where an access to mapped memory ends the process.
        try:
            written = os.pwrite(self._descriptor, image, self._start + place * self._bytes)
            if written == self._bytes:
                os.pwrite(self._descriptor, b"\1", PAGE + place)
                return
            reason = "no space left"
        except OSError as error:
            reason = error.strerror
        self._stop_writing(reason)

    def _stop_writing(self, reason: str) -> None:
        with locks.byte_range(self._descriptor, _FULL_AT):
            if self._is_full[0]:
                return
            os.pwrite(self._descriptor, b"\1", _FULL_AT)
            _say(
                f"{int(self._there.sum()):,} decoded images of {self.size} px are kept and no more ({reason}); "
                "the others are decoded each time"
            )


class ImageCaches:
    """Opens the caches of a run and sees to it that together they stay within its budget.

    Args:
        settings: where images are kept, and how much of them.
        single_pass: whether each image is read only once, so that `auto` keeps none.
    """

    def __init__(self, settings: Loader, single_pass: bool = False):
        self._mode = "ram" if settings.cache == "auto" else settings.cache
        if settings.cache == "auto" and single_pass:
            self._mode = "off"
        self._left = 0 if self._mode == "off" else _budget(self._mode, settings.cache_gib)
        self._open: dict[str, ImageCache] = {}

    def of(self, split: ShardSplit, size: int, subset: np.ndarray | None = None) -> ImageCache | None:
        """The cache of a split's images at `size` px, shared with all who have it open; None where none are kept.

        Of a subset (positions in the split), the images are kept apart from the split's others, by place within it.
        """
        if self._mode == "off":
            return None
        key = pixel_key(split, size, subset)
        if key not in self._open:
            try:
                with _holders() as holders:
                    descriptor = holders.open(key)
                    if descriptor is None:
                        descriptor = self._make(key, len(split) if subset is None else len(subset), size)
                    holders.add(key, descriptor)
                cache = ImageCache(descriptor, size, listed=True)
            except OSError as error:
                _say(f"decoded images are not kept ({error.strerror})")
                self._mode = "off"
                return None
            self._left -= cache.capacity * size * size * 3
            self._open[key] = cache
        return self._open[key]

    def _make(self, key: str, stimuli: int, size: int) -> int:
        image = size * size * 3
        left = max(self._left, 0)
        capacity = min(stimuli, left // image)
        if capacity < stimuli:
            where = "memory" if self._mode == "ram" else "disk space"
            _say(
                f"{capacity:,} of {stimuli:,} decoded images of {size} px fit into {left / GIB:.2g} GiB of {where} "
                "and are kept; the others are decoded each time (loader.cache_gib sets the budget)"
            )
        descriptor = _nameless_file(self._mode)
        os.ftruncate(descriptor, _start_of_pixels(capacity) + capacity * image)
        os.pwrite(descriptor, key.encode() + capacity.to_bytes(8, "little"), 0)
        return descriptor


def _start_of_pixels(capacity: int) -> int:
    return PAGE + -(-capacity // PAGE) * PAGE


def _budget(mode: str, asked_gib: float | None) -> int:
    free = free_memory() if mode == "ram" else shutil.disk_usage(tempfile.gettempdir()).free
    if asked_gib is None:
        return int(DEFAULT_SHARE * free)
    return int(min(asked_gib * GIB, LARGEST_SHARE * free))


def _nameless_file(mode: str) -> int:
    # Not in /dev/shm, which containers limit to 64 MiB by default.
    if mode == "ram" and hasattr(os, "memfd_create"):
        return os.memfd_create("spiketune-images")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _say(message: str) -> None:
    print(f"loader.cache: {message}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------- who holds what


class _Holders:
    """The list of who holds which images: lines "KEY PID FD", locked by whoever has this object."""

    def __init__(self, path: Path | None, file: int | None):
        self._path, self._file = path, file
        text = b"" if file is None else os.pread(file, os.fstat(file).st_size, 0)
        # A kill while the list was written may have left half a line.
        lines = re.findall(rb"^([0-9a-f]{64}) ([0-9]+) ([0-9]+)\n", text, re.MULTILINE)
        self._lines = [(key.decode(), int(pid), int(descriptor)) for key, pid, descriptor in lines]

    def open(self, key: str) -> int | None:
        """A descriptor of our own for the file that holds these images; None where nobody has it."""
        for name, pid, descriptor in self._lines:
            if name == key and (found := _open_of(key, pid, descriptor)) is not None:
                return found
        return None

    def add(self, key: str, descriptor: int) -> None:
        """Say that this process holds it."""
        self._write([*self._living(), (key, os.getpid(), descriptor)])

    def remove(self, pid: int, descriptor: int) -> None:
        """Say that a process no longer holds it."""
        self._write([line for line in self._living() if line[1:] != (pid, descriptor)])

    def _living(self) -> Iterator[tuple[str, int, int]]:
        """The lines that are true: a process that was killed could not remove its own."""
        for line in self._lines:
            if (found := _open_of(*line)) is not None:
                os.close(found)
                yield line

    def _write(self, lines: list[tuple[str, int, int]]) -> None:
        if self._file is None:
            return
        if not lines:
            self._path.unlink()
            return
        text = "".join(f"{key} {pid} {descriptor}\n" for key, pid, descriptor in lines).encode()
        with suppress(OSError):  # a full file system: then nothing more is shared, which is all
            os.pwrite(self._file, text, 0)
            os.ftruncate(self._file, len(text))


def _open_of(key: str, pid: int, descriptor: int) -> int | None:
    """Open another process's descriptor if it is still the file with these images."""
    path = f"/proc/{pid}/fd/{descriptor}"
    with suppress(OSError):
        if stat.S_ISREG(os.stat(path).st_mode):  # the number may have been given to something else, a pipe say
            found = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            if os.pread(found, _KEY_BYTES, 0) == key.encode():
                return found
            os.close(found)
    return None


@contextmanager
def _holders() -> Iterator[_Holders]:
    """Lock the list, which is made when it is needed and removed with its last line."""
    path = _list_path()
    file = _locked(path)
    try:
        yield _Holders(path, file)
    finally:
        if file is not None:
            os.close(file)


def _list_path() -> Path:
    memory = Path("/dev/shm")  # of this machine alone; a temporary folder may be on a network
    folder = memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    return folder / f"spiketune-{os.getuid()}.holders"


def _locked(path: Path) -> int | None:
    """Open and lock a file of ours; None where that name is another user's, and nothing can be shared then."""
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError:
            return None
        locks.lock(file)
        is_ours = os.fstat(file).st_uid == os.getuid()
        with suppress(FileNotFoundError):
            if is_ours and os.path.samestat(os.fstat(file), path.stat()):
                return file
        os.close(file)  # removed by another process while we waited for the lock
        if not is_ours:
            return None


def _release(descriptor: int, listed_as: int | None) -> None:
    if listed_as == os.getpid():  # a fork of the process has the object too, but not its place in the list
        with suppress(OSError), _holders() as holders:
            holders.remove(listed_as, descriptor)
    os.close(descriptor)
