"""Plain data that strangers wrote: regular files only, nothing executed, and no more memory than their bytes are worth.

Everything here raises `ValueError` for what is no such data; whoever calls knows the file, and says so.
"""

import io
import json
import math
import os
import stat
import unicodedata
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

LARGEST_TEXT = 256 * 2**20  # bytes: manifests of a million stimuli take a tenth of it
MOST_SQUEEZED = 1000  # times that compression makes data smaller at best; what claims more than that is no recording
ALWAYS_FINE = 64 * 2**20  # bytes that may be claimed by a file of any size
LONGEST_NAME = 1000  # characters, of ids, classes and the like

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_regular(path: Path, largest: int = LARGEST_TEXT) -> bytes:
    """The content of a file.

    Raises:
        ValueError: a pipe, a device or a folder, or more than `largest` bytes.
        OSError: it cannot be read.
    """
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would be waited for
    with os.fdopen(file, "rb") as opened:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file")
        if status.st_size > largest:
            raise ValueError(f"it has {status.st_size:,} bytes, more than the {largest:,} that such a file may have")
        return opened.read(largest)


def parse_json(content: bytes) -> Any:
    """What JSON says.

    Raises:
        ValueError: it is not JSON, holds a number that is not finite, or is nested too deeply.
    """
    try:
        return json.loads(content, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no number that JSON has")
    return number


def npy_array(data: bytes | memoryview) -> np.ndarray:
    """The array in the bytes of a .npy file; what its header claims is compared with what is there first.

    Raises:
        ValueError: no such file, one that is cut short or goes on, or one that holds objects.
    """
    view = memoryview(data).cast("B")
    start = io.BytesIO(view[: 2**16])  # a header is much shorter
    try:
        shape, is_fortran, dtype = _HEADERS[np.lib.format.read_magic(start)](start)
    except Exception as error:  # numpy's parser raises many kinds
        raise ValueError(f"its header is damaged: {' '.join(str(error).split())[:200]}") from None
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which only running code could make")
    if any(length < 0 for length in shape) or dtype.itemsize == 0:
        raise ValueError(f"it claims the shape {shape} of {dtype}")
    claimed, there = math.prod(shape) * dtype.itemsize, len(view) - start.tell()
    if claimed != there:
        raise ValueError(f"it claims {claimed:,} bytes of numbers and has {there:,}")
    flat = np.frombuffer(view, dtype, offset=start.tell()) if there else np.empty(0, dtype)
    return flat.reshape(shape, order="F" if is_fortran else "C").copy()


def npz_arrays(file: BinaryIO | Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file as `np.savez` writes them: not compressed, so that they claim no more than is there.

    Raises:
        ValueError: no such file, a damaged one, or one whose members are compressed or lie over each other.
        OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            _check_sizes(archive, members)
            return {member.filename.removesuffix(".npy"): npy_array(archive.read(member)) for member in members}
    except (OSError, ValueError):
        raise
    except Exception as error:  # zipfile raises many kinds
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _check_sizes(archive: zipfile.ZipFile, members: list[zipfile.ZipInfo]) -> None:
    archive.fp.seek(0, io.SEEK_END)
    there = archive.fp.tell()
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{member.filename} is compressed, which no file of this project is")
    if (claimed := sum(member.file_size for member in members)) > there:
        raise ValueError(f"its members claim {claimed:,} bytes, and it has {there:,}")
    if len({member.filename for member in members}) < len(members):
        raise ValueError("two members have one name")


def check_claim(claimed: int, there: int) -> None:
    """Refuse compressed data that claims to be far larger than its file, which no recording is.

    Args:
        claimed: bytes when unpacked.
        there: bytes of the file.

    Raises:
        ValueError: it does.
    """
    if claimed > max(ALWAYS_FINE, MOST_SQUEEZED * there):
        raise ValueError(f"it claims {claimed:,} bytes in a file of {there:,}")


def is_name(text: str) -> bool:
    """Whether a text from a file may be shown and compared as a name: one printable line, and not endless."""
    shown = (c.isprintable() or unicodedata.category(c) == "Zs" for c in text)  # spaces of all kinds
    return 0 < len(text) <= LONGEST_NAME and (text.isprintable() or all(shown))
