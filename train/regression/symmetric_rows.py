"""Products of a large symmetric matrix with a few vectors: each rank reads the rows that it holds, block by block."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from train.regression.reused_memory import ReusedMemory
from train.regression.rows import Ranks, RowReader, Rows, block_rows


@dataclass(frozen=True)
class _Block:
    """Some rows of the matrix.

    Attributes:
        where: which of this rank's rows they are.
        columns: float64 (rows, n), on the device; valid until the next block.
    """

    where: slice
    columns: torch.Tensor


@dataclass(frozen=True)
class SymmetricRows:
    """The rows and columns of some of N items, n, in a symmetric matrix whose rows are shared out among ranks.

    Attributes:
        rows: this rank's rows, (rows, N), float32 or float64.
        first: position of its first row among the N; the ranks have all rows between them, one rank after the other.
        kept: positions of the n among the N, ascending.
        ranks: that share the rows.
        centred: whether the n rows and columns are centred on their mean, without a copy of the matrix.
        memory_bytes: of rows that are read at a time.
    """

    rows: Rows
    first: int
    kept: np.ndarray
    ranks: Ranks
    centred: bool
    memory_bytes: float

    def __post_init__(self) -> None:
        if (np.diff(self.kept) <= 0).any():
            raise ValueError("the positions of the stimuli to fit must ascend")

    @property
    def size(self) -> int:
        """n."""
        return len(self.kept)

    @cached_property
    def own(self) -> slice:
        """Which of the n rows this rank holds."""
        return self._between(self.first, self.first + self.rows.shape[0])

    @cached_property
    def column_mean(self) -> torch.Tensor:
        """Of the n rows, before they are centred, float64 (n,)."""
        return self._row_means_and_diagonal[:, 0]

    @cached_property
    def diagonal(self) -> torch.Tensor:
        """Of the n x n matrix, centred where it is, float64 (n,)."""
        mean, diagonal = self._row_means_and_diagonal.unbind(1)
        return diagonal - 2 * mean + mean.mean() if self.centred else diagonal

    @cached_property
    def _row_means_and_diagonal(self) -> torch.Tensor:
        both = torch.empty(self.own.stop - self.own.start, 2, dtype=torch.float64, device=self.ranks.device)
        for block in self._blocks():
            both[block.where, 0] = block.columns.mean(1)
            start = self.own.start + block.where.start
            both[block.where, 1] = block.columns.diagonal(start)[: len(block.columns)]
        return torch.from_numpy(self.ranks.gather_rows(both)).to(self.ranks.device)

    def multiply(self, vectors: torch.Tensor) -> torch.Tensor:
        """Times vectors.

        Args:
            vectors: this rank's rows of them, float64 (own rows, columns).

        Returns:
            The same rows of the product.
        """
        return self.multiply_whole(torch.from_numpy(self.ranks.gather_rows(vectors)).to(self.ranks.device))

    def multiply_whole(self, vectors: torch.Tensor) -> torch.Tensor:
        """Times vectors of which each rank has all rows, float64 (n, columns); returns this rank's rows."""
        # With a vector in each row, as it is faster to have more columns than rows in a product.
        across = (vectors - vectors.mean(0) if self.centred else vectors).T.contiguous()
        product = across.new_empty(len(across), self.own.stop - self.own.start)
        for block in self._blocks():
            torch.mm(across, block.columns.T, out=product[:, block.where])
        if self.centred:
            product -= (across @ self.column_mean)[:, None]
        return product.T

    def dense(self) -> np.ndarray | None:
        """The n x n matrix before it is centred, float64, on the main rank; None on the others."""
        whole = np.empty((self.size, self.size)) if self.ranks.rank == 0 else None
        counts = self.ranks.gather_rows(torch.tensor([self.own.stop - self.own.start], device=self.ranks.device))
        start, height = 0, block_rows(self.rows, self.memory_bytes)
        for rank, count in enumerate(counts.tolist()):
            for first in range(0, count, height):
                stop = min(first + height, count)
                rows = torch.empty(stop - first, self.size, dtype=torch.float64, device=self.ranks.device)
                if rank == self.ranks.rank:
                    for block in self._blocks(slice(first, stop)):
                        rows[block.where.start - first : block.where.stop - first] = block.columns
                rows = self.ranks.broadcast(rows, rank)
                if whole is not None:
                    whole[start + first : start + stop] = rows.cpu().numpy()
            start += count
        return whole

    def other_rows(self, positions: np.ndarray, vectors: torch.Tensor) -> torch.Tensor:
        """The rows of other items times vectors, centred on the n.

        Args:
            positions: of these among the N, ascending.
            vectors: float64 (n, columns).

        Returns:
            float64 (positions of this rank, columns).
        """
        centred = vectors - vectors.mean(0)
        own = self._local(positions)
        product = vectors.new_empty(len(own), vectors.shape[1])
        for start in range(0, len(own), block_rows(self.rows, self.memory_bytes)):
            chosen = own[start : start + block_rows(self.rows, self.memory_bytes)]
            values = np.concatenate([self.rows[row : row + 1] for row in chosen.tolist()])
            product[start : start + len(chosen)] = self._columns(values) @ centred
        return product - self.column_mean @ centred

    # -------------------------------------------------------------------------------------------------- reading rows

    def _between(self, start: int, stop: int) -> slice:
        """Which of the n lie between two positions."""
        return slice(*np.searchsorted(self.kept, [start, stop]).tolist())

    def _local(self, positions: np.ndarray) -> np.ndarray:
        """This rank's rows of some positions."""
        local = positions - self.first
        return local[(local >= 0) & (local < self.rows.shape[0])]

    @cached_property
    def _span(self) -> slice | None:
        """The columns, where they are one stretch."""
        start, stop = int(self.kept[0]), int(self.kept[-1]) + 1
        return slice(start, stop) if stop - start == self.size else None

    @cached_property
    def _read(self) -> RowReader:
        return RowReader(self.rows)

    @cached_property
    def _doubles(self) -> ReusedMemory:
        return ReusedMemory(torch.float64, self.ranks.device)

    def _columns(self, values: np.ndarray) -> torch.Tensor:
        """The n columns of some rows, on the device; valid until it is called again."""
        kept = values[:, self.kept] if self._span is None else values[:, self._span]
        writable = kept if kept.flags.writeable else kept.copy()
        on_device = torch.from_numpy(writable).to(self.ranks.device, non_blocking=True)
        return on_device if on_device.dtype == torch.float64 else self._doubles.matrix(*kept.shape).copy_(on_device)

    def _blocks(self, of_own: slice | None = None) -> Iterator[_Block]:
        """This rank's rows of the n, or some of them, block after block."""
        local, height = self.kept[self.own] - self.first, block_rows(self.rows, self.memory_bytes)
        begin, end = (0, len(local)) if of_own is None else (of_own.start, of_own.stop)
        start = begin
        while start < end:
            # As many of the n as lie within `height` rows, which are read in one stretch.
            stop = min(int(np.searchsorted(local, local[start] + height)), end)
            first, chosen = int(local[start]), local[start:stop]
            values = self._read(first, int(chosen[-1]) + 1)
            if len(values) > len(chosen):
                values = values[chosen - first]
            yield _Block(slice(start, stop), self._columns(values))
            start = stop
