"""Writing files that are there whole or not at all."""

import contextlib
import io
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name beside it and rename it; its folder is made where it is missing.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # of a process that was killed and had our number
        with temporary.open("xb") as file:  # never through a link that a stranger has left there
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write named arrays as an .npz file, as `write_whole`.

    Raises:
        OSError: it cannot be written.
    """
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_whole(path, content.getvalue())
