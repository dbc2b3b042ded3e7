"""How many decoding processes the system has room for: their batches lie in shared memory, each tensor an open file."""

import os
import resource
import sys
from pathlib import Path

from train.distributed.launch_environment import this_process

SHARED_MEMORY = Path("/dev/shm")
SHARE = 0.5  # of the free shared memory: NCCL and other jobs use it too
PREFETCHED = 4  # batches per decoding process that are ready or in the making
IN_USE = 3  # more: on their way to the device
TENSORS = 6  # of a batch
FILES_OF_RANK, FILES_PER_WORKER = 128, 8  # that are open beside those


def workers_within_limits(workers: int, stimuli: int, size: int) -> int:
    """As many decoding processes per rank as there is room for, at most `workers`; says so where these are fewer.

    Args:
        workers: that are wanted.
        stimuli: in the largest batch that they hand over.
        size: side in pixels of its images.
    """
    ranks = this_process().ranks_on_machine
    limits = {
        "loader.workers: /dev/shm has room for the batches of": _with_shared_memory(
            workers, stimuli * size**2 * 3, ranks
        ),
        "loader.workers: the limit of open files (ulimit -n) is enough for": _with_open_files(workers),
    }
    reason, fewest = min(limits.items(), key=lambda limit: limit[1])
    if fewest < workers and this_process().local_rank == 0:
        advice = "give it more (docker run --shm-size 8g)" if "shm" in reason else "raise it"
        print(f"{reason} {fewest} of {workers} decoding processes per rank; {advice}", file=sys.stderr, flush=True)
    return fewest


def _with_shared_memory(workers: int, batch_bytes: int, ranks: int) -> int:
    free = free_shared_memory()
    if free is None:
        return workers
    batches = int(SHARE * free / ranks / batch_bytes) - IN_USE
    return min(workers, max(batches // PREFETCHED, 0))


def free_shared_memory() -> int | None:
    """Bytes that are free in /dev/shm; None where there is no such folder."""
    try:
        state = os.statvfs(SHARED_MEMORY)
    except OSError:  # not Linux
        return None
    return state.f_bavail * state.f_frsize


def _with_open_files(workers: int) -> int:
    per_worker = PREFETCHED * TENSORS + FILES_PER_WORKER
    needed = FILES_OF_RANK + IN_USE * TENSORS + workers * per_worker
    limit = raise_open_files(needed)
    if limit >= needed:
        return workers
    return max((limit - needed) // per_worker + workers, 0)


def raise_open_files(needed: int) -> int:
    """Raise this process's limit of open files as far as it is needed and allowed; returns the limit."""
    soft, hard = (sys.maxsize if n == resource.RLIM_INFINITY else n for n in resource.getrlimit(resource.RLIMIT_NOFILE))
    if soft < needed and soft < hard:
        soft, most = min(needed, hard), resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, most))
    return soft
