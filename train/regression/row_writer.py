"""Writes a matrix to disk block by block, in any order, without holding or mapping it."""

import os
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from data_prep.common.errors import RunFailed


class RowWriter:
    """An .npy file that gets its name when all of its blocks are written and the `with` block ends without an error.

    Args:
        path: of the file.
        shape: rows and columns of the matrix.
        dtype: of its elements.
    """

    def __init__(self, path: Path, shape: tuple[int, int], dtype: np.dtype):
        self._path, self._temporary = path, path.with_suffix(".tmp")
        self._columns, self._dtype = shape[1], dtype
        self._file = self._temporary.open("wb")
        header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)
        self._file.flush()
        self._start = self._file.tell()

    def write(self, row: int, column: int, block: np.ndarray) -> None:
        """Put a block (rows, columns) with its upper left corner at `row` and `column`.

        Raises:
            RunFailed: the disk is full.
        """
        block = np.ascontiguousarray(block, self._dtype)
        rows = block.reshape(1, -1) if block.shape[1] == self._columns else block
        stride = self._columns * self._dtype.itemsize
        try:
            for number, content in enumerate(rows, start=row):
                _write_all(self._file.fileno(), content, self._start + number * stride + column * self._dtype.itemsize)
        except OSError as error:
            raise RunFailed(
                f"{self._path.parent} has no room for the inner products ({error.strerror}); probe fewer --layers, or "
                "choose another folder with --scratch"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()
        if kind is None:
            self._temporary.replace(self._path)


def _write_all(descriptor: int, content: np.ndarray, offset: int) -> None:
    """Write a contiguous array; a system call takes 2 GiB at most."""
    data, done = content.data.cast("B"), 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)
