"""What the benchmarks share: options, measurements in turns, ratios within a turn, processes, JSON files and tables."""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Side = Callable[[], Mapping[str, float]]
"""One thing that is compared: runs once and returns what was measured, by name."""


def options_of(description: str, *, repeats: int | None = None) -> argparse.ArgumentParser:
    """A parser with the options that benchmarks share: --json, and --repeats where there is a default for it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    if repeats is not None:
        parser.add_argument("--repeats", type=int, default=repeats, help="turns that count")
    return parser


@dataclass(frozen=True)
class Turns:
    """One figure of every side, turn by turn: all sides of a turn met the same machine.

    Attributes:
        values: by side; equally long.
    """

    values: Mapping[str, Sequence[float]]

    def median(self, side: str) -> float:
        """Over the turns."""
        return statistics.median(self.values[side])

    def spread(self, side: str) -> str:
        """Smallest and largest value."""
        return f"{number(min(self.values[side]))}-{number(max(self.values[side]))}"

    def ratio(self, side: str, base: str) -> float:
        """Median of the ratios within a turn."""
        pairs = zip(self.values[side], self.values[base], strict=True)
        return statistics.median(value / reference for value, reference in pairs)

    def added(self, side: str, base: str) -> tuple[float, float, float]:
        """Quartiles of the differences within a turn."""
        pairs = zip(self.values[side], self.values[base], strict=True)
        low, middle, high = statistics.quantiles((value - reference for value, reference in pairs), n=4)
        return low, middle, high

    def table(self, unit: str, bases: Mapping[str, str]) -> str:
        """Median, spread and ratios of every side.

        Args:
            unit: of the figure, the title of its column.
            bases: the side that each column of ratios refers to, by the column's title.
        """
        rows = [["", unit, "range", *bases]]
        for side in self.values:
            ratios = [f"{self.ratio(side, base):.3g}" for base in bases.values()]
            rows.append([side, number(self.median(side)), self.spread(side), *ratios])
        return table(rows)


def number(value: float) -> str:
    """Four digits, or all that are left of the decimal point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def measure_in_turns(
    sides: Mapping[str, Side], repeats: int, *, warm_up: int = 1, shuffle: bool = False
) -> dict[str, Turns]:
    """Run all sides one after the other, several times over, so that a change of the machine's speed meets all of them.

    Args:
        sides: by name.
        repeats: turns that count.
        warm_up: turns before them, which fill caches and do not count.
        shuffle: draw the order of the sides in every turn, for short measurements that disturb each other.

    Returns:
        The turns of each figure that the sides return.
    """
    order, draw = list(sides), random.Random(0)
    measured: dict[str, list[Mapping[str, float]]] = {side: [] for side in sides}
    for turn in range(warm_up + repeats):
        if shuffle:
            draw.shuffle(order)
        for side in order:
            figures = sides[side]()
            if turn >= warm_up:
                measured[side].append(figures)
    names = next(iter(measured.values()))[0]
    return {name: Turns({side: [run[name] for run in runs] for side, runs in measured.items()}) for name in names}


def write_json(options: argparse.Namespace, results: object) -> None:
    """Write options and results to the file of --json, where it was given."""
    if options.json is not None:
        given = {name: str(value) for name, value in vars(options).items()}
        options.json.write_text(json.dumps({"options": given, "results": results}, indent=1))


def read_results(path: Path) -> Any:
    """The results in a file of `write_json`; None where there is no whole one."""
    try:
        return json.loads(path.read_text())["results"]
    except (OSError, ValueError):
        return None


def run_alone(words: Sequence[str | Path], seconds: float, **environment: str) -> tuple[int | None, str]:
    """Run a command in a process group of its own, which ends with it.

    Args:
        words: of the command, run in the repository's root.
        seconds: until it is killed.
        environment: on top of this process's.

    Returns:
        Its exit code, None where it was killed, and what it wrote.
    """
    process = subprocess.Popen(
        [*map(str, words)],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=max(seconds, 0))
        return process.returncode, output
    except subprocess.TimeoutExpired:
        _kill_group(process)
        output, _ = process.communicate()
        return None, output
    finally:
        _kill_group(process)


def _kill_group(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows, the first of which is the header, as a Markdown table with aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |" for row in rows]
    return "\n".join([lines[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *lines[1:]])
