"""Eigenvalues and eigenvectors of symmetric matrices, on a GPU where there is one with room."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Eigen:
    """Of a symmetric matrix; `values` float64 (n,), ascending, and `vectors` float64 (n, n), in columns."""

    values: np.ndarray
    vectors: np.ndarray


Decomposition = Callable[[np.ndarray], Eigen]
"""float64 (n, n), symmetric -> its eigenvalues and eigenvectors."""


def eigh_on_cpu(matrix: np.ndarray) -> Eigen:
    """By LAPACK."""
    values, vectors = np.linalg.eigh(matrix)
    return Eigen(values, vectors)


def eigh_on(device: torch.device) -> Decomposition:
    """The decomposition to use in a process that computes on `device`."""
    return eigh_on_cpu if device.type == "cpu" else GpuDecomposition(device)


def _concerns_the_matrix(error: RuntimeError) -> bool:
    """Whether the GPU failed at this matrix; other errors, such as those of earlier kernels, are not ours to catch.

    cuSOLVER takes memory of its own, and reports in words of its own that there is none, or that a matrix is too large.
    """
    known = isinstance(error, torch.OutOfMemoryError | torch.linalg.LinAlgError)
    return known or "cusolver" in str(error).lower()


class GpuDecomposition:
    """Decomposes on a GPU, in float64; matrices as large as one that it could not decompose, on the CPU.

    Eigenvalues agree with the CPU's to rounding. So do eigenvectors, up to their sign, and a rotation of those that
    share an eigenvalue; neither changes a regression.

    Args:
        device: of torch.
    """

    def __init__(self, device: torch.device):
        self._device, self._largest = device, sys.maxsize

    def __call__(self, matrix: np.ndarray) -> Eigen:
        """See `Decomposition`."""
        if len(matrix) < self._largest:
            try:
                values, vectors = torch.linalg.eigh(torch.from_numpy(matrix).to(self._device))
                return Eigen(values.cpu().numpy(), vectors.cpu().numpy())
            except RuntimeError as error:
                if not _concerns_the_matrix(error):
                    raise
                self._largest = len(matrix)
                reason = "has no room for" if isinstance(error, torch.OutOfMemoryError) else "cannot decompose"
                print(
                    f"note: {self._device} {reason} a matrix of {len(matrix):,} x {len(matrix):,} numbers; matrices of "
                    "this size are decomposed on the CPU",
                    file=sys.stderr,
                    flush=True,
                )
        return eigh_on_cpu(matrix)
