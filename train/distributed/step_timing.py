"""Where the time of a step goes, measured without waiting for the device."""

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch

Timestamp = float | torch.cuda.Event


class Span(NamedTuple):
    """A stretch of time of a part; subtracted from it where `end` comes first."""

    part: str
    begin: Timestamp
    end: Timestamp


class StepClock:
    """Times the parts of each step: on a GPU with events in its queue, which are read when they have passed.

    Attributes:
        seconds: by part, of the last step known to be complete; empty before the first.
        now: reads the time on a CPU; on a GPU, puts an event into its queue.

    Args:
        device: where the step is computed.
    """

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = {}
        self._on_gpu = device.type == "cuda"
        self.now: Callable[[], Timestamp] = _event if self._on_gpu else time.perf_counter
        self._open_parts: list[str] = []
        self._spans: list[Span] = []
        self._finished: deque[list[Span]] = deque()  # steps that the device may not have done yet

    def part(self, name: str) -> "_Part":
        """A context that adds the time within its block to a part of this step."""
        return _Part(self, name)

    def count(self, name: str, begin: Timestamp) -> None:
        """Add the time since `begin` to part `name`, and subtract it from the part whose block is open."""
        end = self.now()
        self._spans.append(Span(name, begin, end))
        if self._open_parts:
            self._spans.append(Span(self._open_parts[-1], end, begin))

    def finish_step(self) -> None:
        """The step is over, or all of it is in the device's queue."""
        self._finished.append(self._spans)
        self._spans = []
        while self._finished and (not self._on_gpu or _is_over(self._finished[0])):
            self.seconds = {}
            for part, begin, end in self._finished.popleft():
                self.seconds[part] = self.seconds.get(part, 0.0) + _seconds(begin, end)


class _Part:
    """What `StepClock.part` returns: a class rather than a generator, which costs several times as much."""

    def __init__(self, clock: StepClock, name: str):
        self._clock, self._name = clock, name

    def __enter__(self) -> None:
        self._begin = self._clock.now()
        self._clock._open_parts.append(self._name)

    def __exit__(self, *_: object) -> None:
        self._clock._open_parts.pop()
        self._clock.count(self._name, self._begin)


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _is_over(spans: list[Span]) -> bool:
    events = (stamp for span in spans for stamp in (span.begin, span.end))
    return all(event.query() for event in events if isinstance(event, torch.cuda.Event))


def _seconds(begin: Timestamp, end: Timestamp) -> float:
    """Negative where `end` comes first."""
    if isinstance(begin, float) and isinstance(end, float):
        return end - begin
    assert isinstance(begin, torch.cuda.Event)
    assert isinstance(end, torch.cuda.Event)
    return begin.elapsed_time(end) / 1000
