"""Tables in Markdown."""

import itertools
from collections.abc import Iterable, Sequence

from data_prep.common.terminal import aligned

_EDGE, _BETWEEN = "| ", " | "


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; cells are written as they are, so a bar in one must be escaped before."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"{_EDGE}{_BETWEEN.join(line)} |" for line in lines)


def tables_as_columns(text: str) -> str:
    """A Markdown text for a terminal: its tables, as `markdown_table` writes them, in aligned columns."""
    lines: list[str] = []
    for in_table, group in itertools.groupby(text.splitlines(), lambda line: line.startswith(_EDGE)):
        found = list(group)
        lines += _columns(found) if in_table else found
    return "\n".join(lines)


def _columns(lines: Sequence[str]) -> list[str]:
    header, _, *rows = [line.removeprefix(_EDGE).removesuffix(" |").split(_BETWEEN) for line in lines]
    return aligned([header, *rows])
