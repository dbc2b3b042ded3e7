"""HDF5 files of others: opened for reading only, and nothing is followed that leads out of the file."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import check_claim

BLOCK_BYTES = 64 * 2**20  # of HDF5's chunk cache, and the most that is read of a dataset at once


@contextmanager
def reading(path: Path) -> Iterator[h5py.File]:
    """Open for reading, with a chunk cache that holds a block; what HDF5 cannot read is bad input."""
    try:
        if not path.is_file():  # a pipe would be waited for
            raise FileNotFoundError("no such file")
        with h5py.File(path, "r", rdcc_nbytes=BLOCK_BYTES) as file:
            yield file
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, MemoryError) as error:  # it raises them all
        raise BadInput(f"{path}: not a readable HDF5 file, or damaged ({error})") from error


def member(group: h5py.Group, name: str) -> h5py.Group | h5py.Dataset:
    """What lies at `name`, a path below `group`: a link could name any file of the machine, so none is followed.

    Raises:
        BadInput: nothing there (with what there is), or a link on the way.
    """
    found: h5py.Group | h5py.Dataset = group
    for step in name.strip("/").split("/"):
        link = found.get(step, getlink=True) if isinstance(found, h5py.Group) else None
        if link is None:
            raise _lacks(found, step, group, name)
        if not isinstance(link, h5py.HardLink):
            raise BadInput(f"{group.file.filename}: {name} is a link to elsewhere; it must itself be in the file")
        found = found[step]
    return found


def has(group: h5py.Group, name: str) -> bool:
    """Whether something lies at `name`; a link does, and is not followed to see what is behind it."""
    found: h5py.Group | h5py.Dataset = group
    for step in name.strip("/").split("/"):
        link = found.get(step, getlink=True) if isinstance(found, h5py.Group) else None
        if not isinstance(link, h5py.HardLink):
            return link is not None
        found = found[step]
    return True


def _lacks(parent: h5py.Group | h5py.Dataset, step: str, group: h5py.Group, name: str) -> BadInput:
    inside = ", ".join(sorted(parent)) if isinstance(parent, h5py.Group) else ""
    where = "it" if parent.name == "/" else parent.name.lstrip("/")
    full = f"{group.name}/{name}".strip("/")
    return BadInput(f"{group.file.filename}: there is no dataset {full!r}; {where} holds {inside or 'nothing'}")


def subgroup(group: h5py.Group, name: str) -> h5py.Group:
    """A group below `group`.

    Raises:
        BadInput: not there, a link, or a dataset.
    """
    found = member(group, name)
    if not isinstance(found, h5py.Group):
        raise BadInput(f"{at(found)} is a dataset; it must be a group")
    return found


def dataset(group: h5py.Group, name: str) -> h5py.Dataset:
    """A dataset whose data are in this very file: outside storage could name any file of the machine.

    Raises:
        BadInput: not there, a link, a group, or with its data in other files.
    """
    found = member(group, name)
    if not isinstance(found, h5py.Dataset):
        raise BadInput(f"{at(found)} is a group; it must be a dataset")
    return contained(found)


def contained(found: h5py.Dataset) -> h5py.Dataset:
    """The dataset, if its data are in the file itself, as far as it can hold them; BadInput otherwise."""
    if found.external or found.is_virtual:
        raise BadInput(f"{at(found)} keeps its data in other files; the data must be in the file itself")
    try:
        check_claim(found.dtype.itemsize * math.prod(found.shape or ()), Path(found.file.filename).stat().st_size)
    except ValueError as error:
        raise BadInput(f"{at(found)} is {found.dtype} {found.shape}: {error}; the file is damaged") from None
    return found


def at(found: h5py.Group | h5py.Dataset) -> str:
    """Where something is, for messages."""
    return f"{found.file.filename}: {found.name.lstrip('/')}"


def is_text(found: h5py.Dataset) -> bool:
    """Whether a dataset holds strings of fixed or of varying length."""
    return found.dtype.kind == "S" or h5py.check_string_dtype(found.dtype) is not None


def is_numeric(found: h5py.Dataset) -> bool:
    """Whether a dataset holds integers or floats (bool counts as such)."""
    return found.dtype.kind in "fiub"


def numbers(group: h5py.Group, name: str, ndim: int | None = None) -> h5py.Dataset:
    """A dataset of plain numbers, not read yet.

    Raises:
        BadInput: as `dataset`, or other than numbers, or with another number of axes than `ndim`.
    """
    found = dataset(group, name)
    if not is_numeric(found) or found.shape is None or ndim not in (None, found.ndim):
        axes = "" if ndim is None else f" with {ndim} axes"
        raise BadInput(f"{at(found)} is {found.dtype} {found.shape}; expected are plain numbers{axes}")
    return found


def texts(found: h5py.Dataset) -> list[str]:
    """A one-dimensional dataset of strings, or of integers or bools, which are spelled out.

    Characters in a second axis, as NetCDF keeps them, are joined. Bytes that are not UTF-8 are read as latin-1.

    Raises:
        BadInput: anything else, object arrays and references among it.
    """
    if found.dtype.kind in "iub" and found.ndim == 1:
        return [str(value) for value in found[()].tolist()]
    if not is_text(found) or found.ndim not in (1, 2) or (found.ndim == 2 and found.dtype.itemsize != 1):
        raise BadInput(f"{at(found)} is {found.dtype} {found.shape}; expected are strings or integers, one axis")
    values = found[()]
    if found.ndim == 2:
        values = [b"".join(row) for row in values.tolist()]
    return [decoded(value) for value in values]


def decoded(value: bytes | str) -> str:
    """Text without padding."""
    if isinstance(value, str):
        return value.strip("\x00 \t\r\n")
    data = bytes(value).strip(b"\x00 \t\r\n")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def rows_at_once(found: h5py.Dataset, axis: int = 0) -> int:
    """How many rows along `axis` to read at once: whole chunks, so that none is unpacked twice, and never much memory.

    Args:
        found: the dataset.
        axis: along which it is read in pieces.
    """
    row_bytes = max(1, found.dtype.itemsize * int(np.prod(found.shape)) // max(1, found.shape[axis]))
    chunk = found.chunks[axis] if found.chunks else 1
    most = max(1, BLOCK_BYTES // row_bytes)
    return max(1, most // chunk * chunk if most >= chunk else most)
