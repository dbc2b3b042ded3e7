"""Reading untrusted plain data: regular files only, no code runs, and no file can claim absurd amounts of memory.

The functions raise `ValueError` for anything else; their callers name the file.
"""

import csv
import functools
import io
import json
import math
import os
import stat
import unicodedata
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

LARGEST_TEXT = 256 * 2**20  # bytes; a manifest of a million stimuli takes a tenth of it
LARGEST_COMPRESSION = 1000  # the largest compression factor of honest data
ALWAYS_ALLOWED = 64 * 2**20  # bytes that a file of any size may claim
LONGEST_NAME = 1000  # characters, of ids, classes and the like
LONGEST_INTEGER = 20  # characters; 2^63 has 19 digits
LARGEST_INTEGER = 2**64
LARGEST_NPY_HEADER = 2**16  # bytes
MOST_CELLS = 50_000_000  # of a table as text

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def open_regular_file(path: Path, largest: int = LARGEST_TEXT) -> BinaryIO:
    """Open a file for reading, unless waiting for it or reading it could take for ever.

    Raises:
        ValueError: a pipe, a device or a folder, or more than `largest` bytes.
        OSError: it cannot be read.
    """
    # O_NONBLOCK does not wait for the writer of a pipe.
    opened = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    try:
        status = os.fstat(opened.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        if status.st_size > largest:
            raise ValueError(f"it has {status.st_size:,} bytes, more than the {largest:,} that such a file may have")
    except BaseException:
        opened.close()
        raise
    return opened


def read_regular_file(path: Path, largest: int = LARGEST_TEXT) -> bytes:
    """The content of a file; raises as `open_regular_file`."""
    with open_regular_file(path, largest) as opened:
        return opened.read(largest)


# ---- JSON and CSV --------------------------------------------------------------------------------------------------


def parse_json(content: bytes | str) -> Any:
    """The content of a JSON text.

    Raises:
        ValueError: it is not JSON, holds a number that is not finite or has too many digits, or is nested too deeply.
    """
    try:
        return json.loads(content, parse_constant=_finite, parse_float=_finite, parse_int=_integer)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_json_lines(content: bytes) -> Iterator[tuple[str, Any]]:
    """Yield (line, its content) of every complete line of JSON lines; a process may be writing the last one.

    Bytes that are not UTF-8 become replacement characters.

    Raises:
        ValueError: as `parse_json`, naming the line.
    """
    for number, line in enumerate(content.decode("utf-8", errors="replace").split("\n")[:-1], start=1):
        if not line.strip():
            continue
        try:
            yield line, parse_json(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:LONGEST_INTEGER]} is not a finite number")
    return number


def _integer(text: str) -> int:
    if len(text) > LONGEST_INTEGER or abs(int(text)) > LARGEST_INTEGER:
        raise ValueError(f"a number of {len(text)} digits is too large")
    return int(text)


def csv_lines(path: Path, largest: int = LARGEST_TEXT) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, cells) of every row of a CSV file in UTF-8 that is not blank.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
        ValueError: not a regular file, too large, or not CSV, e.g. with a quote that does not end.
        OSError: it cannot be read.
    """
    with io.TextIOWrapper(open_regular_file(path, largest), encoding="utf-8-sig", newline="") as file:
        reader, cells = csv.reader(file, strict=True), 0
        try:
            for row in reader:
                cells += len(row)
                if cells > MOST_CELLS:
                    raise ValueError(f"it has more than {MOST_CELLS:,} cells")
                if row:
                    yield reader.line_num, row
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error}") from None


# ---- npy and npz ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NpyHeader:
    """What the header of a .npy file says; the numbers begin after `offset` bytes."""

    shape: tuple[int, ...]
    order: Literal["C", "F"]
    dtype: np.dtype
    offset: int


def read_npy_header(start: bytes | memoryview, size: int) -> NpyHeader:
    """Read and check the header of a .npy file.

    Args:
        start: the first `LARGEST_NPY_HEADER` bytes of the file, or all of it.
        size: of the file, in bytes; it must be what the header claims.

    Raises:
        ValueError: not a .npy file, one that is too short or too long, or one with Python objects.
    """
    file = io.BytesIO(start)
    try:
        shape, is_fortran, dtype = _HEADERS[np.lib.format.read_magic(file)](file)
    except Exception as error:  # numpy's parser raises many kinds
        raise ValueError(f"its header is damaged: {' '.join(str(error).split())[:200]}") from None
    if dtype.hasobject:
        raise ValueError("it contains Python objects, and loading them could run code")
    if any(type(length) is not int or length < 0 for length in shape) or dtype.itemsize == 0:  # True is an int
        raise ValueError(f"it claims the shape {str(shape)[:LONGEST_NAME]} of {dtype}")
    claimed, actual = math.prod(shape) * dtype.itemsize, size - file.tell()
    if claimed != actual:
        claim = f"{claimed:,}" if claimed < LARGEST_INTEGER else "over 10^19"
        raise ValueError(f"it claims {claim} bytes of numbers and has {actual:,}")
    return NpyHeader(shape, "F" if is_fortran else "C", dtype, file.tell())


def parse_npy(data: bytes | memoryview) -> np.ndarray:
    """The array in the bytes of a .npy file; raises as `read_npy_header`."""
    view = memoryview(data).cast("B")
    header = _header_of(view)
    has_numbers = len(view) > header.offset
    flat = np.frombuffer(view, header.dtype, offset=header.offset) if has_numbers else np.empty(0, header.dtype)
    return flat.reshape(header.shape, order=header.order).copy()


def _header_of(view: memoryview) -> NpyHeader:
    if len(view) < 10 or view[6] != 1:  # the version, 1 unless the header is huge
        return read_npy_header(view[:LARGEST_NPY_HEADER], len(view))
    return _known_header(bytes(view[: 10 + int.from_bytes(view[8:10], "little")]), len(view))


@functools.lru_cache(maxsize=64)
def _known_header(start: bytes, size: int) -> NpyHeader:
    """`read_npy_header`, once for all stimuli of a recording: it takes ten times as long as reading the numbers."""
    return read_npy_header(start, size)


def map_npy(path: Path) -> np.ndarray:
    """The array in a .npy file of any size as a memory map.

    Raises:
        ValueError: as `read_npy_header`, or not a regular file.
        OSError: it cannot be read.
    """
    with open_regular_file(path, LARGEST_INTEGER) as file:
        header = read_npy_header(file.read(LARGEST_NPY_HEADER), os.fstat(file.fileno()).st_size)
        if not math.prod(header.shape):
            return np.empty(header.shape, header.dtype)
        return np.memmap(file, header.dtype, "r", header.offset, header.shape, header.order)


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
