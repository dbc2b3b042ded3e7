"""The memory that a piece of work takes, as the operating system counts it, in a process of its own.

In the process of the tests, what malloc has kept of earlier tests comes and goes.
"""

import ctypes
import gc
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from forked_python import forked_python
from helpers import ROOT

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # from proc(5)
M_MMAP_THRESHOLD = -3  # from malloc.h
LARGE_BLOCK = 3 * 2**20  # bytes; such blocks go straight back to the system, whatever else malloc keeps


def peak_of(prepare: Callable[..., Callable[[], object]], *arguments: object) -> int:
    """Bytes of memory of its own that a process had at most above what it had before a piece of work.

    The test is skipped where the system does not count.

    Args:
        prepare: a function of a test's file that returns the work; what it does itself does not count.
        arguments: for `prepare`, as JSON can hold them.
    """
    if sys.platform != "linux" or not os.access(CLEAR, os.W_OK):
        pytest.skip("this system does not let a process reset its peak memory")
    code = prepare.__code__
    words = [forked_python(), __file__, code.co_filename, code.co_name, json.dumps(arguments)]
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def _peak_here(work: Callable[[], object]) -> int:
    """See `peak_of`. Pages of libraries come and go as other processes need memory; they are subtracted."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text(RESET_PEAK)
    own, of_files = _kib("RssAnon"), _kib("RssFile")
    work()
    return 1024 * (_kib("VmHWM") - own - max(of_files, _kib("RssFile")) - _kib("RssShmem"))


def _kib(name: str) -> int:
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(name))


if __name__ == "__main__":
    file, name, given = sys.argv[1:]
    print(_peak_here(runpy.run_path(file)[name](*json.loads(given))))
