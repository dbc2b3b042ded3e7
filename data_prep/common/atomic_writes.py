"""Atomic writes: a file appears complete or not at all."""

import contextlib
import ctypes
import errno
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common.errors import CannotWrite

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # by the file system (NFS, for one) or the kernel


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under a temporary name beside it, then rename it. Missing folders are created.

    Raises:
        CannotWrite: the disk is full, the folder read-only ...
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # left by a killed process that had the same id
        with temporary.open("xb") as file:  # "x" does not follow a link planted under that name
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise CannotWrite(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, as `write_bytes` does.

    Raises:
        CannotWrite: the disk is full, the folder read-only ...
        ValueError: a number is not finite; JSON has none of these.
    """
    write_bytes(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write named arrays as an .npz file without pickles, as `write_bytes` does.

    Raises:
        CannotWrite: the disk is full, the folder read-only ...
    """
    content, named = io.BytesIO(), dict[str, Any](arrays)
    np.savez(content, **named)
    write_bytes(path, content.getvalue())


def exchange(path: Path, other: Path) -> bool:
    """Exchange the names of two files or folders, atomically; False where the system cannot, and nothing has changed.

    Raises:
        OSError: one does not exist, the folder is read-only ...
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # Linux, glibc 2.28 or newer
    if rename is None:
        return False
    if rename(_HERE, os.fsencode(path), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(path), None, str(other))
