"""Predictions in the formats of other programs: NetCDF, as BrainIO has its assemblies, and MATLAB."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
import scipy.io

from data_prep.common.errors import BadInput
from data_prep.shards.folder import ShardFolder, ShardSplit
from data_prep.shards.manifest import Manifest
from train.evaluation.predictions_file import Predictions

# What netCDF-4 writes for a dimension that has no values of its own; its length follows.
_NO_VARIABLE = "This is a netCDF dimension but not a netCDF variable."


@dataclass(frozen=True)
class Assembly:
    """Predictions with what is known about their stimuli and sites.

    Attributes:
        arrays: "prediction" and, where it is known, "target": float32 (presentations, neuroids).
        stimuli: facts by name, one value per presentation; `stimulus_id` is one of them.
        sites: facts by name, one value per neuroid; `neuroid_id` is one of them.
        facts: about the whole: recording, split, units, response window.
    """

    arrays: dict[str, np.ndarray]
    stimuli: dict[str, list[Any]]
    sites: dict[str, list[Any]]
    facts: dict[str, Any]


def assemble(predictions: Predictions, shards: ShardFolder | None, split: str) -> Assembly:
    """Combine predictions with the shard folder's facts about their stimuli and sites.

    Args:
        predictions: of a split.
        shards: the shard folder; None if it no longer exists.
        split: that was predicted.

    Raises:
        BadInput: the shard folder lacks one of the stimuli.
    """
    sites: dict[str, list[Any]] = {"neuroid_id": predictions.site_ids}
    stimuli: dict[str, list[Any]] = {"stimulus_id": predictions.stimulus_ids}
    facts: dict[str, Any] = {"split": split}
    if shards is not None:
        stimuli |= _columns(_stimulus_facts(shards, predictions.stimulus_ids))
        facts_of_site = {str(site["id"]): site for site in shards.manifest.sites}
        sites_facts = [facts_of_site.get(site, {}) for site in predictions.site_ids]
        sites |= _columns([{name: value for name, value in site.items() if name != "id"} for site in sites_facts])
        facts |= _recording_facts(shards.manifest)
    arrays = {"prediction": predictions.rates}
    if predictions.responses is not None:
        arrays["target"] = predictions.responses
    return Assembly(arrays, stimuli, sites, facts)


def _recording_facts(manifest: Manifest) -> dict[str, Any]:
    facts: dict[str, Any] = {"recording": manifest.name, "units": manifest.rates.units}
    if manifest.simulated:
        facts["simulated"] = "no brain was recorded"
    if manifest.response_window_ms is not None:
        facts["time_bin_start"], facts["time_bin_end"] = manifest.response_window_ms
    return facts


def _stimulus_facts(shards: ShardFolder, ids: Sequence[str]) -> list[dict[str, Any]]:
    where: dict[str, tuple[ShardSplit, int]] = {}
    for name in shards.manifest.splits:
        split = shards.split(name)
        where |= {stimulus_id: (split, position) for position, stimulus_id in enumerate(split.stimulus_ids)}
    facts = []
    for stimulus_id in ids:
        if stimulus_id not in where:
            raise BadInput(
                f"{shards.folder} has no stimulus {stimulus_id!r}; give the folder that was scored as --data"
            )
        split, position = where[stimulus_id]
        facts.append(split.meta(position))
    return facts


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Facts of each row as columns: of numbers if all are, NaN where one is missing; else of text, "" where missing."""
    names: set[str] = set().union(*rows)
    return {name: _column_of([row.get(name) for row in rows]) for name in sorted(names)}


def _column_of(values: list[Any]) -> list[Any]:
    if all(value is None or type(value) in (int, float) for value in values):
        return [np.nan if value is None else value for value in values]
    return ["" if value is None else str(value) for value in values]


def netcdf_bytes(assembly: Assembly) -> bytes:
    """A NetCDF-4 file for xarray: `prediction` and `target` (presentation, neuroid), with their coordinates."""
    buffer = io.BytesIO()
    lengths = {"presentation": len(assembly.stimuli["stimulus_id"]), "neuroid": len(assembly.sites["neuroid_id"])}
    with h5py.File(buffer, "w", track_order=True) as file:
        for number, (dimension, length) in enumerate(lengths.items()):
            scale = file.create_dataset(dimension, shape=(length,), dtype=">f4")
            scale.make_scale(f"{_NO_VARIABLE}{length:>10}")
            scale.attrs["_Netcdf4Dimid"] = np.int32(number)
        coordinates: list[str] = []
        for dimension, columns in (("presentation", assembly.stimuli), ("neuroid", assembly.sites)):
            for name, values in columns.items():
                taken = name in lengths or name in assembly.arrays or name in coordinates
                coordinate = f"{dimension}_{name}" if taken else name
                coordinates.append(coordinate)
                _add_variable(file, coordinate, values, [dimension])
        for name, array in assembly.arrays.items():
            variable = _add_variable(file, name, array, list(lengths))
            variable.attrs["coordinates"] = " ".join(coordinates)
            variable.attrs["units"] = assembly.facts.get("units", "as recorded")
        for name, value in assembly.facts.items():
            file.attrs[name] = value
    return buffer.getvalue()


def _add_variable(
    file: h5py.File, name: str, values: np.ndarray | list[Any], dimensions: Sequence[str]
) -> h5py.Dataset:
    is_text = isinstance(values, list) and any(isinstance(value, str) for value in values)
    variable = file.create_dataset(name, data=values, dtype=h5py.string_dtype() if is_text else None)
    for axis, dimension in enumerate(dimensions):
        variable.dims[axis].attach_scale(file[dimension])
    return variable


def mat_bytes(assembly: Assembly) -> bytes:
    """A MATLAB 5 file: prediction and target, and the structs `stimuli`, `sites` and `facts`."""
    variables: dict[str, Any] = dict(assembly.arrays)
    for struct, columns in (("stimuli", assembly.stimuli), ("sites", assembly.sites)):
        variables[struct] = {_field_name(name): _matlab_column(values) for name, values in columns.items()}
    variables["facts"] = assembly.facts
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, variables, long_field_names=True, oned_as="column")
    return buffer.getvalue()


def _field_name(name: str) -> str:
    """The name as MATLAB accepts it for a field."""
    name = re.sub(r"\W", "_", name, flags=re.ASCII)[:63]
    return name if name[:1].isalpha() else f"x{name}"[:63]


def _matlab_column(values: list[Any]) -> np.ndarray:
    """Numbers as a column; text as a cell array."""
    is_text = any(isinstance(value, str) for value in values)
    return np.array(values, dtype=object if is_text else np.float64)
