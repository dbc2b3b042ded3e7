"""NetCDF files, version 4 (which is HDF5) and version 3, as far as an assembly needs it: named axes, read in pieces."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data_prep.common.errors import BadInput
from data_prep.sources.files import hdf5

_CLASSIC = (b"CDF\x01", b"CDF\x02")
_ATTRIBUTES = ("_FillValue", "missing_value", "scale_factor", "add_offset")
_NOT_A_VARIABLE = b"This is a netCDF dimension but not a netCDF variable"


@dataclass(frozen=True)
class Variable:
    """One variable of an open file.

    Attributes:
        name: of the variable.
        axes: names of its axes, without the one along which a version-3 file keeps the characters of strings.
        shape: lengths of these axes.
        numeric: whether it holds numbers.
    """

    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    numeric: bool
    _data: Any
    _attributes: dict[str, float]

    def piece(self, axis: str, rows: slice) -> np.ndarray:
        """The numbers within a range of one axis, whole along the others, as floats; NaN where there is none."""
        values = np.asarray(self._data[tuple(rows if name == axis else slice(None) for name in self.axes)])
        numbers = values.astype(np.result_type(values.dtype, np.float32))
        for name in ("_FillValue", "missing_value"):
            if name in self._attributes:
                numbers[values == self._attributes[name]] = np.nan
        if "scale_factor" in self._attributes or "add_offset" in self._attributes:
            numbers = numbers * self._attributes.get("scale_factor", 1) + self._attributes.get("add_offset", 0)
        return numbers

    def texts(self) -> list[str]:
        """A variable along one axis, spelled out."""
        if isinstance(self._data, h5py.Dataset):
            return hdf5.texts(self._data)
        values = np.asarray(self._data[:])
        if values.dtype.kind == "S" and values.ndim == 2:
            return [hdf5.decoded(b"".join(row)) for row in values.tolist()]
        return [str(value) for value in values.tolist()]

    def values(self) -> list[Any]:
        """A variable along one axis as plain numbers or text, None for what is not known."""
        if not self.numeric:
            return [text or None for text in self.texts()]
        numbers = np.asarray(self._data[:])
        if numbers.dtype.kind == "f":
            return [value if np.isfinite(value) else None for value in numbers.astype(np.float64).tolist()]
        return numbers.tolist()

    def rows_at_once(self, axis: str) -> int:
        """How many rows along an axis to read at once."""
        where = self.axes.index(axis)
        if isinstance(self._data, h5py.Dataset):
            return hdf5.rows_at_once(self._data, where)
        row_bytes = self._data[:1].dtype.itemsize * int(np.prod(self.shape)) // self.shape[where]
        return max(1, hdf5.BLOCK_BYTES // row_bytes)


@contextmanager
def open_netcdf(path: Path) -> Iterator[dict[str, Variable]]:
    """Open for reading: {name: variable}.

    Raises:
        BadInput: not a NetCDF file, or damaged, or with links or data outside of it.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    if start in _CLASSIC:
        with _classic(path) as variables:
            yield variables
        return
    with hdf5.reading(path) as file:
        yield {name: _from_hdf5(file, name) for name in file if _is_variable(file, name)}


def _is_variable(file: h5py.File, name: str) -> bool:
    """False for groups, and for what only says how long an axis is."""
    if isinstance(file.get(name, getlink=True), h5py.HardLink) and isinstance(file[name], h5py.Group):
        return False
    return not bytes(np.bytes_(hdf5.dataset(file, name).attrs.get("NAME", b""))).startswith(_NOT_A_VARIABLE)


def _from_hdf5(file: h5py.File, name: str) -> Variable:
    found = hdf5.dataset(file, name)
    axes = [_axis(found, k) for k in range(found.ndim)]
    if found.dtype == "S1" and found.ndim == 2:
        axes = axes[:1]
    attributes = {key: found.attrs[key] for key in _ATTRIBUTES if key in found.attrs}
    return Variable(name, tuple(axes), found.shape[: len(axes)], hdf5.is_numeric(found), found, _scalars(attributes))


def _scalars(attributes: dict[str, Any]) -> dict[str, float]:
    return {key: np.ravel(value)[0] for key, value in attributes.items() if np.size(value)}


def _axis(found: h5py.Dataset, k: int) -> str:
    """The name of an axis: that of the scale attached to it; a variable may be the scale of its own axis."""
    if len(found.dims[k]):
        return found.dims[k][0].name.rsplit("/", 1)[-1]
    return found.name.rsplit("/", 1)[-1] if found.is_scale else f"axis {k}"


@contextmanager
def _classic(path: Path) -> Iterator[dict[str, Variable]]:
    from scipy.io import netcdf_file  # here, because few files are of this kind, and it takes a while

    try:
        file = netcdf_file(path, "r", mmap=True)
    except Exception as error:  # it meets a damaged file with any kind of error
        raise BadInput(f"{path}: not a readable NetCDF file, or damaged ({error})") from None
    variables = {}
    for name, found in file.variables.items():
        text = found.typecode() == "c"
        axes, shape = found.dimensions, found.shape
        if text and len(axes) == 2:
            axes, shape = axes[:1], shape[:1]
        attributes = {key: getattr(found, key) for key in _ATTRIBUTES if hasattr(found, key)}
        variables[name] = Variable(name, tuple(axes), tuple(shape), not text, found, _scalars(attributes))
    try:
        yield variables
    finally:
        variables.clear()
        with warnings.catch_warnings():  # of arrays that still look at the file; they keep it mapped themselves
            warnings.simplefilter("ignore", RuntimeWarning)
            file.close()
