"""What the benchmarks share: options, measurements in turns, commands, JSON files and tables."""

import argparse
import importlib.metadata
import json
import math
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
"""One side of a comparison: runs once and returns its measurements by name."""


def options_of(description: str, *, repeats: int | None = None) -> argparse.ArgumentParser:
    """A parser with the shared options: --json, and --repeats if it has a default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    if repeats is not None:
        parser.add_argument("--repeats", type=int, default=repeats, help="turns to measure")
    return parser


@dataclass(frozen=True)
class Estimate:
    """A median with the 95 % interval that its turns give it: between two of the sorted values (binomial, any law).

    What all turns have in common is not in the interval; a control that compares a side with itself shows it.
    """

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """From one value per turn."""
        ordered, half = sorted(values), 0.98 * math.sqrt(len(values))
        lowest = max(math.floor(len(ordered) / 2 - half), 0)
        return cls(ordered[lowest], statistics.median(ordered), ordered[-1 - lowest])

    def widened(self, control: "Estimate", none: float) -> "Estimate":
        """This estimate, at least as uncertain as a control is far from `none`, which it would be without noise."""
        margin = max(abs(control.low - none), abs(control.high - none))
        return Estimate(min(self.low, self.middle - margin), self.middle, max(self.high, self.middle + margin))


@dataclass(frozen=True)
class Turns:
    """One measurement of every side, turn by turn; the sides of a turn ran right after each other.

    Attributes:
        values: by side, one per turn.
    """

    values: Mapping[str, Sequence[float]]

    def median(self, side: str) -> float:
        """Median of a side over the turns."""
        return statistics.median(self.values[side])

    def spread(self, side: str) -> str:
        """Range of a side over the turns."""
        return f"{number(min(self.values[side]))}-{number(max(self.values[side]))}"

    def ratio(self, side: str, base: str) -> float:
        """Median over the turns of the ratio of two sides."""
        pairs = zip(self.values[side], self.values[base], strict=True)
        return statistics.median(value / reference for value, reference in pairs)

    def added(self, side: str, base: str) -> "Estimate":
        """The difference between two sides: its median over the turns."""
        pairs = zip(self.values[side], self.values[base], strict=True)
        return Estimate.of([value - reference for value, reference in pairs])

    def times(self, side: str, base: str) -> "Estimate":
        """The ratio of two sides: its median over the turns."""
        pairs = zip(self.values[side], self.values[base], strict=True)
        return Estimate.of([value / reference for value, reference in pairs])

    def table(self, unit: str, bases: Mapping[str, str]) -> str:
        """Median, spread and ratios of every side.

        Args:
            unit: of the measurement, used as the title of its column.
            bases: the side that each column of ratios refers to, by title of the column.
        """
        rows = [["", unit, "range", *bases]]
        for side in self.values:
            ratios = [f"{self.ratio(side, base):.3g}" for base in bases.values()]
            rows.append([side, number(self.median(side)), self.spread(side), *ratios])
        return table(rows)


def number(value: float) -> str:
    """Format with four significant digits, or as a whole number from 1000."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def measure_in_turns(
    sides: Mapping[str, Side], repeats: int, *, warm_up: int = 1, shuffle: bool = False
) -> dict[str, Turns]:
    """Run all sides in turns, so that a change in the speed of the machine affects all of them.

    Args:
        sides: by name.
        repeats: turns to measure.
        warm_up: turns before them, which fill caches and are not measured.
        shuffle: draw the order of the sides in every turn, for short measurements that affect each other.

    Returns:
        The turns of each measurement, by name.
    """
    order, draw = list(sides), random.Random(0)
    measured: dict[str, list[Mapping[str, float]]] = {side: [] for side in sides}
    for turn in range(warm_up + repeats):
        if shuffle:
            draw.shuffle(order)
        for side in order:
            measurements = sides[side]()
            if turn >= warm_up:
                measured[side].append(measurements)
    names = next(iter(measured.values()))[0]
    return {name: Turns({side: [run[name] for run in runs] for side, runs in measured.items()}) for name in names}


def write_json(options: argparse.Namespace, results: object) -> None:
    """Write options and results to the file of --json, if given."""
    if options.json is not None:
        settings = {name: str(value) for name, value in vars(options).items()}
        options.json.write_text(json.dumps({"options": settings, "results": results}, indent=1))


def read_results(path: Path) -> Any:
    """The results in a file of `write_json`; None if it is missing or incomplete."""
    try:
        return json.loads(path.read_text())["results"]
    except (OSError, ValueError):
        return None


class CommandFailed(SystemExit):
    """A command failed; the message holds the command and the end of its output."""


def run_checked(words: Sequence[object], cwd: Path = ROOT, **environment: str) -> str:
    """Run a command that must succeed.

    Args:
        words: of the command.
        cwd: folder to run it in.
        environment: variables to add.

    Returns:
        Its standard output.

    Raises:
        CommandFailed: it failed.
    """
    command = [str(word) for word in words]
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise CommandFailed(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.stdout


def run_alone(words: Sequence[object], seconds: float, **environment: str) -> tuple[int | None, str]:
    """Run a command in its own process group, of which nothing survives.

    Args:
        words: of the command, which runs in the root of the repository.
        seconds: time limit, after which it is killed.
        environment: variables to add.

    Returns:
        Its exit code, None if it was killed, and its output.
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


def last_line(text: str) -> str:
    """The last line that is not empty, without spaces at its ends; empty if there is none."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def version_of(package: str) -> str:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns; the first row is the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |" for row in rows]
    return "\n".join([lines[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *lines[1:]])
