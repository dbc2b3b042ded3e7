"""How a report writes scores, intervals, durations and sizes."""

from collections.abc import Sequence


def number(value: float | None) -> str:
    """A score: 0.123."""
    return "-" if value is None else f"{value:.3f}"


def interval(ends: Sequence[float] | None) -> str:
    """An interval: [0.123, 0.456]; empty where there is none."""
    return "" if ends is None else f"[{ends[0]:.3f}, {ends[1]:.3f}]"


def duration(seconds: float | None) -> str:
    """A duration in its largest unit: 45 s, 12 min, 3.2 h."""
    if seconds is None:
        return "-"
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}" if seconds < 10 * length else f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def parameter_count(parameters: int) -> str:
    """A number of parameters: 840, 84 k, 25.6 M."""
    if parameters >= 1e6:
        return f"{parameters / 1e6:.1f} M"
    return f"{parameters / 1e3:.0f} k" if parameters >= 1e4 else f"{parameters:,}"
