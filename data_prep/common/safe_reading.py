"""Reading untrusted plain data: regular files only, no code runs, and no file can claim absurd amounts of memory.

The functions raise `ValueError` for anything else; their callers name the file.
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

LARGEST_TEXT = 256 * 2**20  # bytes; a manifest of a million stimuli takes a tenth of it
LARGEST_COMPRESSION = 1000  # the largest compression factor of honest data
ALWAYS_ALLOWED = 64 * 2**20  # bytes that a file of any size may claim
LONGEST_NAME = 1000  # characters, of ids, classes and the like

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_regular_file(path: Path, largest: int = LARGEST_TEXT) -> bytes:
    """The content of a file.

    Raises:
        ValueError: a pipe, a device or a folder, or more than `largest` bytes.
        OSError: it cannot be read.
    """
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # does not wait for the writer of a pipe
    with os.fdopen(file, "rb") as opened:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        if status.st_size > largest:
            raise ValueError(f"it has {status.st_size:,} bytes, more than the {largest:,} that such a file may have")
        return opened.read(largest)


def parse_json(content: bytes) -> Any:
    """The content of a JSON text.

    Raises:
        ValueError: it is not JSON, holds a number that is not finite, or is nested too deeply.
    """
    try:
        return json.loads(content, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


def parse_npy(data: bytes | memoryview) -> np.ndarray:
    """The array in the bytes of a .npy file; the size that its header claims is checked first.

    Raises:
        ValueError: not a .npy file, one that is too short or too long, or one with Python objects.
    """
    view = memoryview(data).cast("B")
    start = io.BytesIO(view[: 2**16])  # a header is much shorter
    try:
        shape, is_fortran, dtype = _HEADERS[np.lib.format.read_magic(start)](start)
    except Exception as error:  # numpy's parser raises many kinds
        raise ValueError(f"its header is damaged: {' '.join(str(error).split())[:200]}") from None
    if dtype.hasobject:
        raise ValueError("it contains Python objects, and loading them could run code")
    if any(length < 0 for length in shape) or dtype.itemsize == 0:
        raise ValueError(f"it claims the shape {shape} of {dtype}")
    claimed, actual = math.prod(shape) * dtype.itemsize, len(view) - start.tell()
    if claimed != actual:
        raise ValueError(f"it claims {claimed:,} bytes of numbers and has {actual:,}")
    flat = np.frombuffer(view, dtype, offset=start.tell()) if actual else np.empty(0, dtype)
    return flat.reshape(shape, order="F" if is_fortran else "C").copy()


def read_npz(file: BinaryIO | Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file as `np.savez` writes it: not compressed, so they cannot claim more than the file has.

    Raises:
        ValueError: not an .npz file, a damaged one, or one whose members are compressed or overlap.
        OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            _check_sizes(archive, members)
            return {member.filename.removesuffix(".npy"): parse_npy(archive.read(member)) for member in members}
    except (OSError, ValueError):
        raise
    except Exception as error:  # zipfile raises many kinds
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _check_sizes(archive: zipfile.ZipFile, members: list[zipfile.ZipInfo]) -> None:
    assert archive.fp is not None, "it is open"
    size = archive.fp.seek(0, io.SEEK_END)
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{member.filename} is compressed; Spiketune writes uncompressed files only")
    claimed = sum(member.file_size for member in members)
    if claimed > size:
        raise ValueError(f"its members claim {claimed:,} bytes, and it has {size:,}")
    if len({member.filename for member in members}) < len(members):
        raise ValueError("two members have the same name")


def check_claim(claimed: int, actual: int) -> None:
    """Refuse compressed data that claims to be far larger than its file, as no recording is.

    Args:
        claimed: bytes when unpacked.
        actual: bytes of the file.

    Raises:
        ValueError: the claim is absurd.
    """
    if claimed > max(ALWAYS_ALLOWED, LARGEST_COMPRESSION * actual):
        raise ValueError(f"it claims {claimed:,} bytes in a file of {actual:,}")


def is_name(text: str) -> bool:
    """Whether a text from a file can serve as a name: one printable line of at most LONGEST_NAME characters."""
    if not 0 < len(text) <= LONGEST_NAME:
        return False
    return text.isprintable() or all(c.isprintable() or unicodedata.category(c) == "Zs" for c in text)  # Zs: spaces
