"""Where the time of a step goes, measured without waiting for the device."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

Moment = float | torch.cuda.Event
Spans = dict[str, list[tuple[Moment, Moment]]]


class StepClock:
    """Times the parts of each step: on a GPU with events in its queue, which are read when they have passed.

    Attributes:
        seconds: by part, of the last step that is known to be over; empty before one is.

    Args:
        device: where the step computes.
    """

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = {}
        self._on_gpu = device.type == "cuda"
        self._queue = torch.cuda.current_stream(device) if self._on_gpu else None
        self._open: list[str] = []
        self._spans: Spans = {}
        self._queued: deque[Spans] = deque()

    def now(self) -> Moment:
        """This moment, in what the device is doing."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens inside as a part of this step, added to what the part has already."""
        begin = self.now()
        self._open.append(name)
        try:
            yield
        finally:
            self._open.pop()
        self.count(name, begin)

    def count(self, name: str, begin: Moment) -> None:
        """Count what has happened since a moment as another part than the one under way, which loses it."""
        end = self.now()
        self._spans.setdefault(name, []).append((begin, end))
        if self._open:
            self._spans.setdefault(self._open[-1], []).append((end, begin))

    def finish_step(self) -> None:
        """The step is over, or all of it is in the device's queue."""
        self._queued.append(self._spans)
        self._spans = {}
        while self._queued and self._is_over(self._queued[0]):
            self.seconds = {name: sum(map(_length, spans)) for name, spans in self._queued.popleft().items()}

    def _is_over(self, step: Spans) -> bool:
        return not self._on_gpu or all(moment.query() for spans in step.values() for span in spans for moment in span)


def _length(span: tuple[Moment, Moment]) -> float:
    """Seconds; negative where the end is named first."""
    begin, end = span
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000
