"""Memory for batches of images, reused as soon as nothing refers to the previous batch."""

import math
import weakref
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

KEPT = 4  # buffers: of the batch in use, the next one, and those of an evaluation in between


class BatchBuffers:
    """Reuses memory: fresh memory costs a page fault per 4 KiB, which takes longer than copying an image into it."""

    def __init__(self):
        self._buffers: list[tuple[np.ndarray, weakref.ref]] = []  # each with the view handed out last

    def __getstate__(self) -> dict[str, Any]:
        return {"_buffers": []}

    def allocate(self, shape: tuple[int, ...]) -> torch.Tensor:
        """A uint8 tensor with undefined content, which shares no memory with another tensor that is still alive.

        In a worker of a DataLoader it is in shared memory; otherwise torch would have to copy it there.
        """
        if get_worker_info() is not None:
            storage = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's own collate function does
            return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)
        unused = (buffer for buffer, view in self._buffers if buffer.shape == shape and view() is None)
        buffer = next(unused, None)
        if buffer is None:
            buffer = np.empty(shape, np.uint8)
        view = buffer.view()  # lives as long as the tensor made from it and all views of that
        others = [entry for entry in self._buffers if entry[0] is not buffer]
        self._buffers = [*others[1 - KEPT :], (buffer, weakref.ref(view))]
        return torch.from_numpy(view)
