"""Decoded images, cached once per machine and shared by all its processes that read the same ones.

A cache is a file without a name, in memory or on disk. The kernel frees it when the last process that has it open ends,
in whatever way, so nothing has to be cleaned up after a kill. A process that starts later opens it through
/proc/PID/fd/FD of one that has it open; one small file, guarded by a lock, lists these processes (`_Holders`).

Whichever process decodes an image first writes it. Two processes may write the same one: they write the same bytes.

    0            key (64 bytes), number of images it has room for (int64), whether the disk is full (uint8)
    4096         uint8 (images,), 1 once an image is present
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
DEFAULT_FRACTION = 0.5  # of the free memory or disk space
LARGEST_FRACTION = 0.9  # whatever loader.cache_gib says
PAGE = 4096
_KEY_BYTES, _FULL_OFFSET = 64, 72


def pixel_key(split: ShardSplit, size: int, subset: np.ndarray | None = None) -> str:
    """64 hexadecimal digits that identify everything on which the pixels of a split, or a subset of it, depend."""
    purpose = f"images of {size} px, decoder {VERSION}"
    if subset is not None:
        purpose += f", of {hashlib.sha256(np.ascontiguousarray(subset, np.int64).data).hexdigest()}"
    return split.fingerprint(purpose)


class ImageCache:
    """The decoded images of a split, or of as many of its first stimuli as fit.

    It can be passed to a process that is being started, to share it.

    Args:
        descriptor: of an open file as described above; it is closed with this object.
        size: side of the images in pixels.
        listed: whether the list of holders names this descriptor.
    """

    def __init__(self, descriptor: int, size: int, listed: bool = False):
        self._open(descriptor, size)
        weakref.finalize(self, _release, descriptor, os.getpid() if listed else None)

    def _open(self, descriptor: int, size: int) -> None:
        self.size = size
        self._descriptor = descriptor
        self.capacity = int.from_bytes(os.pread(descriptor, 8, _KEY_BYTES), "little")
        self._bytes = size * size * 3
        self._start = _start_of_pixels(self.capacity)
        file = np.frombuffer(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ), np.uint8)
        self._is_full = file[_FULL_OFFSET : _FULL_OFFSET + 1]
        self._present = file[PAGE : PAGE + self.capacity]
        self._pixels = file[self._start :].reshape(self.capacity, self._bytes)

    def __getstate__(self) -> dict[str, Any]:
        return {"descriptor": reduction.DupFd(self._descriptor), "size": self.size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        descriptor = state["descriptor"].detach()
        self._open(descriptor, state["size"])
        weakref.finalize(self, _release, descriptor, None)

    def read(self, positions: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Copy the images that are present.

        Args:
            positions: int64 (b,), of the stimuli in their split.
            out: uint8 (b, size, size, 3), contiguous.

        Returns:
            The rows of `out` whose images are missing, int64.
        """
        rows = out.reshape(len(positions), self._bytes)
        present = self.holds(positions)
        if present.all():
            np.take(self._pixels, positions, axis=0, out=rows, mode="clip")  # any other mode copies twice
            return np.empty(0, np.int64)
        for row in np.flatnonzero(present):
            rows[row] = self._pixels[positions[row]]
        return np.flatnonzero(~present)

    def holds(self, positions: np.ndarray) -> np.ndarray:
        """Which images are present, bool (b,)."""
        present = positions < self.capacity
        present[present] = self._present[positions[present]]
        return present

    def write(self, position: int, image: np.ndarray) -> None:
        """Store an image, uint8 (size, size, 3), contiguous, if there is room for it."""
        if position >= self.capacity or self._present[position] or self._is_full[0]:
            return
        # By system calls, which fail on a full disk; writing to mapped memory there would end the process.
        try:
            written = os.pwrite(self._descriptor, image.data, self._start + position * self._bytes)
            if written == self._bytes:
                os.pwrite(self._descriptor, b"\1", PAGE + position)
                return
            reason = "no space left"
        except OSError as error:
            reason = str(error.strerror)
        self._stop_writing(reason)

    def _stop_writing(self, reason: str) -> None:
        with locks.byte_range(self._descriptor, _FULL_OFFSET):
            if self._is_full[0]:
                return
            os.pwrite(self._descriptor, b"\1", _FULL_OFFSET)
            _warn(
                f"{int(self._present.sum()):,} decoded images of {self.size} px are cached, and no more ({reason}); "
                "the others are decoded each time"
            )


class ImageCaches:
    """Opens the caches of a run, which together stay within its budget.

    Args:
        settings: where images are cached, and how many bytes of them.
        single_pass: whether each image is read only once, so that `auto` caches none.
    """

    def __init__(self, settings: Loader, single_pass: bool = False):
        self._mode = "ram" if settings.cache == "auto" else settings.cache
        if settings.cache == "auto" and single_pass:
            self._mode = "off"
        self._bytes_left = 0 if self._mode == "off" else _budget(self._mode, settings.cache_gib)
        self._open: dict[str, ImageCache] = {}

    def open(self, split: ShardSplit, size: int, subset: np.ndarray | None = None) -> ImageCache | None:
        """The cache of a split's images at `size` px, shared between processes; None where none are cached.

        Args:
            split: opened shards.
            size: side of the images in pixels.
            subset: positions in the split; its images are cached apart from the others, by position within it.
        """
        if self._mode == "off":
            return None
        key = pixel_key(split, size, subset)
        if key not in self._open:
            try:
                with _holders() as holders:
                    descriptor = holders.open(key)
                    if descriptor is None:
                        descriptor = self._create(key, len(split) if subset is None else len(subset), size)
                    holders.add(key, descriptor)
                cache = ImageCache(descriptor, size, listed=True)
            except OSError as error:
                _warn(f"decoded images are not cached ({error.strerror})")
                self._mode = "off"
                return None
            self._bytes_left -= cache.capacity * size * size * 3
            self._open[key] = cache
        return self._open[key]

    def _create(self, key: str, stimuli: int, size: int) -> int:
        image_bytes = size * size * 3
        left = max(self._bytes_left, 0)
        capacity = min(stimuli, left // image_bytes)
        if capacity < stimuli:
            where = "memory" if self._mode == "ram" else "disk space"
            _warn(
                f"{capacity:,} of {stimuli:,} decoded images of {size} px fit into {left / GIB:.2g} GiB of {where} "
                "and are cached; the others are decoded each time (loader.cache_gib sets the budget)"
            )
        descriptor = _nameless_file(self._mode)
        os.ftruncate(descriptor, _start_of_pixels(capacity) + capacity * image_bytes)
        os.pwrite(descriptor, key.encode() + capacity.to_bytes(8, "little"), 0)
        return descriptor


def _start_of_pixels(capacity: int) -> int:
    return PAGE + -(-capacity // PAGE) * PAGE


def _budget(mode: str, limit_gib: float | None) -> int:
    free = free_memory() if mode == "ram" else shutil.disk_usage(tempfile.gettempdir()).free
    if limit_gib is None:
        return int(DEFAULT_FRACTION * free)
    return int(min(limit_gib * GIB, LARGEST_FRACTION * free))


def _nameless_file(mode: str) -> int:
    # Not in /dev/shm, which containers limit to 64 MiB by default.
    if mode == "ram" and hasattr(os, "memfd_create"):
        return os.memfd_create("spiketune-images")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _warn(message: str) -> None:
    print(f"loader.cache: {message}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------ which processes hold a cache


class _Holders:
    """The list of the processes that have caches open, as lines "KEY PID FD"; its file stays locked meanwhile.

    Args:
        path: of the file.
        file: its descriptor; None where it cannot be used, and nothing is shared.
    """

    def __init__(self, path: Path, file: int | None):
        self._path, self._file = path, file
        text = b"" if file is None else os.pread(file, os.fstat(file).st_size, 0)
        # A process that was killed while it wrote the list may have left half a line.
        lines = re.findall(rb"^([0-9a-f]{64}) ([0-9]+) ([0-9]+)\n", text, re.MULTILINE)
        self._lines = [(key.decode(), int(pid), int(descriptor)) for key, pid, descriptor in lines]

    def open(self, key: str) -> int | None:
        """A new descriptor of the cache of these images; None where no process has it open."""
        for name, pid, descriptor in self._lines:
            if name == key and (ours := _open_of(key, pid, descriptor)) is not None:
                return ours
        return None

    def add(self, key: str, descriptor: int) -> None:
        """List this process."""
        self._write([*self._valid_lines(), (key, os.getpid(), descriptor)])

    def remove(self, pid: int, descriptor: int) -> None:
        """Remove a process from the list."""
        self._write([line for line in self._valid_lines() if line[1:] != (pid, descriptor)])

    def _valid_lines(self) -> Iterator[tuple[str, int, int]]:
        """The lines that are still true: a process that was killed could not remove its own."""
        for line in self._lines:
            if (ours := _open_of(*line)) is not None:
                os.close(ours)
                yield line

    def _write(self, lines: list[tuple[str, int, int]]) -> None:
        if self._file is None:
            return
        if not lines:
            self._path.unlink()
            return
        text = "".join(f"{key} {pid} {descriptor}\n" for key, pid, descriptor in lines).encode()
        with suppress(OSError):  # a full file system; the only consequence is that nothing more is shared
            os.pwrite(self._file, text, 0)
            os.ftruncate(self._file, len(text))


def _open_of(key: str, pid: int, descriptor: int) -> int | None:
    """Open another process's descriptor if it still is the cache of these images."""
    path = f"/proc/{pid}/fd/{descriptor}"
    with suppress(OSError):
        if stat.S_ISREG(os.stat(path).st_mode):  # the number may have been reused, for a pipe for instance
            ours = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            if os.pread(ours, _KEY_BYTES, 0) == key.encode():
                return ours
            os.close(ours)
    return None


@contextmanager
def _holders() -> Iterator[_Holders]:
    """Lock the list, which is created when it is needed and removed with its last line."""
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
    """Open and lock a file of this user; None where it belongs to another user, and nothing can be shared."""
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
    if listed_as == os.getpid():  # a fork of the process has the object too, but is not in the list
        with suppress(OSError), _holders() as holders:
            holders.remove(listed_as, descriptor)
    os.close(descriptor)
