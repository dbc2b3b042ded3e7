"""Products of feature matrices at a chosen precision, with sums in float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

ProductPrecision = Literal["float64", "float32", "tf32", "bf16"]
"""float64; float32 (relative error about 1e-7 of the largest product); tf32 where the hardware has it (1e-3 in each
factor); bf16 likewise (4e-3). Factors are rounded, sums are float32 or better."""

# Error of sums of many products, relative to the largest eigenvalue of their matrix; see `train.regression.gram`.
ROUNDING: dict[ProductPrecision, float] = {"float64": 0.0, "float32": 2e-7, "tf32": 1e-5, "bf16": 1e-5}
MATMUL_SETTINGS = {"float32": "highest", "tf32": "high", "bf16": "medium"}

COLUMNS_PER_PRODUCT = 8192  # sums over more columns than these are in float64
STRIPES = 8  # of rows that a symmetric product is computed in
MIN_STRIPE_ROWS = 256


@contextmanager
def matmul_precision(precision: ProductPrecision) -> Iterator[None]:
    """Let the hardware round the factors of float32 matrix products to `precision`; float64 cannot be asked for."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(MATMUL_SETTINGS[precision])
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def product(rows: torch.Tensor, features: torch.Tensor, precision: ProductPrecision) -> torch.Tensor:
    """rows @ features.T of float32 matrices (..., n, columns), or of stacks of them."""
    if precision == "float64":
        return rows.double() @ features.double().mT
    with matmul_precision(precision):
        return rows @ features.mT


def symmetric_product(features: torch.Tensor, precision: ProductPrecision) -> torch.Tensor:
    """features @ features.T of a float32 matrix (n, columns), as float64 (n, n)."""
    if precision == "float64":
        return _from_upper_stripes(features.double())
    with matmul_precision(precision):
        return _from_upper_stripes(features)


def _from_upper_stripes(features: torch.Tensor) -> torch.Tensor:
    """Multiply only the upper triangle, in stripes of rows, and mirror it: little more than half the work."""
    stimuli = len(features)
    total = torch.empty(stimuli, stimuli, dtype=torch.float64, device=features.device)
    height = max(-(-stimuli // STRIPES), MIN_STRIPE_ROWS)
    for start in range(0, stimuli, height):
        stripe = features[start : start + height] @ features[start:].T
        total[start : start + height, start:] = stripe
        total[start:, start : start + height] = stripe.T
    return total
