"""Tables as people write them: CSV with a header, read as text and checked."""

import csv
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common.errors import BadInput

MISSING = ("", "nan", "na", "null", "none")  # cells that say "not recorded", in lower case

_INTEGER = re.compile(r"[-+]?(0|[1-9]\d{0,17})")  # a leading zero makes it a name, "007"
_NUMBER = re.compile(r"[-+]?(0|[1-9]\d*)?(\.\d*)?([eE][-+]?\d+)?")


@dataclass(frozen=True)
class Table:
    """A CSV file: its columns as stripped text, and the line of the file that each row is on."""

    path: Path
    columns: dict[str, list[str]]
    lines: list[int]

    def __len__(self) -> int:
        return len(self.lines)

    def at(self, row: int) -> str:
        """Where a row is, for messages."""
        return f"{self.path}, line {self.lines[row]}"

    def lacks(self, column: str, flag: str | None) -> BadInput:
        """The error for a column that is not there, with those that are."""
        asked = f" ({flag})" if flag else ""
        return BadInput(f"{self.path}: there is no column {column!r}{asked}; it has {', '.join(self.columns)}")


def csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, stripped cells) of every row that is not blank; all have as many cells as the first."""
    width = None
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            for row in reader:
                if not row:
                    continue
                width = width or len(row)
                if len(row) != width:
                    raise BadInput(f"{path}, line {reader.line_num}: {len(row)} cells where the header has {width}")
                yield reader.line_num, [cell.strip() for cell in row]
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text ({error}); save it as CSV in UTF-8") from error
    except (csv.Error, OSError) as error:
        raise BadInput(f"{path}: not a readable CSV file ({error})") from error


def check_names(path: Path, names: list[str]) -> list[str]:
    """Check the column names of a table."""
    for i, name in enumerate(names):
        if not name:
            raise BadInput(f"{path}: column {i + 1} has no name; name it, or leave the column out")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise BadInput(f"{path}: two columns are called {repeated[0]!r}; names must be unique")
    return names


def read_table(path: Path) -> Table:
    """A whole CSV file with a header and at least one row; raises BadInput for anything else."""
    rows = csv_rows(path)
    _, names = next(rows, (0, []))
    check_names(path, names)
    body = list(rows)
    if not body:
        raise BadInput(f"{path}: the table is empty; a header and one row each are expected")
    columns = {name: [cells[k] for _, cells in body] for k, name in enumerate(names)}
    return Table(path, columns, [line for line, _ in body])


def filled(table: Table, column: str) -> list[str]:
    """A column in which no cell may be empty."""
    for i, cell in enumerate(table.columns[column]):
        if not cell:
            raise BadInput(f"{table.at(i)}: the column {column!r} is empty; every row needs a value")
    return list(table.columns[column])


def check_unique(table: Table, column: str) -> None:
    """Refuse a column in which a value occurs twice, naming both lines."""
    first: dict[str, int] = {}
    for i, cell in enumerate(table.columns[column]):
        if (before := first.setdefault(cell, i)) != i:
            raise BadInput(f"{table.at(i)}: {column} {cell!r} is also on line {table.lines[before]}; it must be unique")


def typed(cells: list[str]) -> list[Any]:
    """Numbers where the whole column is numbers, else text; None for empty cells."""
    there = [cell for cell in cells if cell.lower() not in MISSING]
    if all(_INTEGER.fullmatch(cell) for cell in there):
        convert: type = int
    elif all(is_number(cell) for cell in there):
        convert = float
    else:
        return [cell or None for cell in cells]
    return [None if cell.lower() in MISSING else convert(cell) for cell in cells]


def is_number(cell: str) -> bool:
    """A finite decimal number; JSON has no inf, and a leading zero makes it a name."""
    return _NUMBER.fullmatch(cell) is not None and any(c.isdigit() for c in cell) and np.isfinite(to_float(cell))


def to_float(cell: str) -> float:
    """The number in a cell, NaN where there is none."""
    try:
        return float(cell)
    except ValueError:
        return np.nan


def present(columns: dict[str, list[Any]], i: int) -> dict[str, Any]:
    """The values of row `i` that are not None, by column."""
    return {name: cells[i] for name, cells in columns.items() if cells[i] is not None}
