"""Which columns of a table of responses are sites.

A table often has other columns of numbers: counts of repetitions, onsets, positions. One that were taken for a neuron
would look like one in every score, so whatever may be no site is asked about.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common.errors import BadInput
from data_prep.sources.files.tables import parse_cells, read_table, row_facts
from data_prep.sources.responses.response_arrays import Responses, open_npy
from data_prep.sources.responses.response_tables import (
    Column,
    ResponseTable,
    is_named_like_an_index,
    read_response_table,
)
from data_prep.sources.responses.row_matching import RowOrder, StimulusNames, match_rows

SITE_ID_COLUMNS = ("id", "site_id", "neuroid_id")
LEAST_ROWS = 5  # of fewer, the numbers tell nothing
_MOST_NAMED = 4

# Whole names of columns, in lower case and without a prefix like n_ or a unit, that describe a row and not a response.
_BOOKKEEPING = re.compile(
    r"(repetition|rep|repeat|trial|count|presentation|onset|offset|time|timestamp|start|stop|end|duration|session|run|"
    r"block|day|date|index|idx|row|order|position|number|id|stimulus|image|label|fold|split|mean|average|avg|median|sum|"
    r"total|std|stdev|sd|sem|variance|min|minimum|max|maximum|(reaction|response|trial)_time|rt|latency|accuracy|correct|"
    r"choice|reward|(pupil|image|stimulus)_size|(population|grand|overall|global)_(mean|average|rate))s?|stimuli|indices"
)
_PREFIX = re.compile(r"^(n|num|number_of|nr)_")
_UNIT = re.compile(r"_(s|ms|us|sec|seconds|count|counts|number|num|no|id|idx|index|order|time|onset|offset)$")


@dataclass(frozen=True)
class SiteTable:
    """A table of sites: their ids, and the facts about each, in the order of the table."""

    path: Path
    ids: list[str]
    sites: list[dict[str, Any]]


def read_site_table(path: Path) -> SiteTable:
    """Read a table of sites, one row each.

    Raises:
        BadInput: it has no column of ids, or one id twice.
    """
    table = read_table(path)
    id_column = next((name for name in SITE_ID_COLUMNS if name in table.columns), "id")
    ids = table.complete_column(id_column)
    table.check_unique(id_column)
    facts = {name: parse_cells(cells) for name, cells in table.columns.items() if name not in (id_column, "id")}
    return SiteTable(path, ids, [{"id": site_id} | row_facts(facts, row) for row, site_id in enumerate(ids)])


@dataclass(frozen=True)
class SiteNames:
    """What is known of the columns of the sites.

    Attributes:
        wanted: names and patterns of --site-columns; empty if it is not given.
        listed: the ids in the table of sites; None without one.
        listed_in: that table, for messages.
        facts: the columns of the table of stimuli, whose names describe stimuli.
    """

    wanted: Sequence[str] = ()
    listed: Sequence[str] | None = None
    listed_in: str = "sites.csv"
    facts: Collection[str] = ()


@dataclass(frozen=True)
class SiteColumns:
    """The columns that are sites, in the order of the table, and what was left out."""

    names: list[str]
    warnings: tuple[str, ...] = ()


def open_rates(path: Path, stimuli: StimulusNames, site_names: SiteNames) -> Responses:
    """Rates from a file of any kind; those in a table are sorted into the order of the stimuli.

    Raises:
        BadInput: see `match_rows` and `choose_sites`.
    """
    if path.suffix == ".npy":
        return open_npy(path)
    table = read_response_table(path, len(stimuli.ids))
    order = match_rows(table, stimuli)
    sites = choose_sites(table, order, site_names)
    rates = table.rates(sites.names, order.rows)
    return Responses(path, rates.shape, rates, sites.names, order.describe(), (*order.warnings, *sites.warnings))


def choose_sites(table: ResponseTable, order: RowOrder, known: SiteNames) -> SiteColumns:
    """Which columns are sites.

    Raises:
        BadInput: --site-columns names none, a site's column does not hold numbers, or a column may be no site and
            neither --site-columns nor a table of sites says so.
    """
    columns = {name: column for name, column in table.columns.items() if name not in order.names}
    if known.wanted:
        sites = SiteColumns(_wanted_columns(table, columns, known.wanted))
    elif known.listed is not None:
        sites = _listed_columns(table, columns, known.listed, known.listed_in)
    else:
        sites = SiteColumns(list(columns))
        _refuse_doubtful(table, columns, known.facts)
    if not sites.names:
        raise BadInput(f"{table.path}: no column is left that could be a site; it holds {', '.join(table.columns)}")
    for name in sites.names:
        if columns[name].numbers is None:
            raise BadInput(columns[name].fault)
    return sites


def _wanted_columns(table: ResponseTable, columns: Collection[str], wanted: Sequence[str]) -> list[str]:
    chosen: set[str] = set()
    for pattern in wanted:
        matching = {pattern} if pattern in columns else {name for name in columns if fnmatchcase(name, pattern)}
        if not matching:
            raise BadInput(
                f"{table.path}: --site-columns {pattern} is none of its columns that may be sites: {', '.join(columns)}"
            )
        chosen |= matching
    return [name for name in columns if name in chosen]


def _listed_columns(
    table: ResponseTable, columns: Collection[str], listed: Sequence[str], listed_in: str
) -> SiteColumns:
    others = [name for name in columns if name not in set(listed)]
    if missing := [name for name in listed if name not in columns]:
        difference = f", which has {others[0]!r} instead" if others else ""
        raise BadInput(
            f"{listed_in} and the header of {table.path} name different sites: {missing[0]!r} is not in the "
            f"table{difference}"
        )
    names = [name for name in columns if name in set(listed)]
    if not others:
        return SiteColumns(names)
    return SiteColumns(names, (f"{table.path.name}: left out {_listing(others)}, which {listed_in} does not list",))


def _refuse_doubtful(table: ResponseTable, columns: dict[str, Column], facts: Collection[str]) -> None:
    """Refuse columns that may be no sites, all in one sentence, and numbers with a cell that is none."""
    if broken := next((column for column in columns.values() if column.is_broken), None):
        raise BadInput(broken.fault)
    doubtful = {name: reason for name, column in columns.items() if (reason := _doubt(name, column, facts))}
    doubtful |= _summaries({name: column for name, column in columns.items() if name not in doubtful})
    if not doubtful:
        return
    reasons = [f"{name!r} ({reason})" for name, reason in doubtful.items()]
    more = f" and {len(reasons) - _MOST_NAMED} more" if len(reasons) > _MOST_NAMED else ""
    sites = [name for name in columns if name not in doubtful]
    example = f", e.g. --site-columns {' '.join(sites[:2])} ..." if sites else ""
    raise BadInput(
        f"{table.path}: {', '.join(reasons[:_MOST_NAMED])}{more} may be no site; name the columns of the sites with "
        f"--site-columns (names or patterns like 'unit*'{example}), or list them in sites.csv"
    )


def _doubt(name: str, column: Column, facts: Collection[str]) -> str | None:
    """Why a column may be no site; None if it may well be one."""
    if column.numbers is None:
        return column.fault.rpartition(" holds ")[2]
    if name in facts:
        return "a column of the stimuli too"
    if is_named_like_an_index(name):
        return "a column without a name, or an index"
    if _is_bookkeeping(name):
        return "named like a fact about the row"
    known = column.numbers[~np.isnan(column.numbers)]
    if len(known) < LEAST_ROWS:
        return None
    if (known == known[0]).all() and known[0] != 0:  # a site that never fired is 0 everywhere
        return f"{known[0]:g} in every row"
    if len(known) < len(column.numbers):
        return None
    sorted_numbers = np.sort(known)
    if (np.diff(sorted_numbers) == 1).all():
        return f"the numbers {sorted_numbers[0]:g} to {sorted_numbers[-1]:g}"
    if len(known) > 2 * LEAST_ROWS and ((np.diff(known) > 0).all() or (np.diff(known) < 0).all()):
        return "sorted, like a time or a position"
    return None


def _summaries(columns: dict[str, Column]) -> dict[str, str]:
    """The columns of numbers that are the mean or the sum of all others, whatever they are called, and which it is."""
    rates = [column.numbers for column in columns.values() if column.numbers is not None]
    others = len(rates) - 1
    if others < 2 or len(rates[0]) < LEAST_ROWS:
        return {}
    numbers = np.stack(rates)
    if np.isnan(numbers).any():
        return {}
    total, found = numbers.sum(axis=0), {}
    for name, column in zip(columns, numbers, strict=True):
        rest = total - column
        for what, summary in (("mean", rest / others), ("sum", rest)):
            # Files round to few digits, so the differences are compared with what the column itself varies by.
            if np.abs(column - summary).max() <= 0.01 * column.std():
                found[name] = f"the {what} of the other columns"
    return found


def _is_bookkeeping(name: str) -> bool:
    words = re.sub(r"[\s.-]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)).lower()
    return any(_BOOKKEEPING.fullmatch(word) for word in (words, _PREFIX.sub("", words), _UNIT.sub("", words)))


def _listing(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f"the column{'s' if len(names) > 1 else ''} {', '.join(map(repr, names[:_MOST_NAMED]))}{more}"
