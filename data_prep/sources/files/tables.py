"""CSV tables with a header, read as text and checked."""

import csv
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.common.errors import BadInput

MISSING = ("", "nan", "na", "null", "none")  # cells that mean "not recorded", in lower case

_INTEGER = re.compile(r"[-+]?(0|[1-9]\d{0,17})")  # with a leading zero it is a name, such as "007"
_NUMBER = re.compile(r"[-+]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][-+]?\d+)?")


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
    """Yield (line, stripped cells) of every row that is not blank; all must have as many cells as the first."""
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
