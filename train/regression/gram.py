"""Inner products of the features of all stimuli, over all ranks, with more features than fit anywhere.

With n stimuli and p features, n << p, everything that regression on the features or on their principal components needs
is the n x n matrix of inner products (`kernel_regression.py`). Each rank has computed all features of its own
stimuli. The ranks exchange them so that each gets all stimuli of a slice of the features and multiplies those; the
products are summed: exact, whatever p.

What travels. Each rank sends what it has of the others' slices: n p (1 - 1/R) numbers of 4 bytes over all R ranks,
each feature at most once. No exchange of features can do with less: a product needs both of its rows in one place, and
the 1/R that a rank keeps is all that it can use where it is. (Sending whole stimuli round, so that each rank gets all
rows, costs R times as much.) The sum of the products, 8 n^2 bytes from each rank, is small beside it.

What is held. The features are read from disk in blocks of columns whose size follows from a bound on memory; beyond
that a rank holds its sum of products, 8 n^2 bytes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

from train.data.order import share
from train.distributed.runtime import Runtime
from train.regression.feature_store import FeatureStore

COLUMNS = 8192  # in one product; beyond that, sums are in float64
STRIPES, LEAST_STRIPE = 8, 256  # of a product: how many, and the fewest rows in each
COPIES = 4  # of a block that exist at one time: read, packed or sorted, received, and what the allocator keeps
Precision = Literal["float64", "float32", "tf32", "bf16"]
# Of sums of many products, relative to the largest eigenvalue of their matrix; see
# `train.regression.kernel_regression.Gram`.
ROUNDING: dict[Precision, float] = {"float64": 0.0, "float32": 2e-7, "tf32": 1e-5, "bf16": 1e-5}


def feature_slice(own: torch.Tensor, runtime: Runtime, rows: Sequence[int], unit: int = 1) -> torch.Tensor:
    """All stimuli of this rank's slice of the features, float32 (stimuli, about features / ranks), rank after rank.

    Args:
        own: float32 (own stimuli, features).
        runtime: this process.
        rows: stimuli of each rank.
        unit: how many features in a row stay together; there is a multiple of them.
    """
    ranks = runtime.ranks
    if ranks == 1:
        return own
    bounds = [rank * (own.shape[1] // unit) // ranks * unit for rank in range(ranks + 1)]
    width = bounds[runtime.rank + 1] - bounds[runtime.rank]
    sent = torch.cat([own[:, bounds[k] : bounds[k + 1]].flatten() for k in range(ranks)]).to(runtime.device)
    received = torch.empty(sum(rows) * width, device=runtime.device)
    dist.all_to_all_single(
        received,
        sent,
        output_split_sizes=[count * width for count in rows],
        input_split_sizes=[len(own) * (bounds[k + 1] - bounds[k]) for k in range(ranks)],
    )
    return received.view(sum(rows), width)


@dataclass(frozen=True)
class Activations:
    """The activations of all stimuli: those of each rank's share of them are on its disk.

    Attributes:
        stores: of this rank, one per split.
        counts: stimuli of each split, over all ranks.
        runtime: this process.
        memory: GiB that what is read at one time may take up, in this process.
        precision: of products; see `multiplied`.
    """

    stores: Sequence[FeatureStore]
    counts: Sequence[int]
    runtime: Runtime
    memory: float
    precision: Precision

    @property
    def stimuli(self) -> int:
        """How many, of all splits."""
        return sum(self.counts)

    @cached_property
    def _shares(self) -> list[list[np.ndarray]]:
        """Of each rank and split, the positions of its stimuli in the split."""
        ranks = self.runtime.ranks
        return [[share(np.arange(count), rank, ranks) for count in self.counts] for rank in range(ranks)]

    @cached_property
    def _place(self) -> torch.Tensor:
        """Where the stimuli, split after split, are among those of rank after rank."""
        offsets = np.cumsum([0, *self.counts])
        parts = [part + offset for parts in self._shares for part, offset in zip(parts, offsets, strict=False)]
        return torch.from_numpy(np.argsort(np.concatenate(parts))).to(self.runtime.device)

    def slices(self, layer: str, unit: int = 1) -> Iterator[torch.Tensor]:
        """This rank's slices of a layer's features, block after block: float32 (stimuli, features), split after split.

        They are centred on the mean of all stimuli; that is rounded, but who uses the products centres them again.

        Args:
            layer: whose features.
            unit: how many features in a row stay together; the layer has a multiple of them.
        """
        runtime, width = self.runtime, self.stores[0].width(layer)
        rows = [sum(map(len, parts)) for parts in self._shares]
        own_rows = [len(part) for part in self._shares[runtime.rank]]
        units = max(int(self.memory * 2**30 / (4 * COPIES * self.stimuli * unit)), 1)
        block = units * unit * runtime.ranks
        for start in range(0, width, block):
            own = torch.from_numpy(self._own_columns(layer, own_rows, start, min(start + block, width)))
            received = feature_slice(own.to(runtime.device), runtime, rows, unit)
            if runtime.ranks > 1:
                received = received[self._place]
            yield received.sub_(received.mean(0))

    def _own_columns(self, layer: str, rows: Sequence[int], start: int, stop: int) -> np.ndarray:
        own, first = np.empty((sum(rows), stop - start), np.float32), 0
        for store, count in zip(self.stores, rows, strict=True):
            store.read_columns(layer, start, stop, own[first : first + count])
            first += count
        return own


def inner_products(activations: Activations, layer: str, owner: int) -> np.ndarray | None:
    """Inner products of a layer's features, centred on the mean of all stimuli.

    Args:
        activations: of all stimuli.
        layer: whose features.
        owner: the rank that gets the result.

    Returns:
        float64 (n, n), the splits' stimuli one split after the other; None on the other ranks.
    """
    stimuli, runtime = activations.stimuli, activations.runtime
    total = torch.zeros(stimuli, stimuli, dtype=torch.float64, device=runtime.device)
    for received in activations.slices(layer):
        for columns in received.split(COLUMNS, dim=1):
            total += multiplied(columns, activations.precision)
    summed = runtime.reduce_to(total, owner)
    return None if summed is None else summed.cpu().numpy()


def multiplied(features: torch.Tensor, precision: Precision) -> torch.Tensor:
    """features @ features.T as float64.

    Args:
        features: float32 (n, columns).
        precision: float64; float32 (a relative error of about 1e-7 of the largest product); tf32, where the hardware
            has it (1e-3 in each factor); bf16 likewise (4e-3). Factors are rounded, sums are float32 or better.
    """
    if precision == "float64":
        return _symmetric_product(features.double())
    with float32_products(precision):
        return _symmetric_product(features)


def _symmetric_product(features: torch.Tensor) -> torch.Tensor:
    """The upper triangle in blocks of rows, and its mirror image: little more than half of the multiplications."""
    stimuli = len(features)
    product = torch.empty(stimuli, stimuli, dtype=torch.float64, device=features.device)
    height = max(-(-stimuli // STRIPES), LEAST_STRIPE)
    for start in range(0, stimuli, height):
        stripe = features[start : start + height] @ features[start:].T
        product[start : start + height, start:] = stripe
        product[start:, start : start + height] = stripe.T
    return product


@contextmanager
def float32_products(precision: Precision) -> Iterator[None]:
    """Products of float32 matrices by the hardware that rounds their factors to `precision`."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision({"float32": "highest", "tf32": "high", "bf16": "medium"}[precision])
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
