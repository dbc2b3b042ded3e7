"""Worker processes that do not outlive their parent."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading


def usable_cores() -> int:
    """Cores that this process may use; a job scheduler can grant fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def serve_parent(*_: object) -> None:
    """Call this first in a worker process: it leaves Ctrl-C to the parent, and ends when the parent is gone.

    A killed parent cannot stop its workers; they would wait for work forever and keep its files open.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "this process was not started by multiprocessing"
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
