"""The results of a search, as train/sweep.py has written them: its trials, and the best one."""

from dataclasses import dataclass
from pathlib import Path

from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import csv_lines, read_regular_file
from data_prep.common.terminal import printable
from train.sweeping.sweep_folder import SweepFolder

MOST_ROWS = 50
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class SweepResults:
    """The results of a search.

    Attributes:
        name: of its folder.
        header, rows: its table, the best trial first.
        summary: its progress, in a sentence.
        figure: heatmap.png; None before it is drawn.
        best: run folder of the best trial; None before a trial has ended.
        failed: the number of trials that failed.
    """

    name: str
    header: list[str]
    rows: list[list[str]]
    summary: str
    figure: bytes | None
    best: Path | None
    failed: int


def is_sweep(path: Path) -> bool:
    """Whether a folder was made by train/sweep.py."""
    return SweepFolder(path).sweep.is_file()


def read_sweep(path: Path) -> SweepResults:
    """Read the results so far.

    Raises:
        BadInput: its table is damaged.
    """
    folder = SweepFolder(path)
    name = printable(path.absolute().name)
    if not folder.csv.is_file():
        return SweepResults(name, ["trial"], [], "No trial has ended yet.", None, None, 0)
    try:
        table = [row for _, row in csv_lines(folder.csv)]
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder.csv} is damaged ({error}); run the sweep's command again to rewrite it") from None
    header, *lines = [[printable(cell) for cell in line] for line in table] or [[]]
    if not {"trial", "state", "run"} <= set(header) or any(len(line) != len(header) for line in lines):
        raise BadInput(f"{folder.csv} was not written by train/sweep.py; run the sweep's command again to rewrite it")
    trial, state, run = (header.index(title) for title in ("trial", "state", "run"))
    done = [line for line in lines if line[state] == "done"]
    ended = sum(line[state] in ("done", "failed") for line in lines)
    shown = [index for index in range(len(header)) if index != run]
    more = f" The first {MOST_ROWS} are shown." if len(lines) > MOST_ROWS else ""
    figure = read_regular_file(folder.heatmap) if folder.heatmap.is_file() else b""
    best = folder.trials / Path(done[0][trial]).name if done else None
    return SweepResults(
        name,
        [header[index] for index in shown],
        [[_shorten(line[index]) for index in shown] for line in lines[:MOST_ROWS]],
        f"{ended} of {len(lines)} trials ended; the best comes first.{more}",
        figure if figure.startswith(_PNG) else None,
        best if best is not None and best.is_dir() else None,
        sum(line[state] == "failed" for line in lines),
    )


def _shorten(cell: str) -> str:
    """A number with four digits; other text as it is."""
    try:
        return f"{float(cell):.4g}" if "." in cell or "e" in cell else cell
    except ValueError:
        return cell
