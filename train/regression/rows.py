"""Matrices whose rows lie on disk or are shared out among ranks, and the ranks that share them."""

from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from data_prep.common.errors import RunFailed
from train.regression.reused_memory import ReusedMemory


class Ranks(Protocol):
    """The processes that hold the rows of a matrix between them: a `Runtime`, or one process `Alone`."""

    rank: int
    ranks: int
    device: torch.device

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in the order of the ranks."""

    def gather_rows(self, rows: torch.Tensor) -> np.ndarray:
        """The rows of all ranks, in the order of the ranks."""

    def broadcast(self, tensor: torch.Tensor, rank: int = 0) -> torch.Tensor:
        """The tensor of one rank, on every rank."""


class Alone:
    """One process that holds a whole matrix.

    Args:
        device: where it computes.
    """

    rank, ranks = 0, 1

    def __init__(self, device: torch.device):
        self.device = device

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Ranks`."""
        return tensor

    def gather_rows(self, rows: torch.Tensor) -> np.ndarray:
        """See `Ranks`."""
        return rows.cpu().numpy()

    def broadcast(self, tensor: torch.Tensor, rank: int = 0) -> torch.Tensor:
        """See `Ranks`."""
        return tensor


ON_CPU = Alone(torch.device("cpu"))


class Rows(Protocol):
    """A matrix that is read a few rows at a time; a numpy array is one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, columns)."""

    @property
    def dtype(self) -> np.dtype:
        """float32 or float64."""

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        """Some rows, one after the other."""


class RowFile:
    """The matrix in an .npy file, float32 or float64 and row after row.

    It is read into buffers and not mapped, so that its pages do not count as memory of this process.

    Args:
        path: of the file.

    Raises:
        ValueError: it holds something else.
    """

    def __init__(self, path: Path):
        self._path = path
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, by_columns, dtype = read_header[version](file)
            self._offset = file.tell()
        if len(shape) != 2 or by_columns or dtype not in (np.float32, np.float64):
            raise ValueError(f"{path} is not a matrix of floats, row after row")
        self.shape: tuple[int, ...] = shape
        self.dtype: np.dtype = dtype

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        """Rows, read from the file."""
        start, stop, _ = rows.indices(self.shape[0])
        values = np.empty((max(stop - start, 0), self.shape[1]), self.dtype)
        self.read_into(values, start)
        return values

    def read_into(self, out: np.ndarray, first: int) -> None:
        """Fill an array (rows, columns) of the matrix's type with rows from the `first` on.

        Raises:
            RunFailed: the file ends early.
        """
        with self._path.open("rb", buffering=0) as file:
            file.seek(self._offset + first * self.shape[1] * self.dtype.itemsize)
            unread = out.data.cast("B") if out.size else memoryview(b"")
            while unread:
                count = file.readinto(unread)
                if not count:
                    raise RunFailed(f"{self._path} has changed or was cut while the probe ran; start it again")
                unread = unread[count:]


class RowReader:
    """Reads rows again and again into the same memory.

    Args:
        rows: of the matrix.
    """

    def __init__(self, rows: Rows):
        self._rows = rows
        self._memory = ReusedMemory(torch.from_numpy(np.empty(0, rows.dtype)).dtype, torch.device("cpu"))

    def __call__(self, first: int, stop: int) -> np.ndarray:
        """Rows `first` to `stop`; valid until the next are read."""
        if not isinstance(self._rows, RowFile):
            return self._rows[first:stop]
        values = self._memory.matrix(stop - first, self._rows.shape[1]).numpy()
        self._rows.read_into(values, first)
        return values


def stripe(count: int, rank: int, ranks: int) -> slice:
    """The rows that a rank holds of a matrix of `count`: one stretch, rank after rank."""
    return slice(rank * count // ranks, (rank + 1) * count // ranks)


BLOCK_BYTES = 2**23  # of rows that are read at a time: more is hardly faster, and is left in pieces when it is freed


def block_rows(rows: Rows, memory_bytes: float = BLOCK_BYTES) -> int:
    """How many rows take `memory_bytes` in float64, at least one."""
    return max(int(min(memory_bytes, BLOCK_BYTES) / (8 * max(rows.shape[1], 1))), 1)
