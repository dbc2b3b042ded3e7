"""Which calls make the host wait for the GPU, and how often: torch warns of each."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

WARNING = "called a synchronizing CUDA operation"  # torch's words
NAMED = 4  # places in a report


@contextmanager
def record_waits(device: torch.device) -> Iterator[list[str]]:
    """Record the place, FILE:LINE, of each call that makes the host wait; on a CPU there are none.

    torch does not see all: not those of torch.distributed, of extensions, and of copies from memory that is not pinned.
    """
    places: list[str] = []
    if device.type != "cuda":
        yield places
        return
    torch.cuda.synchronize(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
            places += [place_of(warning) for warning in caught if WARNING in str(warning.message)]


def place_of(warning: warnings.WarningMessage) -> str:
    """Where a warning was raised: the last three parts of the path, and the line."""
    return f"{'/'.join(Path(warning.filename).parts[-3:])}:{warning.lineno}"


def waits_of(steps: int, step: Callable[[], object], device: torch.device) -> tuple[float, str]:
    """The number of waits in a step, on average over `steps` of them, and the places that wait most often."""
    with record_waits(device) as places:
        for _ in range(steps):
            step()
    common = Counter(places).most_common(NAMED)
    return len(places) / steps, ", ".join(f"{place} x{times / steps:g}" for place, times in common)
