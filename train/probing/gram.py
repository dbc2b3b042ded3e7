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
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

from train.data.order import share
from train.parallel.runtime import Runtime
from train.probing.feature_store import FeatureStore

COLUMNS = 8192  # in one product; beyond that, sums are in float64
STRIPES, LEAST_STRIPE = 8, 256  # of a product: how many, and the fewest rows in each
COPIES = 4  # of a block that exist at one time: read, packed, received, and what the allocator keeps
Precision = Literal["float64", "float32", "tf32", "bf16"]
# Of sums of many products, relative to the largest eigenvalue of their matrix; see
# `train.probing.kernel_regression.Gram`.
ROUNDING: dict[Precision, float] = {"float64": 0.0, "float32": 2e-7, "tf32": 1e-5, "bf16": 1e-5}


def feature_slice(own: torch.Tensor, runtime: Runtime, rows: Sequence[int]) -> torch.Tensor:
    """All stimuli of this rank's slice of the features, float32 (stimuli, about features / ranks), rank after rank.

    Args:
        own: float32 (own stimuli, features).
        runtime: this process.
        rows: stimuli of each rank.
    """
    ranks, features = runtime.ranks, own.shape[1]
    if ranks == 1:
        return own
    bounds = [rank * features // ranks for rank in range(ranks + 1)]
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


def inner_products(
    stores: Sequence[FeatureStore],
    layer: str,
    counts: Sequence[int],
    runtime: Runtime,
    *,
    memory: float,
    precision: Precision,
    owner: int,
    factors: np.ndarray | None = None,
) -> np.ndarray | None:
    """Inner products of a layer's features, centred on the mean of all stimuli.

    Args:
        stores: of this rank, one per split.
        layer: whose features.
        counts: stimuli of each split, over all ranks.
        runtime: this process.
        memory: GiB that the features may take up at one time, in this process.
        precision: of the products; see `multiplied`.
        owner: the rank that gets the result.
        factors: float32 (features,), by which features are multiplied before; None leaves them as they are.

    Returns:
        float64 (n, n), the splits' stimuli one split after the other; None on the other ranks.
    """
    ranks, stimuli, width = runtime.ranks, sum(counts), stores[0].width(layer)
    shares = [[share(np.arange(count), rank, ranks) for count in counts] for rank in range(ranks)]
    rows = [sum(map(len, parts)) for parts in shares]
    own_rows = [len(part) for part in shares[runtime.rank]]
    block = max(int(memory * 2**30 / (4 * COPIES * stimuli)), 1) * ranks
    total = torch.zeros(stimuli, stimuli, dtype=torch.float64, device=runtime.device)
    for start in range(0, width, block):
        own = _own_columns(stores, layer, own_rows, start, min(start + block, width))
        if factors is not None:
            own *= factors[start : start + block]
        received = feature_slice(torch.from_numpy(own).to(runtime.device), runtime, rows)
        received -= received.mean(0)  # its rounding does not matter: who uses the products centres them
        for first in range(0, received.shape[1], COLUMNS):
            total += multiplied(received[:, first : first + COLUMNS], precision)
    summed = runtime.sum_to(total, owner)
    if summed is None:
        return None
    # Rank after rank -> split after split.
    offsets = np.cumsum([0, *counts])
    held = np.concatenate([part + offset for parts in shares for part, offset in zip(parts, offsets, strict=False)])
    place = np.argsort(held)
    return summed.cpu().numpy()[np.ix_(place, place)]


def _own_columns(stores: Sequence[FeatureStore], layer: str, rows: Sequence[int], start: int, stop: int) -> np.ndarray:
    own, first = np.empty((sum(rows), stop - start), np.float32), 0
    for store, count in zip(stores, rows, strict=True):
        store.read_columns(layer, start, stop, own[first : first + count])
        first += count
    return own


def multiplied(features: torch.Tensor, precision: Precision) -> torch.Tensor:
    """features @ features.T as float64.

    Args:
        features: float32 (n, columns).
        precision: float64; float32 (a relative error of about 1e-7 of the largest product); tf32, where the hardware
            has it (1e-3 in each factor); bf16 likewise (4e-3). Factors are rounded, sums are float32 or better.
    """
    if precision == "float64":
        return _symmetric_product(features.double())
    with _float32_products(precision):
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
def _float32_products(precision: Precision) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision({"float32": "highest", "tf32": "high", "bf16": "medium"}[precision])
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
