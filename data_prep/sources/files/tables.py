"""CSV tables with a header, read as text and checked."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import csv_lines

MISSING = ("", "nan", "na", "null", "none")  # cells that mean "not recorded", in lower case

_INTEGER = re.compile(r"[-+]?(0|[1-9]\d{0,17})", re.ASCII)  # with a leading zero it is a name, such as "007"
_NUMBER = re.compile(r"[-+]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][-+]?\d+)?", re.ASCII)
_OTHER_SEPARATORS = {";": "a semicolon", "\t": "a tab", "|": "a bar"}


@dataclass(frozen=True)
class Table:
    """A CSV file: its columns as stripped text, and the line of the file that each row is on."""

    path: Path
    columns: dict[str, list[str]]
    lines: list[int]

    def __len__(self) -> int:
        return len(self.lines)

    def location(self, row: int) -> str:
        """File and line of a row, for messages."""
        return f"{self.path}, line {self.lines[row]}"

    def missing_column(self, column: str, flag: str | None = None) -> BadInput:
        """The error for a column that does not exist; `flag` is the option that asked for it."""
        option = f" ({flag})" if flag else ""
        return BadInput(f"{self.path}: there is no column {column!r}{option}; it has {', '.join(self.columns)}")

    def complete_column(self, column: str, flag: str | None = None) -> list[str]:
        """A column that must exist and have no empty cell."""
        if column not in self.columns:
            raise self.missing_column(column, flag)
        for row, cell in enumerate(self.columns[column]):
            if not cell:
                raise BadInput(f"{self.location(row)}: the column {column!r} is empty; every row needs a value")
        return list(self.columns[column])

    def check_unique(self, column: str) -> None:
        """Refuse a column in which a value occurs twice, naming both lines."""
        first_row: dict[str, int] = {}
        for row, cell in enumerate(self.columns[column]):
            if (first := first_row.setdefault(cell, row)) != row:
                raise BadInput(
                    f"{self.location(row)}: {column} {cell!r} is also on line {self.lines[first]}; it must be unique"
                )


def read_table(path: Path) -> Table:
    """A whole CSV file with a header and at least one row; raises BadInput for anything else."""
    rows = csv_rows(path)
    _, names = next(rows, (0, []))
    check_column_names(path, names)
    body = list(rows)
    if not body:
        raise BadInput(f"{path}: the table is empty; it needs a header and at least one row")
    columns = {name: [cells[k] for _, cells in body] for k, name in enumerate(names)}
    return Table(path, columns, [line for line, _ in body])


def csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, stripped cells) of every row that is not blank; all must have as many cells as the first.

    Raises:
        BadInput: not a CSV file in UTF-8 whose cells are separated by commas, naming the line.
    """
    width = None
    try:
        for line, row in csv_lines(path):
            if width is None:
                width = len(row)
                _check_separator(path, row)
            if len(row) != width:
                trailing = "; it ends with a separator too many" if len(row) == width + 1 and not row[-1] else ""
                raise BadInput(f"{path}, line {line}: {len(row)} cells where the header has {width}{trailing}")
            yield line, [cell.strip() for cell in row]
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text ({error}); save it as CSV in UTF-8") from error
    except (ValueError, OSError) as error:
        raise BadInput(f"{path}: not a readable CSV file ({error})") from error


def _check_separator(path: Path, header: Sequence[str]) -> None:
    """Refuse a header whose names are separated by something else than commas, or that ends with a comma."""
    if len(header) == 1:
        for separator, name in _OTHER_SEPARATORS.items():
            if separator in header[0]:
                raise BadInput(
                    f"{path}: the cells are separated by {name}, as in {header[0][:60]!r}; save the table with commas"
                )
    if len(header) > 1 and not header[-1].strip() and header[0].strip():
        raise BadInput(
            f"{path}: column {len(header)} has no name: the header ends with a comma; remove it, or name the column"
        )


def check_column_names(path: Path, names: Sequence[str]) -> None:
    """Refuse columns without a name, or with the same name."""
    for i, name in enumerate(names):
        if not name:
            raise BadInput(f"{path}: column {i + 1} has no name; name it, or leave the column out")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise BadInput(f"{path}: two columns are named {repeated[0]!r}; names must be unique")


def parse_cells(cells: Sequence[str]) -> list[Any]:
    """The cells of a column as numbers if all of them are numbers, else as text; None for missing ones."""
    values = [cell for cell in cells if cell.lower() not in MISSING]
    if all(_INTEGER.fullmatch(cell) for cell in values):
        number_type: type = int
    elif all(is_number(cell) for cell in values):
        number_type = float
    else:
        return text_cells(cells)
    return [None if cell.lower() in MISSING else number_type(cell) for cell in cells]


def text_cells(cells: Sequence[str]) -> list[str | None]:
    """The cells of a column as text; None for empty ones."""
    return [cell or None for cell in cells]


def is_number(cell: str) -> bool:
    """Whether a cell is a finite decimal number (JSON has no inf); one with a leading zero is a name."""
    return _NUMBER.fullmatch(cell) is not None and math.isfinite(float(cell))


def row_facts(columns: Mapping[str, Sequence[Any]], row: int) -> dict[str, Any]:
    """The values of a row that are not None, by column."""
    return {name: cells[row] for name, cells in columns.items() if cells[row] is not None}
