"""Exchanges features between ranks: each rank gets a slice of the features of all stimuli.

Each rank has computed all features of its share of the stimuli. A product of two stimuli's features needs both rows in
one place, so the ranks exchange slices of the features.

Traffic: with n stimuli, p features and R ranks, n p (1 - 1/R) numbers of 4 bytes over all ranks, each feature at most
once. No exchange of features needs less: a rank can keep only 1/R of its own. (Sending whole stimuli around, so that
each rank gets all rows, costs R times as much.)

Memory: the features are read from disk in blocks of columns, whose size follows from a bound on memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from train.data.order import share
from train.distributed.runtime import Runtime
from train.regression.feature_store import FLOAT32_BYTES, FeatureStore
from train.regression.precision import ProductPrecision

COPIES_OF_BLOCK = 4  # in memory at a time: read, packed or sorted, received, and held by the allocator


def exchange_features(features: torch.Tensor, runtime: Runtime, rows: Sequence[int], unit: int = 1) -> torch.Tensor:
    """Give this rank's stimuli to the other ranks, and get its slice of the features of all stimuli.

    Args:
        features: float32 (stimuli of this rank, features), on any device.
        runtime: this process.
        rows: number of stimuli of each rank.
        unit: features that stay together; their number is a multiple of it.

    Returns:
        float32 (all stimuli, about features / ranks), the stimuli rank after rank; where the process computes.
    """
    ranks = runtime.ranks
    if ranks == 1:
        return features.to(runtime.device)
    bounds = [rank * (features.shape[1] // unit) // ranks * unit for rank in range(ranks + 1)]
    width = bounds[runtime.rank + 1] - bounds[runtime.rank]
    parts = [features[:, bounds[k] : bounds[k + 1]].flatten().to(runtime.device) for k in range(ranks)]
    return runtime.all_to_all(parts, [count * width for count in rows]).view(sum(rows), width)


@dataclass(frozen=True)
class StoredActivations:
    """The activations of all stimuli, each rank's share of them on its own disk.

    Attributes:
        stores: of this rank, one per split.
        counts: stimuli of each split, over all ranks.
        runtime: this process.
        memory: maximum GiB that this process reads at a time.
        precision: of products of the features.
    """

    stores: Sequence[FeatureStore]
    counts: Sequence[int]
    runtime: Runtime
    memory: float
    precision: ProductPrecision

    @property
    def stimuli(self) -> int:
        """Number of stimuli of all splits."""
        return sum(self.counts)

    @property
    def memory_bytes(self) -> float:
        """`memory` in bytes."""
        return self.memory * 2**30

    @cached_property
    def _shares(self) -> list[list[np.ndarray]]:
        """For each rank and split, the positions of its stimuli in the split."""
        ranks = self.runtime.ranks
        return [[share(np.arange(count), rank, ranks) for count in self.counts] for rank in range(ranks)]

    @cached_property
    def _split_order(self) -> torch.Tensor:
        """Permutation from the stimuli of rank after rank to those of split after split."""
        offsets = np.cumsum([0, *self.counts[:-1]])
        positions = [
            positions + offset for shares in self._shares for positions, offset in zip(shares, offsets, strict=True)
        ]
        return torch.from_numpy(np.argsort(np.concatenate(positions))).to(self.runtime.device)

    def slices(self, layer: str, unit: int = 1) -> Iterator[torch.Tensor]:
        """This rank's slices of a layer's features, block after block.

        Args:
            layer: whose features.
            unit: features that stay together; the layer has a multiple of them.

        Yields:
            float32 (stimuli, features of the slice), split after split, centred on the mean of all stimuli. That mean
            is rounded, but users of the products centre them again.
        """
        runtime, width = self.runtime, self.stores[0].width(layer)
        rows = [sum(len(positions) for positions in shares) for shares in self._shares]
        rows_of_splits = [len(positions) for positions in self._shares[runtime.rank]]
        units = max(int(self.memory_bytes / (FLOAT32_BYTES * COPIES_OF_BLOCK * self.stimuli * unit)), 1)
        block = units * unit * runtime.ranks
        for start in range(0, width, block):
            columns = self._read_columns(layer, rows_of_splits, start, min(start + block, width))
            received = exchange_features(torch.from_numpy(columns).to(runtime.device), runtime, rows, unit)
            if runtime.ranks > 1:
                received = received[self._split_order]
            yield received.sub_(received.mean(0))

    def _read_columns(self, layer: str, rows: Sequence[int], start: int, stop: int) -> np.ndarray:
        columns, first = np.empty((sum(rows), stop - start), np.float32), 0
        for store, count in zip(self.stores, rows, strict=True):
            store.read_columns(layer, start, stop, columns[first : first + count])
            first += count
        return columns
