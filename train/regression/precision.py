"""Products of feature matrices at a chosen precision, with sums in float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from train.regression.reused_memory import ReusedMemory

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
ALIGNMENT = 16  # numbers; where the rows of a product begin at multiples of it, a CPU is up to half as fast again


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


def aligned(count: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-count // ALIGNMENT) * ALIGNMENT


def _multiply(
    rows: torch.Tensor, features: torch.Tensor, precision: ProductPrecision, out: torch.Tensor | None = None
) -> torch.Tensor:
    """rows @ features.T of matrices or stacks of them: float64 where these are, otherwise float32.

    `out` is memory that may be used for it.
    """
    multiply = torch.mm if rows.ndim == 2 else torch.bmm
    if precision == "bf16" and rows.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return multiply(rows.bfloat16(), features.bfloat16().mT, out_dtype=torch.float32)
    if out is None:
        out = rows.new_empty(*rows.shape[:-1], aligned(features.shape[-2]))[..., : features.shape[-2]]
    return multiply(rows, features.mT, out=out)


def product(rows: torch.Tensor, features: torch.Tensor, precision: ProductPrecision) -> torch.Tensor:
    """rows @ features.T of float32 matrices (..., n, columns), or of stacks of them."""
    if precision == "float64":
        return _multiply(rows.double(), features.double(), precision)
    with matmul_precision(precision):
        return _multiply(rows, features, precision)


class SymmetricSum:
    """The sum over blocks of features of features @ features.T, in float64, in the memory of one such matrix.

    Only its lower triangle is multiplied and added up, in stripes of columns, which is little more than half the work.
    Beside the sum there is the memory of a stripe or two, each an eighth of it, and for float64 that of a copy of the
    features.

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
        self._products = ReusedMemory(torch.float32, device)

    def add(self, features: torch.Tensor) -> None:
        """Add a block of features, float32 (n, columns); without the stimuli before the first column of the part."""
        if self._precision == "float64":
            features = features.double()
            for stripe in self._stripes():
                self._sum[stripe.start :, stripe].addmm_(features[stripe.start :], features[stripe].T)
            return
        with matmul_precision(self._precision):
            for stripe in self._stripes():
                rows, columns = features[stripe.start :], features[stripe]
                out = self._products.matrix(len(rows), aligned(len(columns)))[:, : len(columns)]
                self._sum[stripe.start :, stripe].add_(_multiply(rows, columns, self._precision, out))

    def _stripes(self) -> Iterator[slice]:
        for start in range(0, self._width, self._height):
            yield slice(start, min(start + self._height, self._width))

    def total(self) -> torch.Tensor:
        """The sum so far, float64 (n, n), or the part (rows from its first column on, columns); not a copy."""
        for stripe in self._stripes():
            self._sum[stripe, stripe.stop :] = self._sum[stripe.stop : self._width, stripe].T
        return self._sum


def stripe_height(columns: int) -> int:
    """Rows that a `SymmetricSum` of so many columns multiplies at a time."""
    return max(aligned(-(-columns // STRIPES)), MIN_STRIPE_ROWS)
