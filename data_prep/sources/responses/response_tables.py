"""Tables of responses in .csv and .parquet files: every column as numbers and, if it may name stimuli, as text.

What the columns mean is decided elsewhere: `row_matching.py` finds the one that names the stimuli, `site_columns.py`
those that are sites.
"""

import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import LONGEST_NAME, check_claim, parse_json
from data_prep.sources.files.tables import MISSING, check_column_names, csv_rows, is_number

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

RANGE_INDEX = "the index of the rows"  # the column of an index that pandas describes but does not store

_INDEX_NAME = re.compile(
    r"|Unnamed: \d+(\.\d+)*|__index_level_\d+__|index|level_\d+", re.ASCII
)  # as pandas writes them
_PLAIN_NUMBERS = re.compile(r"[-+.0-9eE\x00]*")  # cells that float() reads as a table means them, joined
_LARGEST_INDEX = 2**53
_LIKE_A_NUMBER = re.compile(r"[^A-Za-z]*\d[^A-Za-z]*")
_DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d+", re.ASCII)


@dataclass
class Column:
    """A column of a table of responses.

    Attributes:
        numbers: float64 (rows,), NaN where a cell is missing; None for a column of text.
        texts: the cells as text; None for a column that cannot name stimuli, because it holds other numbers than whole
            ones, or one of them twice.
        is_index: whether it is a data frame's index.
        fault: of a column without numbers: what it holds, and where.
        is_broken: whether a column of numbers has a cell that is none, which is the fault.
    """

    numbers: np.ndarray | None
    texts: list[str] | None
    is_index: bool = False
    fault: str = ""
    is_broken: bool = False


@dataclass(frozen=True)
class ResponseTable:
    """A table of responses with a row for each stimulus."""

    path: Path
    rows: int
    columns: dict[str, Column]

    def rates(self, sites: list[str], order: list[int]) -> np.ndarray:
        """The columns of these sites, with the rows in this order, float32 (rows, sites)."""
        rates = np.empty((len(order), len(sites)), np.float32)
        for k, site in enumerate(sites):
            numbers = self.columns[site].numbers
            assert numbers is not None, "a site's column holds numbers"
            with np.errstate(over="ignore"):  # too large for float32 becomes inf, which is refused later
                rates[:, k] = numbers[order]
        return rates


def read_response_table(path: Path, stimuli: int) -> ResponseTable:
    """Read a .csv or .parquet file.

    Args:
        path: of the file.
        stimuli: the number of rows that it must have.

    Raises:
        BadInput: another kind of file, damaged, too large, or with another number of rows.
    """
    if path.suffix == ".csv":
        return _read_csv(path, stimuli)
    if path.suffix == ".parquet":
        return _read_parquet(path, stimuli)
    raise BadInput(f"{path}: rates must be a .npy, .csv or .parquet file")


def _check_rows(path: Path, rows: int, stimuli: int) -> None:
    if rows != stimuli:
        raise BadInput(f"{path}: {rows:,} rows for {stimuli:,} stimuli; it needs one row for each stimulus")


# ---- CSV -----------------------------------------------------------------------------------------------------------


@dataclass
class _CsvColumn:
    """The cells of a column so far; the attributes are those of `Column`."""

    name: str
    texts: list[str] | None = field(default_factory=list)
    is_text: bool = False
    fault: str = ""
    is_broken: bool = False
    _seen: set[str] = field(default_factory=set)

    def add(self, cell: str) -> None:
        """Keep a cell as text while the column may name stimuli."""
        assert self.texts is not None, "the column may name stimuli"
        self.texts.append(cell)
        if not self.is_text and is_number(cell) and (cell in self._seen or not float(cell).is_integer()):
            self.texts = None
        self._seen.add(cell)

    def number(self, cell: str, place: str) -> float:
        """A cell as a number; one that is none makes a column of text."""
        if _is_missing(cell):
            return np.nan
        if is_number(cell):
            return float(cell)
        self.is_broken = self.is_broken or _LIKE_A_NUMBER.fullmatch(cell) is not None
        hint = "; write decimals with a point" if _DECIMAL_COMMA.fullmatch(cell) else ""
        self.is_text, self.fault = True, f"{place}, site {self.name!r}: {cell[:60]!r} is not a number{hint}"
        return np.nan

    def done(self, path: Path, numbers: np.ndarray) -> Column:
        """The whole column."""
        if not self.is_text:
            return Column(numbers, self.texts)
        is_broken = self.is_broken or bool(np.isfinite(numbers).any())
        fault = self.fault if is_broken else f"{path}: the column {self.name!r} holds text"
        return Column(None, self.texts, fault=fault, is_broken=is_broken)


def _read_csv(path: Path, stimuli: int) -> ResponseTable:
    lines = csv_rows(path)
    _, names = next(lines, (0, []))
    if names and not names[0]:
        names[0] = "Unnamed: 0"  # a data frame's index, as pandas would call it
    check_column_names(path, names)
    if all(is_number(name) for name in names):
        raise BadInput(f"{path}: line 1 holds numbers only; it must be a header with the names of the sites")
    columns = [_CsvColumn(name) for name in names]
    numbers, rows = np.full((stimuli, len(columns)), np.nan), 0
    for line, cells in lines:
        if rows < stimuli:
            _add_row(columns, cells, numbers[rows], f"{path}, line {line}")
        rows += 1
    _check_rows(path, rows, stimuli)
    done = {column.name: column.done(path, numbers[:, k]) for k, column in enumerate(columns)}
    _mark_indexes(done)
    return ResponseTable(path, rows, done)


def _mark_indexes(columns: dict[str, Column], described: Collection[str] = ()) -> None:
    """Mark the columns that are a data frame's index: those that its metadata name, or that are named like one.

    The latter hold text or whole numbers. "Unnamed: 3" is also what pandas calls a fourth column without a name, so it
    is an index only if all columns before it are.
    """
    leading = True
    for name, column in columns.items():
        may_lack_name = name.startswith("Unnamed: ") and not name.startswith("Unnamed: 0")
        is_named_so = is_named_like_an_index(name) and (leading or not may_lack_name)
        column.is_index = name in described or (is_named_so and _may_be_index(column))
        leading = leading and column.is_index


def _may_be_index(column: Column) -> bool:
    return column.numbers is None or bool((column.numbers == np.floor(column.numbers)).all())


def is_named_like_an_index(name: str) -> bool:
    """Whether pandas might have named an index so, or a column without a name."""
    return _INDEX_NAME.fullmatch(name) is not None


def _add_row(columns: list[_CsvColumn], cells: list[str], numbers: np.ndarray, place: str) -> None:
    """Add a row to the columns, and its numbers to `numbers` (columns,)."""
    for column, cell in zip(columns, cells, strict=True):
        if column.texts is not None:
            column.add(cell)
    numeric = [k for k, column in enumerate(columns) if not column.is_text]
    chosen = [cells[k] for k in numeric]
    if _PLAIN_NUMBERS.fullmatch("\x00".join(chosen)):
        with suppress(ValueError):  # of a cell such as "-" or "1e", which is named where they are read one by one
            numbers[numeric] = [float(cell or "nan") for cell in chosen]
            return
    numbers[numeric] = [columns[k].number(cells[k], place) for k in numeric]


def _is_missing(cell: str) -> bool:
    return cell.lower() in MISSING


# ---- parquet -------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path, stimuli: int) -> ResponseTable:
    """Types, counts and sizes are checked before anything is unpacked: a few bytes can stand for gigabytes."""
    import pyarrow as pa  # slow to import
    import pyarrow.parquet as pq

    try:
        if not path.is_file():  # opening a pipe would block
            raise ValueError("it is not a regular file")
        with pq.ParquetFile(path) as file:
            schema, described = file.schema_arrow, _pandas_index(file)
            check_column_names(path, schema.names)
            _check_rows(path, file.metadata.num_rows, stimuli)
            check_claim(8 * stimuli * len(schema.names), path.stat().st_size)
            texts = [name for name in schema.names if _is_text(schema.field(name).type)]
            kept = [name for name in schema.names if name in texts or _is_number_type(schema.field(name).type)]
            _check_unpacked_sizes(file, kept, stimuli)
        with pq.ParquetFile(path, read_dictionary=texts) as file:  # keeps a text that is repeated in memory once
            table = file.read(columns=kept)
        columns = {name: _parquet_column(path, name, table.column(name)) for name in kept}
    except (OSError, ValueError, pa.ArrowException) as error:
        raise BadInput(f"{path}: not a readable parquet file ({error})") from error
    for name in schema.names:
        kind = schema.field(name).type
        columns.setdefault(name, Column(None, None, fault=f"{path}: the column {name!r} holds {kind}"))
    columns = {name: columns[name] for name in schema.names}
    _mark_indexes(columns, described.names)
    if described.numbers is not None and len(described.numbers) == stimuli:
        numbers = np.array(described.numbers, np.float64)
        columns[RANGE_INDEX] = Column(numbers, [str(number) for number in described.numbers], is_index=True)
    return ResponseTable(path, stimuli, columns)


@dataclass(frozen=True)
class _PandasIndex:
    """A data frame's index: the columns that hold it, or the numbers of one that is only described."""

    names: frozenset[str] = frozenset()
    numbers: range | None = None


def _pandas_index(file: "pq.ParquetFile") -> _PandasIndex:
    """What pandas' metadata say of the index."""
    content = (file.schema_arrow.metadata or {}).get(b"pandas")
    if content is None:
        return _PandasIndex()
    entries = parse_json(content)
    entries = entries.get("index_columns") if isinstance(entries, dict) else None
    entries = entries if isinstance(entries, list) else []
    ranges = [entry for entry in entries if isinstance(entry, dict) and entry.get("kind") == "range"]
    numbers = None
    if len(ranges) == 1:
        ends = [number for key in ("start", "stop", "step") if type(number := ranges[0].get(key)) is int]
        if len(ends) == 3 and all(abs(number) < _LARGEST_INDEX for number in ends) and ends[2]:
            numbers = range(*ends)
    return _PandasIndex(frozenset(entry for entry in entries if isinstance(entry, str)), numbers)


def _is_text(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_number_type(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _check_unpacked_sizes(file: "pq.ParquetFile", kept: list[str], stimuli: int) -> None:
    """Refuse columns that claim to hold more than numbers, or names of the usual length, would need."""
    groups = [file.metadata.row_group(k) for k in range(file.metadata.num_row_groups)]
    for group in groups:
        for k in range(group.num_columns):
            chunk = group.column(k)
            if chunk.path_in_schema not in kept:
                continue
            largest = LONGEST_NAME * (stimuli + 64)
            if chunk.total_uncompressed_size > largest or chunk.num_values > stimuli:
                raise ValueError(
                    f"the column {chunk.path_in_schema!r} claims {chunk.total_uncompressed_size:,} bytes and "
                    f"{chunk.num_values:,} values for {stimuli:,} stimuli"
                )


def _parquet_column(path: Path, name: str, chunks: "pa.ChunkedArray") -> Column:
    import pyarrow as pa

    if pa.types.is_dictionary(chunks.type):
        fault = f"{path}: the column {name!r} holds text"
        texts: list[str] = []
        for chunk in chunks.chunks:
            words = [str(word) for word in chunk.dictionary.to_pylist()]
            if max(map(len, words), default=0) > LONGEST_NAME:
                return Column(None, None, fault=fault)
            texts += ["" if k is None else words[k] for k in chunk.indices.to_pylist()]
        return Column(None, texts, fault=fault)
    numbers = chunks.cast(pa.float64(), safe=False).to_numpy()  # null becomes NaN
    if pa.types.is_integer(chunks.type):
        known = chunks.drop_null()
        may_name = len(known.unique()) == len(known)  # by the integers: float64 would make large ones equal
    else:
        known = numbers[~np.isnan(numbers)]
        may_name = len(np.unique(known)) == len(known) and bool((known == np.floor(known)).all())
    return Column(numbers, ["" if value is None else str(value) for value in chunks.to_pylist()] if may_name else None)
