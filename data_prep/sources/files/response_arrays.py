"""Arrays of rates or trials in .npy, .csv or .parquet files, memory-mapped if possible."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import check_claim
from data_prep.sources.files.tables import MISSING, check_column_names, csv_rows, is_number

_BLOCK_BYTES = 32 * 2**20  # responses are checked in blocks of this size


class ResponseArray(Protocol):
    """An array (stimuli, ..., sites) that is indexed by stimuli, such as numpy's."""

    def __getitem__(self, stimuli: Any, /) -> np.ndarray:
        """The responses to some stimuli."""


@dataclass(frozen=True)
class Responses:
    """A file of responses.

    Attributes:
        path: of the file.
        shape: (stimuli, sites) or (stimuli, repetitions, sites).
        array: the responses in memory, or an array that computes them; None if they are read from a .npy file.
        site_ids: if the file names its sites.
    """

    path: Path
    shape: tuple[int, ...]
    array: ResponseArray | None = field(default=None, repr=False)
    site_ids: list[str] | None = None

    def load(self) -> ResponseArray:
        """The responses, memory-mapped if they are in a .npy file."""
        return self.array if self.array is not None else map_npy(self.path)

    def check_shape(self, stimuli: int, axes: tuple[str, ...]) -> None:
        """Refuse a shape that does not have these axes (names, for the message) and this number of stimuli."""
        shape = self.shape
        if len(shape) == len(axes) and shape[0] == stimuli and all(shape):
            return
        expected = f"({stimuli}, {', '.join(axes[1:])}), that is ({', '.join(axes)})"
        hint = "; it may be transposed" if len(shape) == len(axes) and stimuli in shape[1:] else ""
        raise BadInput(f"{self.path}: the shape is {shape}, expected {expected}{hint}")

    def check_finite(self, stimulus_ids: list[str], site_ids: list[str]) -> np.ndarray:
        """Refuse infinite responses; reads block by block.

        Returns:
            bool (stimuli,): whether any response to the stimulus was recorded.
        """
        numbers = self.load()
        rows = max(1, _BLOCK_BYTES // max(1, numbers[0].nbytes))
        recorded = np.zeros(len(stimulus_ids), dtype=bool)
        for start in range(0, len(stimulus_ids), rows):
            block = as_float32(numbers[start : start + rows])
            if np.isinf(block).any():
                position = np.argwhere(np.isinf(block))[0]
                raise BadInput(
                    f"{self.path}: the response of site {site_ids[position[-1]]!r} to stimulus "
                    f"{stimulus_ids[start + position[0]]!r} is infinite; use NaN for missing responses"
                )
            recorded[start : start + rows] = ~np.isnan(block).reshape(len(block), -1).all(axis=1)
        return recorded


def map_npy(path: Path) -> np.ndarray:
    """A .npy file of plain numbers as a memory map; raises BadInput for anything else."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy raises errors of many kinds for damaged files
        raise BadInput(f"{path}: not a readable .npy file of plain numbers ({error})") from error
    if not isinstance(array, np.ndarray):
        raise BadInput(f"{path}: this is an .npz archive; save the one array with np.save")
    if array.dtype.kind not in "fiu":
        raise BadInput(f"{path}: the numbers are of type {array.dtype}; save float32")
    return array


def open_npy(path: Path) -> Responses:
    """A .npy file of plain numbers, not read yet; raises BadInput for anything else."""
    return Responses(path, map_npy(path).shape)


def as_float32(numbers: np.ndarray) -> np.ndarray:
    """A float32 copy; numbers too large for float32 become inf, which is refused later."""
    with np.errstate(over="ignore"):
        return np.array(numbers, dtype=np.float32)


# ---- rates in tables -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _RateTable:
    """Rates float32 (rows, sites), the stimulus of each row if there is a column stimulus_id, and the sites."""

    rates: np.ndarray
    stimulus_ids: list[str] | None
    site_ids: list[str]


def open_rates(path: Path, stimulus_ids: list[str]) -> Responses:
    """Rates from a file; rows that name their stimulus are sorted into the order of `stimulus_ids`."""
    if path.suffix == ".npy":
        return open_npy(path)
    if path.suffix == ".csv":
        table = _read_rates_csv(path)
    elif path.suffix == ".parquet":
        table = _read_rates_parquet(path)
    else:
        raise BadInput(f"{path}: rates must be a .npy, .csv or .parquet file")
    rates = table.rates
    if table.stimulus_ids is not None:
        rates = rates[_row_of_each_stimulus(path, table.stimulus_ids, stimulus_ids)]
    return Responses(path, rates.shape, rates, table.site_ids)


def _row_of_each_stimulus(path: Path, row_ids: list[str], stimulus_ids: list[str]) -> list[int]:
    row_of = {name: row for row, name in enumerate(row_ids)}
    if len(row_of) != len(row_ids):
        raise BadInput(f"{path}: stimulus_id {Counter(row_ids).most_common(1)[0][0]!r} is in two rows")
    if missing := [name for name in stimulus_ids if name not in row_of]:
        raise BadInput(f"{path}: {len(missing)} of {len(stimulus_ids)} stimuli have no row, e.g. {missing[0]!r}")
    if unknown := set(row_ids) - set(stimulus_ids):
        raise BadInput(f"{path}: {len(unknown)} rows are for unknown stimuli, e.g. {min(unknown)!r}")
    return [row_of[name] for name in stimulus_ids]


def _read_rates_csv(path: Path) -> _RateTable:
    rows = csv_rows(path)
    _, names = next(rows, (0, []))
    check_column_names(path, names)
    if all(is_number(name) for name in names):
        raise BadInput(f"{path}: line 1 holds numbers only; it must be a header with the names of the sites")
    id_column = names.index("stimulus_id") if "stimulus_id" in names else None
    site_columns = [k for k in range(len(names)) if k != id_column]
    rates, row_ids = [], []
    for line, cells in rows:
        if id_column is not None:
            row_ids.append(cells[id_column])
        try:
            row = [float(cells[k] or "nan") for k in site_columns]
        except ValueError:
            row = [_parse_rate(cells[k], path, line, names[k]) for k in site_columns]
        rates.append(as_float32(np.array(row)))
    return _RateTable(
        rates=np.stack(rates) if rates else np.empty((0, len(site_columns)), np.float32),
        stimulus_ids=None if id_column is None else row_ids,
        site_ids=[names[k] for k in site_columns],
    )


def _parse_rate(cell: str, path: Path, line: int, site_id: str) -> float:
    if cell.lower() in MISSING:
        return np.nan
    try:
        return float(cell)
    except ValueError:
        raise BadInput(f"{path}, line {line}, site {site_id!r}: {cell!r} is not a number") from None


def _read_rates_parquet(path: Path) -> _RateTable:
    import pyarrow as pa  # slow to import
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        check_claim(8 * file.metadata.num_rows * file.metadata.num_columns, path.stat().st_size)
        table = file.read()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise BadInput(f"{path}: not a readable parquet file ({error})") from error
    names = list(table.column_names)
    check_column_names(path, names)
    site_ids = [name for name in names if name != "stimulus_id"]
    rates = np.empty((table.num_rows, len(site_ids)), np.float32)
    for k, name in enumerate(site_ids):
        kind = table.schema.field(name).type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            raise BadInput(f"{path}: the column {name!r} is {kind}, not numbers; only stimulus_id may be text")
        rates[:, k] = as_float32(table.column(name).cast(pa.float64(), safe=False).to_numpy())  # null becomes NaN
    has_stimulus_ids = len(site_ids) < len(names)
    row_ids = [str(name) for name in table.column("stimulus_id").to_pylist()] if has_stimulus_ids else None
    return _RateTable(rates, row_ids, site_ids)
