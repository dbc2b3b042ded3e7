"""Decoded images, cached once per machine and shared by all its processes that read the same ones.

A cache is a file without a name, in memory or on disk, which vanishes with the last process that has it open
(`cache_holders.py`). Whichever process decodes an image first writes it. Two processes may write the same one: they
write the same bytes.

    0              key (64 bytes), number of images it has room for (int64), whether the disk is full (uint8)
    4096           uint8 (images,), 1 once an image is present
    then           uint8 (huge pages,), see `mapped_file.py`
    2 MiB or more  uint8 (images, size, size, 3)
"""

import hashlib
import os
import shutil
import sys
import tempfile
import weakref
from contextlib import suppress
from multiprocessing import reduction
from typing import Any

import numpy as np

from data_prep.common import locks
from data_prep.shards.folder import ShardSplit
from train.data.cache_holders import KEY_BYTES, listed_holders
from train.data.decoding import VERSION
from train.data.free_memory import free_memory
from train.data.mapped_file import HUGE_PAGE, HugePages, MappedFile
from train.run.recipe import Loader

GIB = 2**30
DEFAULT_FRACTION = 0.5  # of the free memory or disk space
LARGEST_FRACTION = 0.9  # whatever loader.cache_gib says
PAGE = 4096
LAYOUT = 2  # version of the above: another version of this program may be running
_FULL_OFFSET = KEY_BYTES + 8


def pixel_key(split: ShardSplit, size: int, subset: np.ndarray | None = None) -> str:
    """64 hexadecimal digits that identify everything on which the pixels of a split, or a subset of it, depend."""
    purpose = f"images of {size} px, decoder {VERSION}, cache {LAYOUT}"
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
        self.capacity = int.from_bytes(os.pread(descriptor, 8, KEY_BYTES), "little")
        self._bytes = size * size * 3
        self._start, huge_pages = _layout(self.capacity, self._bytes)
        file = MappedFile(descriptor)
        self._is_full = file.bytes[_FULL_OFFSET : _FULL_OFFSET + 1]
        self._present = file.bytes[PAGE : PAGE + self.capacity]
        self._huge_pages = HugePages(file, self._start, PAGE + self.capacity, huge_pages)
        self._pixels = file.bytes[self._start :].reshape(self.capacity, self._bytes)

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
        start = position * self._bytes
        try:
            if self._huge_pages.hold(start, start + self._bytes):
                self._pixels[position] = image.reshape(-1)
            # By a system call, which fails where there is no room; writing to mapped memory would end the process.
            elif os.pwrite(self._descriptor, image.data, self._start + start) < self._bytes:
                return self._stop_writing("no space left")
            os.pwrite(self._descriptor, b"\1", PAGE + position)
        except OSError as error:
            self._stop_writing(str(error.strerror))

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
                with listed_holders() as holders:
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
        os.ftruncate(descriptor, _layout(capacity, image_bytes)[0] + capacity * image_bytes)
        os.pwrite(descriptor, key.encode() + capacity.to_bytes(8, "little"), 0)
        return descriptor


def _layout(capacity: int, image_bytes: int) -> tuple[int, int]:
    """Where in the file the images start, and how many whole huge pages they fill."""
    huge_pages = capacity * image_bytes // HUGE_PAGE
    return -(-(PAGE + capacity + huge_pages) // HUGE_PAGE) * HUGE_PAGE, huge_pages


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


def _release(descriptor: int, listed_as: int | None) -> None:
    if listed_as == os.getpid():  # a fork of the process has the object too, but is not in the list
        with suppress(OSError), listed_holders() as holders:
            holders.remove(listed_as, descriptor)
    os.close(descriptor)
