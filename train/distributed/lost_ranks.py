"""Ends a process whose peers are lost while operations with them hang on its GPU.

An operation of nccl that waits for a lost rank never ends, and whoever waits for the GPU waits with it: the host in its
next read or launch, and `destroy_process_group`, which first lets all operations finish. Nccl's own time-out kills the
process without naming a rank.
"""

import atexit
import faulthandler
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from data_prep.common.errors import FAILURE, Stopped
from data_prep.common.terminal import printable

NOTICE_SECONDS = 30.0  # that the main thread has to notice a lost rank itself
END_SECONDS = 60  # that a failed process has to end, before it is ended

# Groups that were left, until the process ends. Otherwise DDP's reducer is the last to hold its group: it frees it
# without releasing the GIL and waits for gloo's threads, one of which may need the GIL to free its last tensor (seen
# with torch 2.9). What Python holds is freed without the GIL.
_left_groups: list[dist.ProcessGroup | None] = []
atexit.register(_left_groups.clear)


class LostRankWatch:
    """A thread that waits for the heartbeat's exchanges and, if one fails, ends the process if nobody else does.

    Args:
        report: tells the other ranks that this one runs, so that it does not count as lost.
        explain: a sentence about the ranks that are lost.
        notice_seconds: that the main thread has to notice the failure.
    """

    def __init__(self, report: Callable[[], None], explain: Callable[[], str], notice_seconds: float = NOTICE_SECONDS):
        self._report, self._explain, self._notice_seconds = report, explain, notice_seconds
        self._exchanges: queue.SimpleQueue[dist.Work | None] = queue.SimpleQueue()
        self._ended = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def follow(self, exchange: dist.Work) -> None:
        """Wait for an exchange too, after those before it."""
        self._exchanges.put(exchange)

    def end(self) -> None:
        """The main thread has noticed, or there is nothing more to watch."""
        self._ended.set()
        self._exchanges.put(None)

    def _run(self) -> None:
        while (exchange := self._exchanges.get()) is not None:
            try:
                exchange.wait()
            except RuntimeError:
                with suppress(RuntimeError):  # the machine that collects the reports may be the one that is lost
                    self._report()
                if not self._ended.wait(self._notice_seconds):
                    print(f"error: {printable(self._explain())}", file=sys.stderr, flush=True)
                    os._exit(FAILURE)  # the main thread cannot be woken
                return


@contextmanager
def leaving_group() -> Iterator[None]:
    """Leave the process group at the end of the block.

    In an orderly end, also of stopped work, operations under way are finished first. After another exception those of
    nccl are aborted, and the group is left as it is where that fails. Whatever hangs then, the process is ended after a
    minute; its message is printed by then.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, Stopped) or not dist.is_initialized() or dist.get_backend() != "nccl":
            _leave_group()
            raise
        faulthandler.dump_traceback_later(END_SECONDS, exit=True)
        with suppress(RuntimeError, ValueError):
            dist.distributed_c10d._abort_process_group()
        raise
    _leave_group()


def _leave_group() -> None:
    if dist.is_initialized():
        _left_groups.append(dist.group.WORLD)
        dist.destroy_process_group()
