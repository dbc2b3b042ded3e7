"""Predictions for other programs: NetCDF as BrainIO has its assemblies, and MATLAB."""

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import scipy.io

from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import npz_arrays
from data_prep.shards.folder import ShardFolder
from data_prep.shards.manifest import Manifest

# What netCDF-4 says of a dimension that has no values of its own; its length follows.
_NO_VARIABLE = "This is a netCDF dimension but not a netCDF variable."


@dataclass
class Assembly:
    """Predictions with what is known of stimuli and sites.

    Attributes:
        arrays: "prediction" and, where it is known, "target": float32 (presentations, neuroids).
        stimuli: facts by name, a list as long as the presentations; `stimulus_id` among them.
        sites: facts by name, a list as long as the neuroids; `neuroid_id` among them.
        facts: of the whole: recording, split, units, response window.
    """

    arrays: dict[str, np.ndarray]
    stimuli: dict[str, list[Any]]
    sites: dict[str, list[Any]]
    facts: dict[str, Any]


def read_predictions(path: Path) -> dict[str, np.ndarray]:
    """A predictions.npz.

    Raises:
        BadInput: it is missing or damaged.
    """
    try:
        arrays = npz_arrays(path)
        _check_shapes(arrays)
    except FileNotFoundError:
        raise BadInput(f"{path} is missing; score the run on that split first (train/evaluate.py)") from None
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{path} cannot be read ({error}); score the run again") from None
    if "prediction" not in arrays:
        raise BadInput(f"{path} holds no predicted responses: the network names objects; export it as timm, say")
    return arrays


def _check_shapes(arrays: Mapping[str, np.ndarray]) -> None:
    """Refuse predictions that are not for their stimuli and sites.

    Raises:
        ValueError, KeyError: they are not.
    """
    for name in {"prediction", "target"} & set(arrays):
        expected = (*arrays["stimulus_id"].shape, *arrays["site_id"].shape)
        if arrays[name].shape != expected:
            raise ValueError(f"{name} is of the shape {arrays[name].shape}, not {expected}")


def assemble(predictions: Mapping[str, np.ndarray], shards: ShardFolder | None, split: str) -> Assembly:
    """Put predictions together with what the shard folder tells of their stimuli and sites.

    Args:
        predictions: of `read_predictions`.
        shards: the shard folder; None where it is gone.
        split: that was predicted.
    """
    ids = [str(name) for name in predictions["stimulus_id"]]
    sites = {"neuroid_id": [str(name) for name in predictions["site_id"]]}
    stimuli: dict[str, list[Any]] = {"stimulus_id": ids}
    facts: dict[str, Any] = {"split": split}
    if shards is not None:
        stimuli |= _by_name(_stimulus_facts(shards, ids))
        known = {str(site["id"]): site for site in shards.manifest.sites}
        others = [known.get(site, {}) for site in sites["neuroid_id"]]
        sites |= _by_name([{name: value for name, value in other.items() if name != "id"} for other in others])
        facts |= _recording_facts(shards.manifest)
    arrays = {name: predictions[name] for name in ("prediction", "target") if name in predictions}
    return Assembly(arrays, stimuli, sites, facts)


def _recording_facts(manifest: Manifest) -> dict[str, Any]:
    facts: dict[str, Any] = {"recording": manifest.name, "units": manifest.rates.units}
    if manifest.simulated:
        facts["simulated"] = "no brain was recorded"
    if manifest.response_window_ms is not None:
        facts["time_bin_start"], facts["time_bin_end"] = manifest.response_window_ms
    return facts


def _stimulus_facts(shards: ShardFolder, ids: list[str]) -> list[dict[str, Any]]:
    place = {}
    for name in shards.manifest.splits:
        split = shards.split(name)
        place |= {stimulus_id: (split, position) for position, stimulus_id in enumerate(split.stimulus_ids)}
    if missing := [name for name in ids if name not in place]:
        raise BadInput(f"{shards.folder} has no stimulus {missing[0]!r}; name the folder that was scored with --data")
    return [split.meta(position) for split, position in (place[name] for name in ids)]


def _by_name(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Facts as columns: numbers where all are, with NaN for none, else text, with "" for none."""
    columns = {}
    for name in sorted(set().union(*rows)):
        values = [row.get(name) for row in rows]
        numeric = all(value is None or type(value) in (int, float) for value in values)
        none = np.nan if numeric else ""
        columns[name] = [none if value is None else value if numeric else str(value) for value in values]
    return columns


def netcdf_bytes(assembly: Assembly) -> bytes:
    """A NetCDF-4 file that xarray opens: `prediction` and `target` (presentation, neuroid) with their coordinates."""
    buffer = io.BytesIO()
    count = {"presentation": len(assembly.stimuli["stimulus_id"]), "neuroid": len(assembly.sites["neuroid_id"])}
    with h5py.File(buffer, "w", track_order=True) as file:
        for number, (dimension, length) in enumerate(count.items()):
            scale = file.create_dataset(dimension, shape=(length,), dtype=">f4")
            scale.make_scale(f"{_NO_VARIABLE}{length:>10}")
            scale.attrs["_Netcdf4Dimid"] = np.int32(number)
        coordinates = []
        for dimension, columns in (("presentation", assembly.stimuli), ("neuroid", assembly.sites)):
            for name, values in columns.items():
                free = name not in {*count, *assembly.arrays, *coordinates}
                coordinates.append(name if free else f"{dimension}_{name}")
                _variable(file, coordinates[-1], values, (dimension,))
        for name, values in assembly.arrays.items():
            variable = _variable(file, name, values, tuple(count))
            variable.attrs["coordinates"] = " ".join(coordinates)
            variable.attrs["units"] = assembly.facts.get("units", "as recorded")
        for name, value in assembly.facts.items():
            file.attrs[name] = value
    return buffer.getvalue()


def _variable(file: h5py.File, name: str, values: Any, dimensions: tuple[str, ...]) -> h5py.Dataset:
    text = isinstance(values, list) and any(isinstance(value, str) for value in values)
    variable = file.create_dataset(name, data=values, dtype=h5py.string_dtype() if text else None)
    for axis, dimension in enumerate(dimensions):
        variable.dims[axis].attach_scale(file[dimension])
    return variable


def mat_bytes(assembly: Assembly) -> bytes:
    """A MATLAB file (version 5): prediction, target, and structs `stimuli`, `sites` and `facts`."""
    buffer = io.BytesIO()
    tables = {
        name: {_identifier(key): _column(values) for key, values in columns.items()}
        for name, columns in (("stimuli", assembly.stimuli), ("sites", assembly.sites))
    }
    scipy.io.savemat(
        buffer, {**assembly.arrays, **tables, "facts": assembly.facts}, long_field_names=True, oned_as="column"
    )
    return buffer.getvalue()


def _identifier(name: str) -> str:
    """A name that MATLAB takes for a field."""
    name = re.sub(r"\W", "_", name, flags=re.ASCII)[:63]
    return name if name[:1].isalpha() else f"x{name}"[:63]


def _column(values: list[Any]) -> np.ndarray:
    """Numbers as a column; text as a cell array."""
    text = any(isinstance(value, str) for value in values)
    return np.array(values, dtype=object if text else np.float64)
