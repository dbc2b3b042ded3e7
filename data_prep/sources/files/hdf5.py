"""Safe reading of HDF5 files: read-only, without following links or external storage out of the file.

h5py is imported where it is used, so that the command line does not wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import check_claim

if TYPE_CHECKING:
    import h5py

    Node: TypeAlias = h5py.Group | h5py.Dataset

BLOCK_BYTES = 64 * 2**20  # size of HDF5's chunk cache, and the limit of one read


@contextmanager
def open_file(path: Path) -> Iterator[h5py.File]:
    """Open for reading, with a chunk cache of `BLOCK_BYTES`.

    Raises:
        BadInput: HDF5 cannot read something, here or within the block.
    """
    import h5py

    try:
        if not path.is_file():  # opening a pipe would block
            raise FileNotFoundError("no such file")
        with h5py.File(path, "r", rdcc_nbytes=BLOCK_BYTES) as file:
            yield file
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, MemoryError) as error:  # h5py raises all of them
        raise BadInput(f"{path}: not a readable HDF5 file, or damaged ({error})") from error


# ---- groups and datasets -------------------------------------------------------------------------------------------


def is_group(node: Node) -> bool:
    """Whether a node is a group."""
    import h5py

    return isinstance(node, h5py.Group)


def is_dataset(node: Node) -> bool:
    """Whether a node is a dataset."""
    import h5py

    return isinstance(node, h5py.Dataset)


def member(group: h5py.Group, name: str) -> Node:
    """The node at `name`, a path below `group`. Links are not followed, as they could point to any file.

    Raises:
        BadInput: it does not exist (the message lists what does), or the path contains a link.
    """
    node: Node = group
    for step in name.strip("/").split("/"):
        link = _link(node, step)
        if link is None:
            raise _missing(node, group, name)
        if not _is_hard(link):
            raise BadInput(f"{group.file.filename}: {name} is a link; the data must be in the file itself")
        node = node[step]
    return node


def contains(group: h5py.Group, name: str) -> bool:
    """Whether there is a node or a link at `name`; links are not followed."""
    node: Node = group
    for step in name.strip("/").split("/"):
        link = _link(node, step)
        if not _is_hard(link):
            return link is not None
        node = node[step]
    return True


def _link(node: Node, step: str) -> h5py.HardLink | h5py.SoftLink | h5py.ExternalLink | None:
    return node.get(step, getlink=True) if is_group(node) else None


def _is_hard(link: object) -> bool:
    import h5py

    return isinstance(link, h5py.HardLink)


def _missing(parent: Node, group: h5py.Group, name: str) -> BadInput:
    inside = ", ".join(sorted(parent)) if is_group(parent) else ""
    parent_name = "it" if parent.name == "/" else parent.name.lstrip("/")
    full = f"{group.name}/{name}".strip("/")
    return BadInput(f"{group.file.filename}: there is no dataset {full!r}; {parent_name} holds {inside or 'nothing'}")


def subgroup(group: h5py.Group, name: str) -> h5py.Group:
    """The group at `name`.

    Raises:
        BadInput: missing, a link, or a dataset.
    """
    node = member(group, name)
    if not is_group(node):
        raise BadInput(f"{location(node)} is a dataset; it must be a group")
    return node


def dataset(group: h5py.Group, name: str) -> h5py.Dataset:
    """The dataset at `name`, not read yet.

    Raises:
        BadInput: missing, a link, a group, or a dataset that `check_stored_inside` refuses.
    """
    node = member(group, name)
    if not is_dataset(node):
        raise BadInput(f"{location(node)} is a group; it must be a dataset")
    check_stored_inside(node)
    return node


def check_stored_inside(data: h5py.Dataset) -> None:
    """Refuse a dataset whose data are in other files, which could be any, or that claims more than the file can hold.

    Raises:
        BadInput: it does.
    """
    if data.external or data.is_virtual:
        raise BadInput(f"{location(data)} stores its data in other files; the data must be in the file itself")
    try:
        check_claim(data.dtype.itemsize * math.prod(data.shape or ()), Path(data.file.filename).stat().st_size)
    except ValueError as error:
        raise BadInput(f"{location(data)} is {data.dtype} {data.shape}: {error}; the file is damaged") from None


def location(node: Node) -> str:
    """File and name of a node, for messages."""
    return f"{node.file.filename}: {node.name.lstrip('/')}"


# ---- numbers and text ----------------------------------------------------------------------------------------------


def is_text(data: h5py.Dataset) -> bool:
    """Whether a dataset holds strings of fixed or of varying length."""
    import h5py

    return data.dtype.kind == "S" or h5py.check_string_dtype(data.dtype) is not None


def is_numeric(data: h5py.Dataset) -> bool:
    """Whether a dataset holds integers, floats or bools."""
    return data.dtype.kind in "fiub"


def numeric_dataset(group: h5py.Group, name: str, ndim: int | None = None) -> h5py.Dataset:
    """A dataset of plain numbers, not read yet.

    Raises:
        BadInput: as `dataset`, or not numbers, or not `ndim` axes.
    """
    data = dataset(group, name)
    if not is_numeric(data) or data.shape is None or ndim not in (None, data.ndim):
        axes = "" if ndim is None else f" with {ndim} axes"
        raise BadInput(f"{location(data)} is {data.dtype} {data.shape}; expected plain numbers{axes}")
    return data


def read_texts(data: h5py.Dataset) -> list[str]:
    """A one-dimensional dataset of strings, integers or bools, as text.

    Characters along a second axis, as NetCDF stores them, are joined. Bytes that are not UTF-8 are read as latin-1.

    Raises:
        BadInput: anything else, e.g. object arrays and references.
    """
    if data.dtype.kind in "iub" and data.ndim == 1:
        return [str(value) for value in data[()].tolist()]
    if not is_text(data) or data.ndim not in (1, 2) or (data.ndim == 2 and data.dtype.itemsize != 1):
        raise BadInput(f"{location(data)} is {data.dtype} {data.shape}; expected strings or integers along one axis")
    values = data[()]
    if data.ndim == 2:
        values = [b"".join(row) for row in values.tolist()]
    return [decode_text(value) for value in values]


def decode_text(value: bytes | str) -> str:
    """A text as str, without padding; bytes that are not UTF-8 are read as latin-1."""
    if isinstance(value, str):
        return value.strip("\x00 \t\r\n")
    data = bytes(value).strip(b"\x00 \t\r\n")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def rows_at_once(data: h5py.Dataset, axis: int = 0) -> int:
    """Number of rows along `axis` to read at once: whole chunks, so that none is unpacked twice, in `BLOCK_BYTES`."""
    row_bytes = max(1, data.dtype.itemsize * int(np.prod(data.shape)) // max(1, data.shape[axis]))
    chunk = data.chunks[axis] if data.chunks else 1
    most = max(1, BLOCK_BYTES // row_bytes)
    return max(1, most // chunk * chunk if most >= chunk else most)
