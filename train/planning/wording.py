"""Words and lines that the plans of trainings and probes share."""

import socket
from collections.abc import Mapping, Sequence

from train.planning.rates import Place

LARGE = 0.2  # share of the time that is worth doing something about
SMALL = 0.005  # share that is not shown


def duration(seconds: float) -> str:
    """Seconds in words: `0.42 s`, `14 s`, `2 min 5 s`, `3 h 20 min`, `4 d 2 h`."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    for large, small, size in (("d", "h", 86400), ("h", "min", 3600), ("min", "s", 60)):
        if whole >= size:
            rest = (whole % size) * {"d": 24, "h": 60, "min": 60}[large] // size
            return f"{whole // size} {large} {rest} {small}" if rest else f"{whole // size} {large}"
    return f"{whole} s"


def origin(place: Place) -> str:
    """Where the rates come from."""
    count = "process" if place.processes == 1 else "processes"
    device = f"on the CPU, {place.cores} core{'s' * (place.cores > 1)} each" if not place.on_gpu else place.device
    torch = place.versions.get("torch", "?")
    where = f"{', '.join(place.hosts)}, {place.when}: {place.processes} {count}, {device}, torch {torch}"
    if socket.gethostname() not in place.hosts:
        where += f"; this is {socket.gethostname()}, and they hold for machines like {place.hosts[0]}"
    return where


def extrapolation(differences: Sequence[str]) -> list[str]:
    """What differs from what was measured; nothing if nothing does."""
    if not differences:
        return ["measured: this recipe on this many processes"]
    return [f"EXTRAPOLATED by counted operations and bytes, as this was not measured: {'; '.join(differences)}"]


def shares(parts: Mapping[str, float]) -> str:
    """The parts of a time, the largest first, in percent."""
    total = sum(parts.values())
    largest = sorted(parts.items(), key=lambda part: part[1], reverse=True)
    return ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in largest if seconds > SMALL * total)


def lines_of(rows: Mapping[str, str]) -> list[str]:
    """Titles and values below each other."""
    width = max(map(len, rows)) + 2
    return [f"  {title:<{width}}{value}" for title, value in rows.items()]
