"""What the processes of a run tell each other with every step, and how they stop together.

A cluster stops a job with a signal, SIGTERM when it needs the machine or SIGUSR1 some time before the limit, and the
signal may reach one process only. If that one simply ended, the others would wait for it in the next collective
operation. So each sends a few numbers with every step and reads, one step later, what all have sent: nobody waits for
the message, and all learn in the same step that one of them was told to stop. It travels over gloo, beside what the
step itself exchanges, and never touches a GPU.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from data_prep.common.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
MEMORY = 0.9  # of the running averages, per step


class Heartbeat:
    """The messages of one process.

    Attributes:
        busy: seconds that each rank needed for its own work of a step, as a running average, float64 (ranks,); the time
            that it waited for others is not in it.

    Args:
        ranks: how many processes there are.
        timeout: how long to wait for the others' messages.
    """

    def __init__(self, ranks: int, timeout: timedelta):
        self.busy = torch.zeros(ranks, dtype=torch.float64)
        self._told = 0
        self._group = dist.new_group(backend="gloo", timeout=timeout) if ranks > 1 else None
        self._heard = torch.zeros(ranks, 2, dtype=torch.float64)
        self._message = torch.zeros(2, dtype=torch.float64)
        self._under_way: dist.Work | None = None

    def beat(self, busy: float | None = None) -> None:
        """Send this rank's message and read those of the step before; every rank must call it as often as the others.

        Args:
            busy: seconds this rank needed for its own work since the last beat; None leaves the averages as they are.

        Raises:
            Stopped: a rank was told to stop; all ranks raise it at the same beat.
            RuntimeError: a rank has ended, or did not send its message in time.
        """
        if self._group is None:
            self._heard[0, 0] = self._told
        elif self._under_way is not None:
            self._under_way.wait()
            if (spent := self._heard[:, 1]).min() >= 0:
                self.busy = torch.where(self.busy == 0, spent, MEMORY * self.busy + (1 - MEMORY) * spent)
        if told := int(self._heard[:, 0].max()):
            raise Stopped(f"stopped by {signal.Signals(told).name}")
        if self._group is not None:
            self._message[0], self._message[1] = self._told, -1.0 if busy is None else busy
            self._under_way = dist.all_gather(list(self._heard), self._message, group=self._group, async_op=True)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM and SIGUSR1 as the wish to stop at the next beat."""
        if threading.current_thread() is not threading.main_thread():
            yield  # signals reach the main thread only
            return
        before = {number: signal.signal(number, self._be_told) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _be_told(self, number: int, _frame: object) -> None:
        self._told = number
