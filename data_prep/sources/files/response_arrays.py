"""Responses in files: arrays of rates or trials as .npy, .csv or .parquet, memory-mapped where that is possible."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import check_claim
from data_prep.sources.files.tables import MISSING, check_names, csv_rows, is_number

_BLOCK_BYTES = 32 * 2**20  # responses are checked in blocks of this size


@dataclass(frozen=True)
class Responses:
    """A file of responses: its shape, and its numbers too where they came as text; .npy stays on disk."""

    path: Path
    shape: tuple[int, ...]
    array: np.ndarray | None = field(default=None, repr=False)

    def load(self) -> np.ndarray:
        """The numbers, memory-mapped where they lie in a .npy file."""
        return self.array if self.array is not None else _map_npy(self.path)


def _map_npy(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy's parser raises many kinds
        raise BadInput(f"{path}: not a readable .npy file of plain numbers ({error})") from error
    if not isinstance(array, np.ndarray):
        raise BadInput(f"{path}: this is an .npz archive; save the one array with np.save")
    if array.dtype.kind not in "fiu":
        raise BadInput(f"{path}: the numbers are of type {array.dtype}; save float32")
    return array


def open_npy(path: Path) -> Responses:
    """A .npy file of plain numbers, not read yet; raises BadInput for anything else."""
    return Responses(path, _map_npy(path).shape)


def open_rates(path: Path, ids: list[str]) -> tuple[Responses, list[str] | None]:
    """Rates from a file, and its site ids where it names them; rows are brought into the order of `ids`."""
    if path.suffix == ".npy":
        return open_npy(path), None
    if path.suffix == ".csv":
        rows, row_ids, site_ids = _read_rates_csv(path)
    elif path.suffix == ".parquet":
        rows, row_ids, site_ids = _read_rates_parquet(path)
    else:
        raise BadInput(f"{path}: rates must be a .npy, .csv or .parquet file")
    if row_ids is not None:
        rows = rows[_match(path, row_ids, ids)]
    return Responses(path, rows.shape, rows), site_ids


def _match(path: Path, row_ids: list[str], ids: list[str]) -> list[int]:
    """For each stimulus the row of the file that has its id."""
    row_of = {name: row for row, name in enumerate(row_ids)}
    if len(row_of) != len(row_ids):
        raise BadInput(f"{path}: stimulus_id {Counter(row_ids).most_common(1)[0][0]!r} is in two rows")
    if missing := [name for name in ids if name not in row_of]:
        raise BadInput(f"{path}: {len(missing)} of {len(ids)} stimuli have no row, {missing[0]!r} for one")
    if extra := set(row_ids) - set(ids):
        raise BadInput(f"{path}: {len(extra)} rows are of unknown stimuli, {min(extra)!r} for one")
    return [row_of[name] for name in ids]


def _read_rates_csv(path: Path) -> tuple[np.ndarray, list[str] | None, list[str]]:
    """Rates float32 (rows, sites), the stimulus ids of the rows (or None), and the site ids from the header."""
    rows = csv_rows(path)
    _, names = next(rows, (0, []))
    check_names(path, names)
    if all(is_number(name) for name in names):
        raise BadInput(f"{path}: line 1 holds numbers only; a header with the names of the sites is expected there")
    id_column = names.index("stimulus_id") if "stimulus_id" in names else None
    site_columns = [k for k in range(len(names)) if k != id_column]
    numbers, row_ids = [], []
    for line, cells in rows:
        if id_column is not None:
            row_ids.append(cells[id_column])
        try:
            row = [float(cells[k] or "nan") for k in site_columns]
        except ValueError:
            row = [_rate(cells[k], path, line, names[k]) for k in site_columns]
        numbers.append(float32(np.array(row)))
    rates = np.stack(numbers) if numbers else np.empty((0, len(site_columns)), np.float32)
    return rates, None if id_column is None else row_ids, [names[k] for k in site_columns]


def _rate(cell: str, path: Path, line: int, column: str) -> float:
    if cell.lower() in MISSING:
        return np.nan
    try:
        return float(cell)
    except ValueError:
        raise BadInput(f"{path}, line {line}, site {column!r}: {cell!r} is not a number") from None


def _read_rates_parquet(path: Path) -> tuple[np.ndarray, list[str] | None, list[str]]:
    """As `_read_rates_csv`."""
    try:
        file = pq.ParquetFile(path)
        check_claim(8 * file.metadata.num_rows * file.metadata.num_columns, path.stat().st_size)
        table = file.read()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise BadInput(f"{path}: not a readable parquet file ({error})") from error
    names = check_names(path, list(table.column_names))
    site_ids = [name for name in names if name != "stimulus_id"]
    rates = np.empty((table.num_rows, len(site_ids)), np.float32)
    for k, name in enumerate(site_ids):
        kind = table.schema.field(name).type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            raise BadInput(f"{path}: the column {name!r} is {kind}, not numbers; only stimulus_id may be text")
        rates[:, k] = float32(table.column(name).cast(pa.float64(), safe=False).to_numpy())  # null becomes NaN
    if len(site_ids) == len(names):
        return rates, None, site_ids
    return rates, [str(name) for name in table.column("stimulus_id").to_pylist()], site_ids


def check_shape(responses: Responses, n: int, axes: str, ndim: int) -> None:
    """Refuse an array that has not `ndim` axes, of which the first is `n` long; `axes` names them in the message."""
    shape = responses.shape
    if len(shape) == ndim and shape[0] == n and all(shape):
        return
    expected = axes.replace("stimuli", str(n)) + f", that is {axes}"
    hint = "; it may be transposed" if len(shape) == ndim and n in shape[1:] else ""
    raise BadInput(f"{responses.path}: the shape is {shape}, expected {expected}{hint}")


def float32(numbers: np.ndarray) -> np.ndarray:
    """A float32 copy; what is too large for float32 becomes inf, which is refused."""
    with np.errstate(over="ignore"):
        return np.array(numbers, dtype=np.float32)


def check_finite(responses: Responses, ids: list[str], site_ids: list[str]) -> np.ndarray:
    """Refuse infinite responses; returns bool (stimuli,): whether anything was recorded. Reads block by block."""
    numbers = responses.load()
    rows = max(1, _BLOCK_BYTES // max(1, numbers[0].nbytes))
    recorded = np.zeros(len(ids), dtype=bool)
    for start in range(0, len(ids), rows):
        block = float32(numbers[start : start + rows])
        if np.isinf(block).any():
            where = np.argwhere(np.isinf(block))[0]
            raise BadInput(
                f"{responses.path}: the response of site {site_ids[where[-1]]!r} to stimulus "
                f"{ids[start + where[0]]!r} is infinite; use NaN for what was not recorded"
            )
        recorded[start : start + rows] = ~np.isnan(block).reshape(len(block), -1).all(axis=1)
    return recorded
