"""The members of a shard: which kinds are plain data, their positions in the tar, and reading the small ones."""

import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import is_name, parse_json, parse_npy

MEMBERS = ("jpg", "png", "rates.npy", "trials.npy", "truth.npy", "json", "image.npy", "cls")
IMAGE_MEMBERS = ("jpg", "png", "image.npy")
LABEL_FIELDS = ("object", "label", "class")  # of a JSON member that names the class, in order of preference

_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # as WebDataset divides names into key and extension
_NOT_OF_A_STIMULUS = re.compile(
    r"__[^/]*__($|/)"  # what WebDataset ignores, such as __index__
    r"|(.*/)?(\._[^/]*|\.DS_Store)$"  # what macOS adds for itself
    r"|(.*/)?[^./]+\.txt$",  # the captions of img2dataset
    re.DOTALL | re.IGNORECASE,
)
_ALIASES = {"jpeg": "jpg"}
BLOCK = 512  # bytes: of a header in a tar, and what members are padded to
ABSENT = (-1, 0)  # offset and size of a member that a stimulus lacks

LARGEST_HEADER = 2**20  # bytes of a long name; a header that claims more is damaged or malicious
LARGEST_PADDING = 64 * 2**20  # zero bytes after the end mark; tar pads to 10 kB

_END_MARK = 2 * BLOCK  # zero bytes that close a tar
_EMPTY_READS = 2  # as many as it takes to walk a complete tar without an end mark


def key_and_kind(name: str) -> tuple[str, str] | None:
    """A member's key and its kind, one of MEMBERS; None for a kind that is not plain data.

    The key ends at the first dot of the file's name and keeps its folders, as in WebDataset; plain `tar` puts `./`
    before them, which is dropped.
    """
    divided = _NAME.fullmatch(name.removeprefix("./"))
    if divided is None:
        return None
    key, kind = divided[1], divided[2].lower()
    kind = _ALIASES.get(kind, kind)
    return (key, kind) if kind in MEMBERS else None


def is_ignored(name: str) -> bool:
    """Whether a member belongs to no stimulus and is passed over: an index, a caption, a file of macOS."""
    return _NOT_OF_A_STIMULUS.match(name) is not None


def not_plain(tar: Path | str, name: str) -> BadInput:
    """The error for a member of a kind that is never decoded."""
    return BadInput(f"{tar}: {name}: not plain data ({', '.join(MEMBERS)})")


def member_table(path: Path) -> tuple[list[str], np.ndarray]:
    """Find every member of one tar by walking its headers.

    Returns:
        The keys in the order of the tar, and the offset and size of each of MEMBERS, int64 (stimuli, members, 2);
        ABSENT for those that a stimulus lacks.

    Raises:
        BadInput: a damaged tar, a member that is not plain data, or members of one stimulus that are not adjacent.
    """
    extents: dict[str, dict[str, tuple[int, int]]] = {}
    last = None
    for name, offset, size in _files(path):
        member = key_and_kind(name)
        if member is None:
            raise not_plain(path, name)
        key, kind = member
        if key != last and key in extents:
            raise BadInput(f"{path}: {key}: occurs twice in the tar, or its members are not adjacent")
        if kind in extents.setdefault(key, {}):
            raise BadInput(f"{path}: {key}: has {kind} twice, which WebDataset cannot read either")
        extents[key][kind] = (offset, size)
        last = key
    table = [[of_kind.get(kind, ABSENT) for kind in MEMBERS] for of_kind in extents.values()]
    return list(extents), np.array(table, dtype=np.int64).reshape(len(extents), len(MEMBERS), 2)


class _GuardedTar(io.BufferedReader):
    """A tar for tarfile to walk. No header can make it take much memory or, by pointing backwards, endless time."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path))
        self._furthest, self._empty_reads = 0, 0

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= LARGEST_HEADER:
            raise tarfile.ReadError(f"a header claims {size:,} bytes of text")
        data = super().read(size)
        self._furthest = self.tell()
        if not data:
            self._empty_reads += 1
        if self._empty_reads > _EMPTY_READS:
            raise tarfile.ReadError("a header points beyond the end")
        return data

    def seek(self, position: int, whence: int = io.SEEK_SET, /) -> int:
        if whence != io.SEEK_SET or position < self._furthest:
            raise tarfile.ReadError(f"the header before byte {self._furthest} points backwards")
        self._furthest = super().seek(position)
        return self._furthest


def _files(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of every file in a tar (GNU, pax or ustar)."""
    try:
        with _GuardedTar(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                _check_name(path, member.name)
                if member.isdir() or is_ignored(member.name):
                    continue
                if not member.isreg() or member.issparse():
                    raise BadInput(f"{path}: {member.name}: a link, a device or a sparse file; pack it as a plain file")
                yield member.name, member.offset_data, member.size
            end = tar.offset
    except BadInput:
        raise
    except Exception as error:  # tarfile raises errors of any kind for damaged headers
        raise BadInput(f"{path} is not a whole tar file ({error}); pack or copy it again") from None
    _check_end(path, end)


def _check_name(path: Path, name: str) -> None:
    """Refuse names that point outside the folder or are not printable."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise BadInput(f"{path}: {name!r}: the name is not UTF-8; rename it") from None
    if not is_name(name):
        raise BadInput(f"{path}: {name[:100]!r}: the name is too long or not printable; rename it")
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise BadInput(f"{path}: {name}: the name points outside the folder; rename it")


def _check_end(path: Path, end: int) -> None:
    """Refuse a tar without an end mark: nothing else shows that it was cut between two members."""
    with path.open("rb") as file:
        file.seek(end)
        mark = file.read(_END_MARK)
        has_more_data = path.stat().st_size - file.tell() > LARGEST_PADDING or any(file.read(LARGEST_PADDING))
    if any(mark):
        raise BadInput(f"{path} is not a whole tar file (no header at byte {end}); pack or copy it again")
    if len(mark) < _END_MARK:
        raise BadInput(f"{path} is not a whole tar file (it is cut short, without an end mark); copy it again")
    if has_more_data:
        raise BadInput(f"{path} has data after its end mark, where every reader stops; were two tars concatenated?")


def read_json(data: bytes | memoryview | None, location: str) -> dict[str, Any]:
    """The content of a JSON member; empty if there is none.

    Args:
        data: of the member.
        location: of the stimulus, for messages.

    Raises:
        BadInput: not a JSON object.
    """
    try:
        content = parse_json(bytes(data or b"{}"))
    except ValueError as error:
        raise BadInput(f"{location}.json is not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise BadInput(f'{location}.json must contain a JSON object such as {{"object": "face"}}')
    return content


def read_array(data: bytes | memoryview, location: str) -> np.ndarray:
    """An array of numbers as float32.

    Args:
        data: of the .npy member.
        location: of the member, for messages.

    Raises:
        BadInput: not a plain npy array of real numbers, or one with an infinite value.
    """
    try:
        array = parse_npy(data)
    except ValueError as error:
        raise BadInput(f"{location} is not a plain npy array ({error})") from None
    if array.dtype.kind not in "fiu":
        raise BadInput(f"{location} must contain real numbers, not {array.dtype}")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32, copy=False)
    if np.isinf(array).any():
        raise BadInput(f"{location} contains an infinite value; use NaN for missing responses")
    return array


def read_label(cls: bytes | memoryview | None, facts: dict[str, Any], location: str) -> str | None:
    """The class of a stimulus: the text of its member `cls`, else the first of LABEL_FIELDS in its JSON member.

    Args:
        cls: the member, if any.
        facts: the JSON member.
        location: of the stimulus, for messages.

    Raises:
        BadInput: it is not one line of text.
    """
    if cls is not None:
        try:
            text = bytes(cls).decode().strip()
        except UnicodeDecodeError:
            text = ""
        if not is_name(text):
            raise BadInput(f"{location}.cls must be the number or the name of a class, as text")
        return text
    for field in LABEL_FIELDS:
        value = facts.get(field)
        if isinstance(value, str | int) and not isinstance(value, bool):
            if not is_name(str(value)):
                raise BadInput(f"{location}.json: the class {str(value)[:100]!r} is not one printable line")
            return str(value)
    return None
