"""A file of shared memory as an array, in pages of 2 MiB where the kernel can give them.

Fresh memory costs more than the copy into it: the kernel finds, clears and accounts for it page by page. Pages of 2 MiB
instead of 4 KiB make that three times as fast. By default shared memory gets none, whatever a program advises, but
MADV_COLLAPSE (Linux 6.1) makes them on request. Where memory is fragmented, the kernel first moves other pages out of
the way, which costs more than it saves; then most of the file keeps small pages. Where any of this is missing, the file
is an ordinary mapping.
"""

import ctypes
import mmap
import os
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

HUGE_PAGE = 2**21
_HUGE_PAGE_OF_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")  # 512 MiB where pages have 64 KiB
_MADV_COLLAPSE = 25
_MAP_FIXED = 0x10
_MAP_FAILED = 2 ** (8 * ctypes.sizeof(ctypes.c_void_p)) - 1
_UNTRIED, _HUGE, _SMALL = range(3)
_EXPENSIVE = 0.6e-3  # seconds of processor time: what a page of 2 MiB saves
_MOST_SKIPPED = 64


class MappedFile:
    """A whole file, readable and writable.

    Attributes:
        bytes: its content, uint8.

    Args:
        descriptor: of the open file, in memory or on a disk; the caller closes it.
    """

    def __init__(self, descriptor: int):
        self.descriptor, size = descriptor, os.fstat(descriptor).st_size
        self._memory, self._offset = _aligned(descriptor, size) or (mmap.mmap(descriptor, size), 0)
        self.bytes = np.frombuffer(self._memory, np.uint8, size, self._offset)

    def make_huge(self, start: int) -> bool:
        """Put 2 MiB of the file into one page, in memory that is there from then on; returns whether that worked.

        Args:
            start: position in the file, a multiple of 2 MiB.
        """
        if not self._offset:
            return False
        _ = self.bytes[start]  # reading makes the first small page; without any there is nothing to merge
        with suppress(OSError):
            self._memory.madvise(_MADV_COLLAPSE, self._offset + start, HUGE_PAGE)
            return True
        return False


class HugePages:
    """Makes huge pages of a part of a file when they are first needed.

    Args:
        file: the file.
        start: of the part, a multiple of 2 MiB.
        states_at: where the file holds the state of each whole 2 MiB of the part, a byte each, 0 at first. All
            processes that use the file share these.
        count: how many there are.
    """

    def __init__(self, file: MappedFile, start: int, states_at: int, count: int):
        self._file, self._start, self._states_at = file, start, states_at
        self._states = file.bytes[states_at : states_at + count]
        self._to_skip = self._skipped = 0

    def hold(self, start: int, stop: int) -> bool:
        """Whether the bytes from `start` to `stop` of the part lie in huge pages.

        Writing there is safe. Elsewhere, writing to mapped memory ends the process if there is no memory left.
        """
        numbers = range(start // HUGE_PAGE, (stop - 1) // HUGE_PAGE + 1)
        return all(self._is_huge(number) for number in numbers)

    def _is_huge(self, number: int) -> bool:
        if number >= len(self._states):
            return False
        if self._states[number] == _UNTRIED:
            state = _HUGE if self._make(number) else _SMALL
            os.pwrite(self._file.descriptor, bytes([state]), self._states_at + number)
        return bool(self._states[number] == _HUGE)

    def _make(self, number: int) -> bool:
        """Make one, unless those before were expensive: after each such one, twice as many are left out."""
        if self._to_skip:
            self._to_skip -= 1
            return False
        started = time.thread_time()
        made = self._file.make_huge(self._start + number * HUGE_PAGE)
        is_expensive = time.thread_time() - started > _EXPENSIVE
        self._to_skip = self._skipped = min(2 * self._skipped + 1, _MOST_SKIPPED) if is_expensive else 0
        return made


def _aligned(descriptor: int, size: int) -> tuple[mmap.mmap, int] | None:
    """Map a file at an address that is a multiple of a huge page, as huge pages must be; None where that is in vain.

    Returns:
        Reserved addresses, of which the file takes a part, and where in them it starts.
    """
    try:
        # On a disk that is full, a write to mapped memory would end the process, in pages of any size.
        is_in_memory = os.readlink(f"/proc/self/fd/{descriptor}").startswith("/memfd:")
        if not is_in_memory or int(_HUGE_PAGE_OF_KERNEL.read_text()) != HUGE_PAGE:
            return None
        reserved = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError):
        return None
    first = np.frombuffer(reserved, np.uint8).ctypes.data
    offset = HUGE_PAGE - first % HUGE_PAGE
    map_at = ctypes.CDLL(None).mmap
    map_at.restype = ctypes.c_void_p
    map_at.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    access, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED
    return None if map_at(first + offset, size, access, flags, descriptor, 0) == _MAP_FAILED else (reserved, offset)
