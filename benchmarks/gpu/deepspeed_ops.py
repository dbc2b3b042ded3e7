"""Whether DeepSpeed can run here: it may be missing, or unable to build an operation that it needs."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

from gpu.results import Skipped

# In errors of DeepSpeed when it cannot build an operation: no nvcc, another CUDA than torch's, no ninja, no compiler.
NOT_BUILT = ("JIT load", "CUDA_HOME", "nvcc", "MissingCUDA", "CUDAMismatch", "ninja", "Error building extension")


@contextmanager
def deepspeed_for(strategy: str) -> Iterator[None]:
    """Around a run under a strategy.

    Raises:
        Skipped: DeepSpeed is missing, or its operations cannot be built here.
    """
    if strategy == "ddp":
        yield
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise Skipped("deepspeed is not installed")
    try:
        yield
    except Exception as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        if any(sign in words for sign in NOT_BUILT):
            raise Skipped(f"DeepSpeed's operations cannot be built here ({words[:300]})") from None
        raise
