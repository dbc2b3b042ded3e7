"""Memory for batches of images, used again as soon as nobody holds the batch any more."""

import math
import weakref
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

KEPT = 4  # batches: one in use, the next one, and those of an evaluation between them


class BatchBuffers:
    """Fresh memory costs a page fault for every 4 KiB, which takes longer than copying an image there."""

    def __init__(self):
        self._kept: list[tuple[np.ndarray, weakref.ref]] = []  # memory, and the view of it that was lent last

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": []}

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor of uint8 with undefined content, not shared with any other that is still alive.

        In a worker of a DataLoader it lies in shared memory, where torch would otherwise have to copy it.
        """
        if get_worker_info() is not None:
            storage = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's own collate function does
            return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)
        free = (array for array, lent in self._kept if array.shape == shape and lent() is None)
        array = next(free, None)
        if array is None:
            array = np.empty(shape, np.uint8)
        lent = array.view()  # it lives as long as the tensor that is made of it, and all views of that
        others = [entry for entry in self._kept if entry[0] is not array]
        self._kept = [*others[1 - KEPT :], (array, weakref.ref(lent))]
        return torch.from_numpy(lent)
