"""Where the time of a step goes, measured without waiting for the device."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

Timestamp = float | torch.cuda.Event
Spans = dict[str, list[tuple[Timestamp, Timestamp]]]  # by part, the begin and end of each stretch of time


class StepClock:
    """Times the parts of each step: on a GPU with events in its queue, which are read when they have passed.

    Attributes:
        seconds: by part, of the last step known to be complete; empty before the first.

    Args:
        device: where the step is computed.
    """

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = {}
        self._on_gpu = device.type == "cuda"
        self._open_parts: list[str] = []
        self._spans: Spans = {}
        self._finished: deque[Spans] = deque()  # steps that the device may not have done yet

    def now(self) -> Timestamp:
        """The time on a CPU, an event in the GPU's queue on a GPU."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time within the block to a part of this step."""
        begin = self.now()
        self._open_parts.append(name)
        try:
            yield
        finally:
            self._open_parts.pop()
        self.count(name, begin)

    def count(self, name: str, begin: Timestamp) -> None:
        """Add the time since `begin` to part `name`, and subtract it from the part whose block is open."""
        end = self.now()
        self._spans.setdefault(name, []).append((begin, end))
        if self._open_parts:
            self._spans.setdefault(self._open_parts[-1], []).append((end, begin))

    def finish_step(self) -> None:
        """The step is over, or all of it is in the device's queue."""
        self._finished.append(self._spans)
        self._spans = {}
        while self._finished and _is_over(self._finished[0]):
            step = self._finished.popleft()
            self.seconds = {name: sum(_seconds(begin, end) for begin, end in spans) for name, spans in step.items()}


def _is_over(step: Spans) -> bool:
    events = (stamp for spans in step.values() for span in spans for stamp in span)
    return all(event.query() for event in events if isinstance(event, torch.cuda.Event))


def _seconds(begin: Timestamp, end: Timestamp) -> float:
    """Negative where `end` comes first."""
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return begin.elapsed_time(end) / 1000
    assert isinstance(begin, float)
    assert isinstance(end, float)
    return end - begin
