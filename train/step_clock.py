"""Where the time of a step goes, measured without waiting for the device."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

Span = tuple[torch.cuda.Event, torch.cuda.Event]


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
        self._own: dict[str, float] = {}
        self._spans: dict[str, list[Span]] = {}
        self._queued: deque[dict[str, list[Span]]] = deque()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens inside as a part of this step, added to what the part has already."""
        if self._on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._spans.setdefault(name, []).append((begin, end))
        else:
            begin = time.perf_counter()
            yield
            self._own[name] = self._own.get(name, 0.0) + time.perf_counter() - begin

    def finish_step(self) -> None:
        """The step is over, or all of it is in the device's queue."""
        if not self._on_gpu:
            self.seconds, self._own = self._own, {}
            return
        self._queued.append(self._spans)
        self._spans = {}
        while self._queued and all(end.query() for spans in self._queued[0].values() for _, end in spans):
            passed = self._queued.popleft()
            self.seconds = {
                name: sum(begin.elapsed_time(end) for begin, end in spans) / 1000 for name, spans in passed.items()
            }
