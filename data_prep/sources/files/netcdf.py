"""Reading NetCDF files of version 4 (which is HDF5) and version 3: variables with named axes, read in blocks."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.common.errors import BadInput
from data_prep.sources.files import hdf5

if TYPE_CHECKING:
    import h5py

_VERSION_3 = (b"CDF\x01", b"CDF\x02")
_ATTRIBUTES = ("_FillValue", "missing_value", "scale_factor", "add_offset")
_DIMENSION_ONLY = b"This is a netCDF dimension but not a netCDF variable"


@dataclass(frozen=True)
class Variable(ABC):
    """One variable of an open file.

    Attributes:
        name: of the variable.
        axes: names of its axes, except an axis along the characters of strings.
        shape: lengths of these axes.
        numeric: whether it holds numbers.
    """

    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    numeric: bool
    _data: Any
    _attributes: dict[str, float]

    @abstractmethod
    def texts(self) -> list[str]:
        """The values of a variable with one axis, as text."""

    @abstractmethod
    def rows_at_once(self, axis: str) -> int:
        """Number of rows along an axis to read at once."""

    def values(self) -> list[Any]:
        """The values of a variable with one axis as plain numbers or text, None if unknown."""
        if not self.numeric:
            return [text or None for text in self.texts()]
        numbers = np.asarray(self._data[:])
        if numbers.dtype.kind == "f":
            return [value if np.isfinite(value) else None for value in numbers.astype(np.float64).tolist()]
        return numbers.tolist()

    def read_rows(self, axis: str, rows: slice) -> np.ndarray:
        """The numbers within a range of one axis, and all along the others, as floats; NaN where missing."""
        values = np.asarray(self._data[tuple(rows if name == axis else slice(None) for name in self.axes)])
        numbers = values.astype(np.result_type(values.dtype, np.float32))
        for name in ("_FillValue", "missing_value"):
            if name in self._attributes:
                numbers[values == self._attributes[name]] = np.nan
        if "scale_factor" in self._attributes or "add_offset" in self._attributes:
            numbers = numbers * self._attributes.get("scale_factor", 1) + self._attributes.get("add_offset", 0)
        return numbers


class Hdf5Variable(Variable):
    """A variable of a version-4 file."""

    def texts(self) -> list[str]:
        """See `Variable.texts`."""
        return hdf5.read_texts(self._data)

    def rows_at_once(self, axis: str) -> int:
        """Whole chunks, see `hdf5.rows_at_once`."""
        return hdf5.rows_at_once(self._data, self.axes.index(axis))


class Version3Variable(Variable):
    """A variable of a version-3 file, as scipy reads it."""

    def texts(self) -> list[str]:
        """See `Variable.texts`."""
        values = np.asarray(self._data[:])
        if values.dtype.kind == "S" and values.ndim == 2:
            return [hdf5.decode_text(b"".join(row)) for row in values.tolist()]
        return [str(value) for value in values.tolist()]

    def rows_at_once(self, axis: str) -> int:
        """As many as fit into a block."""
        row_bytes = self._data[:1].dtype.itemsize * int(np.prod(self.shape)) // self.shape[self.axes.index(axis)]
        return max(1, hdf5.BLOCK_BYTES // row_bytes)


@contextmanager
def open_netcdf(path: Path) -> Iterator[dict[str, Variable]]:
    """Open for reading: {name: variable}.

    Raises:
        BadInput: not a NetCDF file, damaged, or with links or data outside the file.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    if magic in _VERSION_3:
        with _open_version_3(path) as variables:
            yield variables
        return
    with hdf5.open_file(path) as file:
        yield {name: _hdf5_variable(file, name) for name in file if _is_variable(file, name)}


# ---- version 4 -----------------------------------------------------------------------------------------------------


def _is_variable(file: h5py.File, name: str) -> bool:
    """False for groups, and for datasets that only give the length of an axis."""
    if hdf5.is_group(hdf5.member(file, name)):
        return False
    return not bytes(np.bytes_(hdf5.dataset(file, name).attrs.get("NAME", b""))).startswith(_DIMENSION_ONLY)


def _hdf5_variable(file: h5py.File, name: str) -> Hdf5Variable:
    data = hdf5.dataset(file, name)
    axes = [_axis_name(data, k) for k in range(data.ndim)]
    if data.dtype == "S1" and data.ndim == 2:
        axes = axes[:1]
    attributes = {key: data.attrs[key] for key in _ATTRIBUTES if key in data.attrs}
    return Hdf5Variable(
        name, tuple(axes), data.shape[: len(axes)], hdf5.is_numeric(data), data, _first_values(attributes)
    )


def _axis_name(data: h5py.Dataset, k: int) -> str:
    """The name of the scale that is attached to an axis; a variable may be the scale of its own axis."""
    if len(data.dims[k]):
        return data.dims[k][0].name.rsplit("/", 1)[-1]
    return data.name.rsplit("/", 1)[-1] if data.is_scale else f"axis {k}"


def _first_values(attributes: dict[str, Any]) -> dict[str, float]:
    return {key: np.ravel(value)[0] for key, value in attributes.items() if np.size(value)}


# ---- version 3 -----------------------------------------------------------------------------------------------------


@contextmanager
def _open_version_3(path: Path) -> Iterator[dict[str, Variable]]:
    from scipy.io import netcdf_file  # here because it is slow to import, and few files are of this version

    try:
        file = netcdf_file(path, "r", mmap=True)
    except Exception as error:  # scipy raises errors of any kind for damaged files
        raise BadInput(f"{path}: not a readable NetCDF file, or damaged ({error})") from None
    variables: dict[str, Variable] = {}
    for name, data in file.variables.items():
        is_text = data.typecode() == "c"
        axes, shape = tuple(data.dimensions), tuple(data.shape)
        if is_text and len(axes) == 2:
            axes, shape = axes[:1], shape[:1]
        attributes = {key: getattr(data, key) for key in _ATTRIBUTES if hasattr(data, key)}
        variables[name] = Version3Variable(name, axes, shape, not is_text, data, _first_values(attributes))
    try:
        yield variables
    finally:
        variables.clear()
        with warnings.catch_warnings():  # that arrays still use the file; they keep their own memory map
            warnings.simplefilter("ignore", RuntimeWarning)
            file.close()
