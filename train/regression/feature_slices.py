"""Slices of the features of all stimuli: each rank gets its own.

Each rank has computed all features of its share of the stimuli. A product of two stimuli's features needs both rows in
one place, so each rank needs a slice of the features of all stimuli. Where the ranks' activations lie on one machine, a
rank reads its slice from the files of all ranks. Otherwise the ranks exchange slices.

Traffic: with n stimuli, p features and R ranks, n p (1 - 1/R) numbers of 4 bytes over all ranks, each feature at most
once. No exchange of features needs less: a rank can keep only 1/R of its own. (Sending whole stimuli around, so that
each rank gets all rows, costs R times as much.)

Memory: the features are read from disk in blocks of columns, whose size follows from a bound on memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from train.distributed.runtime import Runtime
from train.regression.feature_store import FLOAT32_BYTES, FeatureStore
from train.regression.host_copies import Uploads
from train.regression.precision import ProductPrecision

# Of a block in memory at a time: read, packed or sorted, received, and held by the allocator. Where this process alone
# reads it, on a CPU: read, and what is made of it.
COPIES_OF_BLOCK, COPIES_IF_READ = 4, 2


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
    bounds = slice_bounds(features.shape[1], ranks, unit)
    width = bounds[runtime.rank + 1] - bounds[runtime.rank]
    parts = [features[:, bounds[k] : bounds[k + 1]].flatten().to(runtime.device) for k in range(ranks)]
    return runtime.all_to_all(parts, [count * width for count in rows]).view(sum(rows), width)


def slice_bounds(features: int, ranks: int, unit: int = 1) -> list[int]:
    """Where each rank's slice of the features begins, and where the last one ends; `unit` features stay together."""
    return [rank * (features // unit) // ranks * unit for rank in range(ranks + 1)]


@dataclass(frozen=True)
class RowRange:
    """Rows of one rank and one split that are read.

    Attributes:
        rank, split: whose.
        first: the first of them among the rank's rows of the split.
        count: their number.
        position: of the first of them among all rows that are read.
    """

    rank: int
    split: int
    first: int
    count: int
    position: int


@dataclass(frozen=True)
class StoredActivations:
    """The activations of all stimuli, each rank's share of them on its own disk.

    Attributes:
        stores: by rank, one per split; of the other ranks only where this process can read them.
        counts: stimuli of each split, over all ranks.
        runtime: this process.
        memory: maximum GiB that this process holds.
        precision: of products of the features.
    """

    stores: Sequence[Sequence[FeatureStore] | None]
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

    def width(self, layer: str) -> int:
        """Number of features of a layer."""
        return self.own_stores[0].width(layer)

    @property
    def own_stores(self) -> Sequence[FeatureStore]:
        """Those of this rank, one per split."""
        stores = self.stores[self.runtime.rank]
        assert stores is not None
        return stores

    def row_ranges(self, first: int = 0) -> list[RowRange]:
        """Where the stimuli from the `first` on lie, split after split."""
        ranges, start, ranks = [], 0, self.runtime.ranks
        for split, count in enumerate(self.counts):
            for rank in range(ranks):
                begin, end = start + rank * count // ranks, start + (rank + 1) * count // ranks
                skipped = min(max(first - begin, 0), end - begin)
                ranges.append(RowRange(rank, split, skipped, end - begin - skipped, max(begin - first, 0)))
            start += count
        return ranges

    def slices(
        self,
        layer: str,
        unit: int = 1,
        *,
        block_bytes: float | None = None,
        first: int = 0,
        centres: dict[int, torch.Tensor] | None = None,
    ) -> Iterator[torch.Tensor]:
        """This rank's slices of a layer's features, block after block.

        Args:
            layer: whose features.
            unit: features that stay together; the layer has a multiple of them.
            block_bytes: bound on the memory of a block; all of `memory` where None.
            first: stimulus to begin with; those before it are not read.
            centres: means of the features to subtract, by block. If it is empty, it is filled with those of all
                stimuli, for later calls with the same `unit` and `block_bytes`.

        Yields:
            float32 (stimuli, features of the slice), split after split, centred on the mean of all stimuli. That mean
            is rounded, but users of the products centre them again. Valid until the next is asked for.
        """
        ranks, width = self.runtime.ranks, self.width(layer)
        bound = self.memory_bytes if block_bytes is None else block_bytes
        is_read = None not in self.stores and self.runtime.device.type == "cpu"
        copies = COPIES_IF_READ if is_read else COPIES_OF_BLOCK
        units = max(int(bound / (FLOAT32_BYTES * copies * self.stimuli * unit)), 1)
        block = units * unit * ranks
        uploads = Uploads(self.runtime.device)
        for start in range(0, width, block):
            stop = min(start + block, width)
            if None in self.stores:
                features = self._exchanged(layer, start, stop, unit, first, uploads)
            else:
                features = self._read(layer, start, stop, unit, first, uploads)
            if centres is None or start not in centres:
                centre = features.mean(0)
                if centres is not None:
                    centres[start] = centre
            else:
                centre = centres[start]
            yield features.sub_(centre)

    def _read(self, layer: str, start: int, stop: int, unit: int, first: int, uploads: Uploads) -> torch.Tensor:
        """This rank's slice of features `start` to `stop`, from the files of all ranks."""
        bounds = slice_bounds(stop - start, self.runtime.ranks, unit)
        begin, end = bounds[self.runtime.rank], bounds[self.runtime.rank + 1]
        rows = uploads.buffer(self.stimuli - first, end - begin)
        for part in self.row_ranges(first):
            stores = self.stores[part.rank]
            assert stores is not None
            of_part = rows[part.position : part.position + part.count]
            stores[part.split].read_columns(layer, start + begin, of_part, part.first)
        return uploads.upload()

    def _exchanged(self, layer: str, start: int, stop: int, unit: int, first: int, uploads: Uploads) -> torch.Tensor:
        """This rank's slice of features `start` to `stop`; the ranks send each other theirs."""
        ranges = self.row_ranges(first)
        counts = [sum(part.count for part in ranges if part.rank == rank) for rank in range(self.runtime.ranks)]
        rows, done = uploads.buffer(counts[self.runtime.rank], stop - start), 0
        for part in ranges:
            if part.rank == self.runtime.rank:
                self.own_stores[part.split].read_columns(layer, start, rows[done : done + part.count], part.first)
                done += part.count
        received = exchange_features(uploads.upload(), self.runtime, counts, unit)
        in_order = torch.empty_like(received)
        begin = 0
        for part in sorted(ranges, key=lambda part: part.rank):  # as the ranks sent them
            in_order[part.position : part.position + part.count] = received[begin : begin + part.count]
            begin += part.count
        return in_order
