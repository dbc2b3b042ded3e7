"""DeepSpeed's collective operations, timed.

DeepSpeed can log them itself (`comms_logger`), but puts a barrier before each then, and so changes what it measures.
"""

from collections.abc import Callable
from typing import Any

from train.distributed.step_timing import StepClock

OPERATIONS = (
    *("all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor", "broadcast"),
    *("all_gather", "all_gather_into_tensor", "all_gather_coalesced", "all_to_all_single", "barrier"),
)


class TimedBackend:
    """A backend of `deepspeed.comm` whose operations count as communication: until they return, or are waited for.

    Args:
        backend: does the work.
        clock: of the steps.
    """

    def __init__(self, backend: Any, clock: StepClock):
        self.timed, self._clock = backend, clock

    def __getattr__(self, name: str) -> Any:
        """Whatever the backend has; its operations timed."""
        found = getattr(self.timed, name)
        if name in OPERATIONS:
            found = self._counting(found)
            setattr(self, name, found)
        return found

    def _counting(self, operation: Callable) -> Callable:
        def counted(*args, **kw):
            begin = self._clock.now()
            work = operation(*args, **kw)
            self._clock.count_communication(begin)
            return work if work is None else _TimedWork(work, self._clock)

        return counted


class _TimedWork:
    """An operation that is under way."""

    def __init__(self, work: Any, clock: StepClock):
        self._work, self._clock = work, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)

    def wait(self, *args, **kw) -> Any:
        """Wait for it, on the host or in the GPU's queue."""
        begin = self._clock.now()
        done = self._work.wait(*args, **kw)
        self._clock.count_communication(begin)
        return done


def time_collectives(clock: StepClock) -> None:
    """Time all operations that DeepSpeed starts in this process from now on."""
    from deepspeed.comm import comm

    backend = comm.cdb.timed if isinstance(comm.cdb, TimedBackend) else comm.cdb
    comm.cdb = TimedBackend(backend, clock)
