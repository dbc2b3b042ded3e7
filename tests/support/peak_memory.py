"""The memory that a piece of work takes in this process, as the operating system counts it."""

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # from proc(5)
M_MMAP_THRESHOLD = -3  # from malloc.h
LARGE_BLOCK, LARGEST_THRESHOLD = 3 * 2**20, 2**25  # bytes; the latter is what malloc's own threshold grows to


def _kib(name: str) -> int:
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(name))


def peak_of(work: Callable[[], object]) -> int:
    """Bytes of memory of its own that this process had at most above what it had before.

    Pages of libraries come and go as other processes need memory; they are subtracted. The test is skipped where the
    system does not count.
    """
    if sys.platform != "linux":
        pytest.skip("only Linux lets a process reset its peak memory")
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)  # what was freed earlier is not to be used again unseen
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:
        pytest.skip("this system does not let a process reset its peak memory")
    own, of_files = _kib("RssAnon"), _kib("RssFile")
    # What malloc keeps in pieces depends on what ran before, so blocks of this size go straight back to the system.
    libc.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
    try:
        work()
    finally:
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD)
    return 1024 * (_kib("VmHWM") - own - max(of_files, _kib("RssFile")) - _kib("RssShmem"))
