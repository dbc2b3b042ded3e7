"""Arrays that worker processes read without having a copy each."""

import mmap
import os
import weakref
from multiprocessing import context, reduction
from typing import Protocol

import numpy as np


class _Descriptor(Protocol):
    """A file descriptor on its way to another process (`multiprocessing.reduction.DupFd`)."""

    def detach(self) -> int:
        """The descriptor in the process that it came to."""


class SharedArray:
    """An array on its way to processes that are being started: unpickled there, it is the array itself, read-only.

    The responses of a large recording are a hundred megabytes, which every worker of every rank would hold otherwise.
    Like decoded images they lie in a file without a name, which the kernel frees with its last process: /dev/shm may
    have as little as 64 MiB.

    Args:
        array: to share; it is copied once.
    """

    def __init__(self, array: np.ndarray):
        self._array = array
        self._descriptor: int | None = None

    def __reduce__(self) -> tuple[object, ...]:
        if context.get_spawning_popen() is None or not hasattr(os, "memfd_create") or not self._array.nbytes:
            return np.array, (self._array,)
        if self._descriptor is None:
            self._descriptor = _file_of(self._array)
            weakref.finalize(self, os.close, self._descriptor)
        return _mapped, (reduction.DupFd(self._descriptor), self._array.dtype, self._array.shape)


def _file_of(array: np.ndarray) -> int:
    descriptor = os.memfd_create("spiketune-responses")
    os.ftruncate(descriptor, array.nbytes)
    np.frombuffer(mmap.mmap(descriptor, array.nbytes), array.dtype).reshape(array.shape)[...] = array
    return descriptor


def _mapped(descriptor: _Descriptor, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    file = descriptor.detach()
    try:
        return np.frombuffer(mmap.mmap(file, 0, prot=mmap.PROT_READ), dtype).reshape(shape)
    finally:
        os.close(file)
