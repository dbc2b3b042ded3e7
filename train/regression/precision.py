"""Products of feature matrices at a chosen precision, with sums in float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

ProductPrecision = Literal["float64", "float32", "tf32", "bf16"]
"""float64; float32 (relative error about 1e-7 of the largest product); tf32 where the hardware has it (1e-3 in each
factor); bf16 likewise (4e-3). Factors are rounded, sums are float32 or better. Without the hardware, factors are
rounded less."""

# Error of sums of many products, relative to the largest eigenvalue of their matrix; see `train.regression.gram`.
ROUNDING: dict[ProductPrecision, float] = {"float64": 0.0, "float32": 2e-7, "tf32": 2e-5, "bf16": 2e-4}
MATMUL_SETTINGS = {"float32": "highest", "tf32": "high", "bf16": "medium"}

COLUMNS_PER_PRODUCT = 8192  # sums over more columns than these are in float64
STRIPES = 8  # of rows that a symmetric product is computed in
MIN_STRIPE_ROWS = 256


@contextmanager
def matmul_precision(precision: ProductPrecision) -> Iterator[None]:
    """Let the hardware round the factors of float32 matrix products to `precision`; float64 cannot be asked for.

    On a GPU torch takes bf16 for tf32; `_multiply` rounds the factors there.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(MATMUL_SETTINGS[precision])
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _multiply(rows: torch.Tensor, features: torch.Tensor, precision: ProductPrecision) -> torch.Tensor:
    """rows @ features.T of matrices or stacks of them: float64 where these are, otherwise float32."""
    if precision != "bf16" or rows.device.type != "cuda" or not torch.cuda.is_bf16_supported(including_emulation=False):
        return rows @ features.mT
    multiply = torch.mm if rows.ndim == 2 else torch.bmm
    return multiply(rows.bfloat16(), features.bfloat16().mT, out_dtype=torch.float32)


def product(rows: torch.Tensor, features: torch.Tensor, precision: ProductPrecision) -> torch.Tensor:
    """rows @ features.T of float32 matrices (..., n, columns), or of stacks of them."""
    if precision == "float64":
        return rows.double() @ features.double().mT
    with matmul_precision(precision):
        return _multiply(rows, features, precision)


class SymmetricSum:
    """The sum over blocks of features of features @ features.T, in float64, in the memory of one such matrix.

    Only its lower triangle is multiplied and added up, in stripes of columns, which is little more than half the work.
    Beside the sum, `add` takes the memory of a stripe or two, each an eighth of it, and for float64 that of a copy of
    the features.

    A part of the matrix can be summed alone: some of its columns, from the diagonal downwards. All such parts together
    are the lower triangle.

    Args:
        stimuli: n, the rows of the matrix.
        precision: of the products.
        device: of the features.
        columns: of the matrix that are summed; all where None.
    """

    def __init__(self, stimuli: int, precision: ProductPrecision, device: torch.device, columns: range | None = None):
        columns = range(stimuli) if columns is None else columns
        self._width = len(columns)
        self._sum = torch.zeros(stimuli - columns.start, self._width, dtype=torch.float64, device=device)
        self._precision: ProductPrecision = precision
        self._height = stripe_height(self._width)

    def add(self, features: torch.Tensor) -> None:
        """Add a block of features, float32 (n, columns); without the stimuli before the first column of the part."""
        if self._precision == "float64":
            self._add_stripes(features.double())
            return
        with matmul_precision(self._precision):
            self._add_stripes(features)

    def _add_stripes(self, features: torch.Tensor) -> None:
        for start in range(0, self._width, self._height):
            stop = min(start + self._height, self._width)
            # Added to a column of blocks as the transpose of a row of blocks, which multiplies faster.
            stripe = _multiply(features[start:stop], features[start:], self._precision)
            self._sum[start:, start:stop].add_(stripe.T)

    def total(self) -> torch.Tensor:
        """The sum so far, float64 (n, n), or the part (rows from its first column on, columns); not a copy."""
        for start in range(0, self._width, self._height):
            stop = min(start + self._height, self._width)
            self._sum[start:stop, stop:] = self._sum[stop : self._width, start:stop].T
        return self._sum


def stripe_height(columns: int) -> int:
    """Rows that a `SymmetricSum` of so many columns multiplies at a time."""
    return max(-(-columns // STRIPES), MIN_STRIPE_ROWS)
