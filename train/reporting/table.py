"""The tables of a report: one model of typed cells, shown as Markdown, CSV, lines for a terminal, and on the page.

`page.html` shows the same tables as HTML.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.common.markdown import markdown_table
from data_prep.common.terminal import aligned, bar, bold

PAGE, MARKDOWN, CSV, TERMINAL = "page", "markdown", "csv", "terminal"
FORMULA_STARTS = tuple("=+-@\t\r")
IN_MARKDOWN = (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "\\`"), ("\n", " "))
Value = str | float | bool | None  # None: unknown


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: its heading.
        arrow: which way is better, where one is.
        fields: the names of its values in a CSV file.
        formats: where the column is shown.
        is_text: whether it is set to the left, and sorted from A to Z at first.
        ascending: whether the page sorts the least value to the top at first.
        style: its CSS class on the page.
        has_bar: whether a terminal shows the numbers as bars too.
        relative_to: what an ideal value of 1 stands for, for a score that is relative.
    """

    title: str
    arrow: str = ""
    fields: tuple[str, ...] = ()
    formats: frozenset[str] = frozenset({PAGE, MARKDOWN})
    is_text: bool = False
    ascending: bool = False
    style: str = ""
    has_bar: bool = False
    relative_to: tuple[str, ...] = ()

    @property
    def heading(self) -> str:
        """Title and arrow."""
        return f"{self.title} {self.arrow}".rstrip()

    @property
    def css(self) -> str:
        """Its classes on the page."""
        return " ".join(name for name in ("text" if self.is_text else "", self.style) if name)

    @property
    def first_order(self) -> str:
        """How the page sorts by it at first."""
        return "ascending" if self.is_text or self.ascending else "descending"


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: as people read it.
        detail: what stands beside or below it, e.g. an interval.
        values: all digits of its column's `fields`; the page sorts by the first.
        is_best: whether it is set in bold.
        description: more text, for which only the page has room.
        link: the anchor of the page that it leads to.
    """

    text: str
    detail: str = ""
    values: tuple[Value, ...] = ()
    is_best: bool = False
    description: str = ""
    link: str = ""

    @property
    def sort_value(self) -> Value:
        """What the page sorts by; empty if the value is unknown."""
        if not self.values:
            return self.text
        return "" if self.values[0] is None else self.values[0]

    @property
    def in_one_line(self) -> str:
        """Text and detail."""
        return f"{self.text} {self.detail}".rstrip()


EMPTY = Cell("")


@dataclass(frozen=True)
class Table:
    """A table, of which every format shows the columns that are meant for it.

    Attributes:
        title: what is compared.
        columns, rows: every row has a cell for each column.
        footer: the last line, which is not sorted.
        notes: how to read the numbers, in sentences.
        terminal_order: the rows' order in a terminal, where it is not that of the other formats.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    footer: Sequence[Cell] | None = None
    notes: Sequence[str] = ()
    terminal_order: Sequence[int] | None = None

    def shown_in(self, kind: str) -> "Table":
        """The columns that a format shows, with notes on these."""
        indices = [index for index, column in enumerate(self.columns) if kind in column.formats]
        columns = [self.columns[index] for index in indices]
        return Table(
            self.title,
            columns,
            [[row[index] for index in indices] for row in self.rows],
            None if self.footer is None else [self.footer[index] for index in indices],
            [*self.notes, *_relative_scores(columns)],
            self.terminal_order,
        )


def _relative_scores(columns: Sequence[Column]) -> list[str]:
    titles: dict[str, list[str]] = {}
    for column in columns:
        for reference in column.relative_to:
            titles.setdefault(reference, []).append(column.title)
    return [f"{' and '.join(relative)}: relative to {reference}." for reference, relative in titles.items()]


def in_markdown(table: Table) -> str:
    """A Markdown table and its notes."""
    shown = table.shown_in(MARKDOWN)
    rows = [[_markdown_cell(cell) for cell in row] for row in shown.rows]
    if shown.footer is not None:
        first, *others = shown.footer
        rows.append([f"*{first.text}*", *(cell.text for cell in others)])
    text = markdown_table([column.heading for column in shown.columns], rows)
    return "\n".join([text, "", *map(escape_markdown, shown.notes)]) if shown.notes else text


def _markdown_cell(cell: Cell) -> str:
    text = escape_markdown(cell.in_one_line)
    return f"**{text}**" if cell.is_best else text


def escape_markdown(text: str) -> str:
    """A text without characters that mean something in a Markdown table."""
    for character, escaped in IN_MARKDOWN:
        text = text.replace(character, escaped)
    return text


def in_csv(tables: Sequence[Table], fields: Sequence[str]) -> str:
    """The rows of several tables with all digits; `fields` is the header, and a row's missing fields stay empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n", restval="")
    writer.writeheader()
    for table in tables:
        shown = table.shown_in(CSV)
        for row in shown.rows:
            record: dict[str, Value] = {}
            for column, cell in zip(shown.columns, row, strict=True):
                record |= dict(zip(column.fields, map(_csv_value, cell.values), strict=False))
            writer.writerow(record)
    return text.getvalue()


def _csv_value(value: Value) -> Value:
    """A value that no spreadsheet takes for a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA_STARTS) else value


def in_terminal(table: Table) -> str:
    """Title and table; a column with bars shows its details as well."""
    shown = table.shown_in(TERMINAL)
    order = range(len(shown.rows)) if shown.terminal_order is None else shown.terminal_order
    rows = [shown.rows[index] for index in order]
    if shown.footer is not None:
        rows.append(shown.footer)
    lines: list[list[str]] = [[] for _ in range(len(rows) + 1)]
    for index, column in enumerate(shown.columns):
        cells = [row[index] for row in rows]
        for line, texts in zip(lines, _terminal_column(column, cells), strict=True):
            line += texts
    return "\n".join([bold(table.title), *aligned(lines)])


def _terminal_column(column: Column, cells: Sequence[Cell]) -> list[list[str]]:
    """The heading and a column's cells, each as one or more texts."""
    if not column.has_bar:
        return [[column.title], *([bold(cell.text) if cell.is_best else cell.text] for cell in cells)]
    numbers = [cell.values[0] if cell.values else None for cell in cells]
    lengths = [number if isinstance(number, int | float) else 0.0 for number in numbers]
    longest = max([*lengths, 1e-9])
    bars = [bar(length / longest) for length in lengths]
    return [
        [column.title, "95 %", ""],
        *([cell.text, cell.detail, shown] for cell, shown in zip(cells, bars, strict=True)),
    ]
