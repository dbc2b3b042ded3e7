"""Tables of NWB files: columns, ragged columns, and facts about units."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.common.errors import BadInput
from data_prep.sources.files import hdf5

if TYPE_CHECKING:
    import h5py

ELECTRODE_LOCATIONS = "general/extracellular_ephys/electrodes/location"
SUBJECT_ID = "general/subject/subject_id"


# ---- columns -------------------------------------------------------------------------------------------------------


def columns(table: h5py.Group) -> dict[str, h5py.Dataset]:
    """The columns that hold one number or text per row."""
    rows = len(hdf5.dataset(table, "id")) if hdf5.contains(table, "id") else None
    columns_by_name = {}
    for name in table:
        data = hdf5.member(table, name)
        if name == "id" or name.endswith("_index") or hdf5.contains(table, f"{name}_index"):
            continue
        if not hdf5.is_dataset(data) or data.ndim != 1 or not (hdf5.is_numeric(data) or hdf5.is_text(data)):
            continue
        if rows in (None, len(data)):
            hdf5.check_stored_inside(data)
            columns_by_name[name] = data
    return columns_by_name


def find_column(table: h5py.Group, names: Sequence[str], flag: str) -> str:
    """The first of `names` that is a column of the table.

    Raises:
        BadInput: none is; the message lists the columns and names the option to choose one.
    """
    existing = columns(table)
    for name in names:
        if name in existing:
            return name
    raise BadInput(
        f"{hdf5.location(table)}: there is no column {' or '.join(names)}; there are {', '.join(existing) or 'none'}; "
        f"choose with {flag}"
    )


def read_values(column: h5py.Dataset) -> list[Any]:
    """A column as plain numbers or text, None if unknown."""
    if hdf5.is_text(column):
        return [text or None for text in hdf5.read_texts(column)]
    return [value if np.isfinite(value) else None for value in column[()].tolist()]


def read_names(column: h5py.Dataset) -> list[str]:
    """A column as text: whole floats without a decimal point, empty if there is no number."""
    if column.dtype.kind == "f":
        return ["" if np.isnan(value) else f"{value:g}" for value in column[()].tolist()]
    return hdf5.read_texts(column)


def ragged_spans(table: h5py.Group, name: str) -> list[tuple[int, int]]:
    """Start and end of each row's values in a ragged column."""
    ends = hdf5.numeric_dataset(table, f"{name}_index", 1)[()].astype(np.int64)
    length = len(hdf5.numeric_dataset(table, name))
    if len(ends) and (ends[0] < 0 or np.any(np.diff(ends) < 0) or ends[-1] > length):
        raise BadInput(f"{hdf5.location(table)}/{name}_index does not fit {name}; the file is damaged")
    return list(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True))


# ---- units ---------------------------------------------------------------------------------------------------------


def electrode_locations(file: h5py.File, units: h5py.Group) -> list[str | None] | None:
    """The location of each unit's first electrode, if the file has electrodes."""
    if not hdf5.contains(units, "electrodes") or not hdf5.contains(file, ELECTRODE_LOCATIONS):
        return None
    locations = hdf5.read_texts(hdf5.dataset(file, ELECTRODE_LOCATIONS))
    electrodes = hdf5.numeric_dataset(units, "electrodes", 1)[()].tolist()
    if any(not 0 <= electrode < len(locations) for electrode in electrodes):
        raise BadInput(f"{hdf5.location(units)}/electrodes names electrodes that do not exist; the file is damaged")
    if hdf5.contains(units, "electrodes_index"):
        spans = ragged_spans(units, "electrodes")
    else:
        spans = [(k, k + 1) for k in range(len(electrodes))]
    return [locations[electrodes[begin]] or None if begin < end else None for begin, end in spans]


def subject_id(file: h5py.File) -> str | None:
    """The subject of the session, if the file names it."""
    return hdf5.decode_text(hdf5.dataset(file, SUBJECT_ID)[()]) if hdf5.contains(file, SUBJECT_ID) else None


def observation_intervals(units: h5py.Group) -> Callable[[int], np.ndarray] | None:
    """A function from a unit's row to the intervals in which it was observed, (intervals, 2) in seconds.

    None if the file has no such intervals.
    """
    if not hdf5.contains(units, "obs_intervals"):
        return None
    intervals, spans = hdf5.numeric_dataset(units, "obs_intervals", 2), ragged_spans(units, "obs_intervals")
    return lambda unit: intervals[slice(*spans[unit])]
