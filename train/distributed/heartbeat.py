"""A small message that all ranks exchange at every step, so that they stop together.

A cluster stops a job with SIGTERM when it needs the machine, or with SIGUSR1 some time before the limit, and the signal
may reach one process only. If that process simply ended, the others would wait for it in their next collective
operation. So each rank sends a message with every step and reads, one step later, what all ranks have sent: no rank
waits for a message, and all ranks learn of the signal in the same step. Messages travel over gloo, beside the step's
own communication, and never touch a GPU.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from data_prep.common.errors import Stopped
from train.distributed.lost_ranks import LostRankWatch

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SMOOTHING = 0.9  # of the running averages, per step


class Heartbeat:
    """Sends this rank's messages to the others, and receives theirs.

    Attributes:
        work_seconds: time that each rank works in a step, without waiting for the others; a running average, float64
            (ranks,).
        watch: told of every exchange; None for nobody.

    Args:
        ranks: number of processes.
        timeout: how long to wait for the others' messages.
    """

    def __init__(self, ranks: int, timeout: timedelta):
        self.work_seconds = np.zeros(ranks)
        self.watch: LostRankWatch | None = None
        self._signal = 0  # the number of the signal that this rank has received
        self._group = _gloo_group(timeout) if ranks > 1 else None
        # Of each rank: its signal, its seconds of work. What is computed with them is computed with numpy, which is
        # quicker for a few numbers; the arrays share memory with the tensors that are exchanged.
        self._received, self._sent = np.zeros((ranks, 2)), np.zeros(2)
        self._incoming, self._outgoing = list(torch.from_numpy(self._received)), torch.from_numpy(self._sent)
        self._exchange: dist.Work | None = None  # under way

    def beat(self, work_seconds: float | None = None) -> None:
        """Send this rank's message and read those of the last beat; every rank must call it equally often.

        Args:
            work_seconds: time that this rank has worked since the last beat; None leaves the averages unchanged.

        Raises:
            Stopped: a rank has received a signal; all ranks raise it at the same beat.
            RuntimeError: a rank has ended, or did not send its message in time.
        """
        if self._group is None:
            _stop_if(self._signal)
            return
        if self._exchange is not None:
            self._exchange.wait()
            self._update_averages(self._received[:, 1])
        _stop_if(int(self._received[:, 0].max()))
        self._sent[:] = self._signal, -1.0 if work_seconds is None else work_seconds
        self._exchange = dist.all_gather(self._incoming, self._outgoing, group=self._group, async_op=True)
        if self.watch is not None and self._exchange is not None:
            self.watch.follow(self._exchange)

    def _update_averages(self, seconds: np.ndarray) -> None:
        if seconds.min() >= 0:
            average = SMOOTHING * self.work_seconds + (1 - SMOOTHING) * seconds
            self.work_seconds = np.where(self.work_seconds == 0, seconds, average)

    @contextmanager
    def stop_on_signals(self) -> Iterator[None]:
        """Within the block, SIGTERM and SIGUSR1 stop all ranks at one of the next beats."""
        if threading.current_thread() is not threading.main_thread():
            yield  # signals reach the main thread only
            return
        before = {number: signal.signal(number, self._note_signal) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note_signal(self, number: int, _frame: object) -> None:
        self._signal = number


def _stop_if(received: int) -> None:
    """Stop if a rank has received a signal: its number, else 0."""
    if received:
        raise Stopped(f"stopped by {signal.Signals(received).name}")


def _gloo_group(timeout: timedelta) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)  # it is an int only in a process outside the group
    return group
