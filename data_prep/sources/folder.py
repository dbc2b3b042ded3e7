"""Source `folder`: a table of stimuli, their picture files, and responses as .npy, .csv or .parquet."""

import csv
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from pydantic import BaseModel, Field

from data_prep.errors import BadInput
from data_prep.pictures import convert_to_png, picture_size, sniff_encoding
from data_prep.recording import SPLITS, Recording, Stimulus, trial_average
from data_prep.splits import assign_splits

RATES_FILES = ("rates.npy", "rates.csv", "rates.parquet")
SITE_ID_COLUMNS = ("id", "site_id", "neuroid_id")
MISSING = ("", "nan", "na", "null", "none")  # cells that say "not recorded", in lower case

_STIMULUS_ID = re.compile(r"[A-Za-z0-9_-]+")
_INTEGER = re.compile(r"[-+]?(0|[1-9]\d{0,17})")  # a leading zero makes it a name, "007"
_NUMBER = re.compile(r"[-+]?(0|[1-9]\d*)?(\.\d*)?([eE][-+]?\d+)?")
_BLOCK_BYTES = 32 * 2**20  # responses are checked in blocks of this size


class Folder(BaseModel, extra="forbid"):
    """Pictures and responses from a folder with stimuli.csv and rates or trials."""

    source: tyro.conf.Positional[Path]
    """Folder with stimuli.csv (stimulus_id, image, optionally object, category, split and others), pictures, rates."""
    stimuli: Path | None = None
    """Table of stimuli, one row each. Default: SOURCE/stimuli.csv."""
    rates: Path | None = None
    """Responses (stimuli x sites), .npy, .csv or .parquet. Default: SOURCE/rates.*, else the mean of the trials."""
    trials: Path | None = None
    """Single trials (stimuli x repetitions x sites), .npy, NaN-padded. Default: SOURCE/trials.npy if it is there."""
    sites: Path | None = None
    """Table of sites, one row each, with a column id. Default: SOURCE/sites.csv if it is there."""
    object_column: str = "object"
    """Column of the stimulus table that names the object shown (the class label)."""
    group_by: str | None = None
    """Column whose values no two splits may share. With a column split: the one that split went by."""
    val_fraction: float = Field(0.09, ge=0, lt=1)
    """Share of the stimuli for validation, when the table has no column split."""
    test_fraction: float = Field(0.10, ge=0, lt=1)
    """Share of the stimuli for testing, when the table has no column split."""
    seed: int = Field(0, ge=0)
    """Seed of the split, when the table has no column split."""
    name: str | None = None
    """Name of the recording. Default: the folder's name."""
    window_ms: tuple[float, float] | None = None
    """Start and end of the response window, in ms after stimulus onset."""
    units: str | None = None
    """Units of the rates, such as spikes/s. Default: "as recorded"."""

    def open(self) -> Recording:
        """Check everything but the pictures' contents, and describe the recording.

        Raises:
            BadInput: naming the file, the row or column, and what would be right.
        """
        if not self.source.is_dir():
            raise BadInput(f"{self.source}: no such folder; SOURCE must be a folder with stimuli.csv and responses")
        if self.window_ms is not None and not self.window_ms[0] < self.window_ms[1]:
            raise BadInput(f"--window-ms: the window must start before it ends, not {self.window_ms}")
        stimuli_path = _find(self.source, self.stimuli, ("stimuli.csv",), "--stimuli")
        if stimuli_path is None:
            raise BadInput(f"{self.source / 'stimuli.csv'}: no such file; name the table of stimuli with --stimuli")
        table = _read_table(stimuli_path)
        ids = _stimulus_ids(table)
        images = _image_paths(table, self.source)
        objects = self._objects(table)
        splits, split_rule = self._splits(table)
        rates, trials, site_ids = self._responses(ids)
        sites = self._sites(rates if rates is not None else trials, site_ids)
        labels = [site["id"] for site in sites]
        if trials is not None:
            recorded = _check_finite(trials, ids, labels)
        if rates is not None:  # what is given as rates decides, the trials only go along
            recorded = _check_finite(rates, ids, labels)
        if not recorded.any():
            raise BadInput(f"{(rates or trials).path}: every response is NaN; nothing was recorded")
        answered = {split: any(recorded[i] for i, s in enumerate(splits) if s == split) for split in SPLITS}
        converted = _check_pictures(self.source, images, table)
        provenance = {
            "source": "folder",
            "path": str(self.source.resolve()),
            "stimuli": stimuli_path.name,
            "responses": [responses.path.name for responses in (rates, trials) if responses is not None],
            "rates": "as given" if rates is not None else "mean over repetitions",
            "split": split_rule,
            "warnings": _shared_pictures(images, splits),
        }
        if converted:
            provenance["converted_to_png"] = f"{converted} of {len(ids)} pictures were neither JPEG nor PNG"
        return FolderRecording(
            name=self.name or self.source.resolve().name,
            provenance=provenance,
            sites=sites,
            response_window_ms=self.window_ms,
            units=self.units or "as recorded",
            stimulus_ids=ids,
            splits=splits,
            objects=objects,
            group_by=self.group_by,
            root=self.source,
            images=images,
            meta=_meta(table, objects),
            rates=rates,
            trials=trials,
            answered=answered,
        )

    def _objects(self, table: "_Table") -> list[str] | None:
        if self.object_column not in table.columns:
            if self.object_column != "object":
                raise table.lacks(self.object_column, "--object-column")
            return None
        return _filled(table, self.object_column)

    def _splits(self, table: "_Table") -> tuple[list[str], Any]:
        """The split of every stimulus, and how it came about."""
        groups = None
        if self.group_by is not None:
            if self.group_by not in table.columns:
                raise table.lacks(self.group_by, "--group-by")
            groups = _filled(table, self.group_by)
        if "split" not in table.columns:
            held_out = {"val": self.val_fraction, "test": self.test_fraction}
            fractions = {"train": 1.0 - self.val_fraction - self.test_fraction, **held_out}
            rule = {"seed": self.seed, "group_by": self.group_by, **held_out}
            return assign_splits(len(table), fractions, self.seed, groups), rule
        for option in ("val_fraction", "test_fraction", "seed"):
            if getattr(self, option) != type(self).model_fields[option].default:
                flag = "--" + option.replace("_", "-")
                raise BadInput(
                    f"{table.path} has a column split, so {flag} would be ignored; remove the column or the flag"
                )
        for i, split in enumerate(table.columns["split"]):
            if split not in SPLITS:
                raise BadInput(f"{table.at(i)}: split must be one of {', '.join(SPLITS)}, not {split!r}")
        return list(table.columns["split"]), "column split"

    def _responses(self, ids: list[str]) -> tuple["_Responses | None", "_Responses | None", list[str] | None]:
        """Rates, trials (one of them may be None) and the site ids, where the rates' file names them."""
        rates_path = _find(self.source, self.rates, RATES_FILES, "--rates")
        trials_path = _find(self.source, self.trials, ("trials.npy",), "--trials")
        if rates_path is None and trials_path is None:
            raise BadInput(
                f"{self.source}: no responses; put {', '.join(RATES_FILES)} or trials.npy there, "
                "or name a file with --rates or --trials"
            )
        rates = trials = site_ids = None
        if trials_path is not None:
            trials = _open_npy(trials_path)
            _check_shape(trials, len(ids), "(stimuli, repetitions, sites)", 3)
        if rates_path is not None:
            rates, site_ids = _open_rates(rates_path, ids)
            _check_shape(rates, len(ids), "(stimuli, sites)", 2)
        if rates is not None and trials is not None and rates.shape[-1] != trials.shape[-1]:
            raise BadInput(
                f"{rates.path} has {rates.shape[-1]} sites but {trials.path} has {trials.shape[-1]}; "
                "they must have the same sites in the same order"
            )
        return rates, trials, site_ids

    def _sites(self, responses: "_Responses", site_ids: list[str] | None) -> list[dict[str, Any]]:
        """One dict per site in the order of the responses."""
        n = responses.shape[-1]
        path = _find(self.source, self.sites, ("sites.csv",), "--sites")
        if path is None:
            return [{"id": site_id} for site_id in site_ids or [f"site_{i:03d}" for i in range(n)]]
        table = _read_table(path)
        column = next((name for name in SITE_ID_COLUMNS if name in table.columns), None)
        if column is None:
            raise table.lacks("id", None)
        names = _filled(table, column)
        _check_unique(table, column)
        if len(names) != n:
            raise BadInput(f"{path} describes {len(names)} sites, but {responses.path} holds {n}")
        others = {name: _typed(cells) for name, cells in table.columns.items() if name not in (column, "id")}
        sites = [{"id": names[i]} | _present(others, i) for i in range(n)]
        if site_ids is None:
            return sites
        if odd := set(site_ids) ^ set(names):
            raise BadInput(
                f"{path} and the header of {responses.path} name different sites ({sorted(odd)[0]!r} is new)"
            )
        by_id = {site["id"]: site for site in sites}
        return [by_id[site_id] for site_id in site_ids]


@dataclass(kw_only=True)
class FolderRecording(Recording):
    """A folder that `Folder.open` has checked; all that is held is text, and responses that came as text.

    Attributes (beside those of `Recording`):
        root: the folder that `images` are relative to.
        images: path of each stimulus's picture.
        meta: what the table says of each stimulus.
        rates: (stimuli, sites), or None where they are the average of the trials.
        trials: (stimuli, repetitions, sites), or None.
        answered: per split, whether anything was recorded.
    """

    name: str
    provenance: dict[str, Any]
    sites: list[dict[str, Any]]
    response_window_ms: tuple[float, float] | None
    units: str
    stimulus_ids: list[str]
    splits: list[str]
    objects: list[str] | None
    group_by: str | None
    root: Path
    images: list[str]
    meta: list[dict[str, Any]]
    rates: "_Responses | None"
    trials: "_Responses | None"
    answered: dict[str, bool]

    def read(self, indices: Sequence[int]) -> Iterator[Stimulus]:
        """Yield the stimuli at `indices`, one picture file at a time.

        Raises:
            BadInput: a picture that is missing, unreadable or absurdly large.
        """
        rates = None if self.rates is None else self.rates.load()
        trials = None if self.trials is None else self.trials.load()
        for i in indices:
            image, encoding, converted = self._picture(i)
            here = trial_rows = None
            if self.answered[self.splits[i]]:
                trial_rows = None if trials is None else _float32(trials[i])
                here = trial_average(trial_rows) if rates is None else _float32(rates[i])
            yield Stimulus(
                id=self.stimulus_ids[i],
                image=image,
                encoding=encoding,
                rates=here,
                trials=trial_rows,
                meta=self.meta[i] | converted,
            )

    def _picture(self, i: int) -> tuple[bytes, str, dict[str, str]]:
        """The encoded picture, its encoding, and a note where it had to be converted."""
        path = self.root / self.images[i]
        try:
            data = path.read_bytes()
            encoding = sniff_encoding(data)
            picture_size(data)
            if encoding is not None:
                return data, encoding, {}
            png, was = convert_to_png(data)
            return png, "png", {"converted_from": was}
        except (OSError, ValueError) as error:
            raise BadInput(f"{path} (picture of stimulus {self.stimulus_ids[i]}): {error}") from error


# ---- tables --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    """A CSV file: its columns as stripped text, and the line of the file that each row is on."""

    path: Path
    columns: dict[str, list[str]]
    lines: list[int]

    def __len__(self) -> int:
        return len(self.lines)

    def at(self, row: int) -> str:
        return f"{self.path}, line {self.lines[row]}"

    def lacks(self, column: str, flag: str | None) -> BadInput:
        asked = f" ({flag})" if flag else ""
        return BadInput(f"{self.path}: there is no column {column!r}{asked}; it has {', '.join(self.columns)}")


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
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


def _header(path: Path, names: list[str]) -> list[str]:
    """Check the column names of a table."""
    for i, name in enumerate(names):
        if not name:
            raise BadInput(f"{path}: column {i + 1} has no name; name it, or leave the column out")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise BadInput(f"{path}: two columns are called {repeated[0]!r}; names must be unique")
    return names


def _read_table(path: Path) -> _Table:
    rows = _csv_rows(path)
    _, names = next(rows, (0, []))
    _header(path, names)
    body = list(rows)
    if not body:
        raise BadInput(f"{path}: the table is empty; a header and one row each are expected")
    columns = {name: [cells[k] for _, cells in body] for k, name in enumerate(names)}
    return _Table(path, columns, [line for line, _ in body])


def _filled(table: _Table, column: str) -> list[str]:
    """A column in which no cell may be empty."""
    for i, cell in enumerate(table.columns[column]):
        if not cell:
            raise BadInput(f"{table.at(i)}: the column {column!r} is empty; every row needs a value")
    return list(table.columns[column])


def _check_unique(table: _Table, column: str) -> None:
    first: dict[str, int] = {}
    for i, cell in enumerate(table.columns[column]):
        if (before := first.setdefault(cell, i)) != i:
            raise BadInput(f"{table.at(i)}: {column} {cell!r} is also on line {table.lines[before]}; it must be unique")


def _typed(cells: list[str]) -> list[Any]:
    """Numbers where the whole column is numbers, else text; None for empty cells."""
    there = [cell for cell in cells if cell.lower() not in MISSING]
    if all(_INTEGER.fullmatch(cell) for cell in there):
        convert: type = int
    elif all(_is_number(cell) for cell in there):
        convert = float
    else:
        return [cell or None for cell in cells]
    return [None if cell.lower() in MISSING else convert(cell) for cell in cells]


def _is_number(cell: str) -> bool:
    """A finite decimal number; JSON has no inf, and a leading zero makes it a name."""
    return _NUMBER.fullmatch(cell) is not None and any(c.isdigit() for c in cell) and np.isfinite(_to_float(cell))


def _to_float(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return np.nan


def _present(columns: dict[str, list[Any]], i: int) -> dict[str, Any]:
    return {name: cells[i] for name, cells in columns.items() if cells[i] is not None}


# ---- stimuli -------------------------------------------------------------------------------------------------------


def _stimulus_ids(table: _Table) -> list[str]:
    if "stimulus_id" not in table.columns:
        raise table.lacks("stimulus_id", None)
    for i, name in enumerate(table.columns["stimulus_id"]):
        if not _STIMULUS_ID.fullmatch(name):
            raise BadInput(
                f"{table.at(i)}: stimulus_id {name!r} must consist of the letters A-Z a-z, digits, _ and - "
                "(it becomes a file name in a shard)"
            )
    _check_unique(table, "stimulus_id")
    return list(table.columns["stimulus_id"])


def _image_paths(table: _Table, root: Path) -> list[str]:
    if "image" not in table.columns:
        raise table.lacks("image", None)
    images = _filled(table, "image")
    for i, image in enumerate(images):
        # Judged by its text: a symbolic link that the user put into the folder may lead anywhere.
        if os.path.isabs(image) or os.path.normpath(image).split(os.sep)[0] == "..":
            raise BadInput(f"{table.at(i)}: image {image!r} must be a path inside {root}, relative to it")
    return images


def _check_pictures(root: Path, images: list[str], table: _Table) -> int:
    """Look at the first bytes of every picture; returns how many have to be converted to PNG."""
    converted = 0
    for i, image in enumerate(images):
        try:
            with (root / image).open("rb") as file:
                converted += sniff_encoding(file.read(16)) is None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise BadInput(f"{table.at(i)}: the picture {root / image} cannot be read ({reason})") from error
    return converted


def _shared_pictures(images: list[str], splits: list[str]) -> list[str]:
    """A warning where one picture file is used in several splits, so that held-out scores would be too good."""
    seen: dict[str, set[str]] = {}
    for image, split in zip(images, splits, strict=True):
        seen.setdefault(os.path.normpath(image), set()).add(split)
    shared = sorted(image for image, where in seen.items() if len(where) > 1)
    return [f"{len(shared)} picture files are in more than one split, {shared[0]} for one"] if shared else []


def _meta(table: _Table, objects: list[str] | None) -> list[dict[str, Any]]:
    """What the table says of each stimulus, beside its id, file and split; object and category stay text."""
    text = ("object", "category")
    columns = {
        name: [cell or None for cell in cells] if name in text else _typed(cells)
        for name, cells in table.columns.items()
        if name not in ("stimulus_id", "image", "split")
    }
    if objects is not None:
        columns["object"] = objects
    return [_present(columns, i) for i in range(len(table))]


# ---- responses -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Responses:
    """A file of responses: its shape, and its numbers too where they came as text; .npy stays on disk."""

    path: Path
    shape: tuple[int, ...]
    array: np.ndarray | None = field(default=None, repr=False)

    def load(self) -> np.ndarray:
        return self.array if self.array is not None else _map_npy(self.path)


def _find(root: Path, named: Path | None, defaults: Sequence[str], flag: str) -> Path | None:
    """The file that the flag names (as given, else below `root`), or the one default that is there."""
    if named is not None:
        found = next((path for path in (named, root / named) if path.is_file()), None)
        if found is None:
            raise BadInput(f"{flag} {named}: no such file, neither here nor in {root}")
        return found
    there = [root / default for default in defaults if (root / default).is_file()]
    if len(there) > 1:
        raise BadInput(f"{root} holds {' and '.join(path.name for path in there)}; pick one with {flag}")
    return there[0] if there else None


def _map_npy(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BadInput(f"{path}: not a readable .npy file of plain numbers ({error})") from error
    if not isinstance(array, np.ndarray):
        raise BadInput(f"{path}: this is an .npz archive; save the one array with np.save")
    if array.dtype.kind not in "fiu":
        raise BadInput(f"{path}: the numbers are of type {array.dtype}; save float32")
    return array


def _open_npy(path: Path) -> _Responses:
    return _Responses(path, _map_npy(path).shape)


def _open_rates(path: Path, ids: list[str]) -> tuple[_Responses, list[str] | None]:
    """Rates from a file, and its site ids where it names them; rows are brought into the order of `ids`."""
    if path.suffix == ".npy":
        return _open_npy(path), None
    if path.suffix == ".csv":
        rows, row_ids, site_ids = _read_rates_csv(path)
    elif path.suffix == ".parquet":
        rows, row_ids, site_ids = _read_rates_parquet(path)
    else:
        raise BadInput(f"{path}: rates must be a .npy, .csv or .parquet file")
    if row_ids is not None:
        rows = rows[_match(path, row_ids, ids)]
    return _Responses(path, rows.shape, rows), site_ids


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
    rows = _csv_rows(path)
    _, names = next(rows, (0, []))
    _header(path, names)
    if all(_is_number(name) for name in names):
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
        numbers.append(_float32(np.array(row)))
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
        table = pq.ParquetFile(path).read()
    except (OSError, pa.ArrowException) as error:
        raise BadInput(f"{path}: not a readable parquet file ({error})") from error
    names = _header(path, list(table.column_names))
    site_ids = [name for name in names if name != "stimulus_id"]
    rates = np.empty((table.num_rows, len(site_ids)), np.float32)
    for k, name in enumerate(site_ids):
        kind = table.schema.field(name).type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            raise BadInput(f"{path}: the column {name!r} is {kind}, not numbers; only stimulus_id may be text")
        rates[:, k] = _float32(table.column(name).cast(pa.float64(), safe=False).to_numpy())  # null becomes NaN
    if len(site_ids) == len(names):
        return rates, None, site_ids
    return rates, [str(name) for name in table.column("stimulus_id").to_pylist()], site_ids


def _check_shape(responses: _Responses, n: int, axes: str, ndim: int) -> None:
    shape = responses.shape
    if len(shape) == ndim and shape[0] == n and all(shape):
        return
    expected = axes.replace("stimuli", str(n)) + f", that is {axes}"
    hint = "; it may be transposed" if len(shape) == ndim and n in shape[1:] else ""
    raise BadInput(f"{responses.path}: the shape is {shape}, expected {expected}{hint}")


def _float32(numbers: np.ndarray) -> np.ndarray:
    """A float32 copy; what is too large for float32 becomes inf, which is refused."""
    with np.errstate(over="ignore"):
        return np.array(numbers, dtype=np.float32)


def _check_finite(responses: _Responses, ids: list[str], site_ids: list[str]) -> np.ndarray:
    """Refuse infinite responses; returns bool (stimuli,): whether anything was recorded. Reads block by block."""
    numbers = responses.load()
    rows = max(1, _BLOCK_BYTES // max(1, numbers[0].nbytes))
    recorded = np.zeros(len(ids), dtype=bool)
    for start in range(0, len(ids), rows):
        block = _float32(numbers[start : start + rows])
        if np.isinf(block).any():
            where = np.argwhere(np.isinf(block))[0]
            raise BadInput(
                f"{responses.path}: the response of site {site_ids[where[-1]]!r} to stimulus "
                f"{ids[start + where[0]]!r} is infinite; use NaN for what was not recorded"
            )
        recorded[start : start + rows] = ~np.isnan(block).reshape(len(block), -1).all(axis=1)
    return recorded
