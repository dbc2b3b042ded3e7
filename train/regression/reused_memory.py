"""Memory that is used again: to get fresh memory for every block takes as long as to fill or to multiply it."""

import torch


class ReusedMemory:
    """Memory for one matrix after the other, as large as the largest so far.

    Args:
        dtype: of the matrices.
        device: where they lie.
        pinned: whether the memory is page-locked, on the host.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, pinned: bool = False):
        self._pinned = pinned
        self._memory = torch.empty(0, dtype=dtype, device=device)

    def matrix(self, rows: int, columns: int) -> torch.Tensor:
        """Uninitialised, (rows, columns); valid until the next is asked for."""
        size = rows * columns
        if len(self._memory) < size:
            self._memory = torch.empty(
                size, dtype=self._memory.dtype, device=self._memory.device, pin_memory=self._pinned
            )
        return self._memory[:size].view(rows, columns)
