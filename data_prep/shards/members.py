"""What a shard may hold: which members of a tar are plain data, where they lie, and what the small ones say."""

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import is_name, npy_array, parse_json

MEMBERS = ("jpg", "png", "rates.npy", "trials.npy", "truth.npy", "json", "image.npy", "cls")
IMAGE_MEMBERS = ("jpg", "png", "image.npy")
LABEL_FIELDS = ("object", "label", "class")  # of a JSON member that names the class, in order of preference

_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # as WebDataset divides names into key and extension
_NOT_A_SAMPLE = re.compile(r"__[^/]*__($|/)")  # members that WebDataset passes over, such as __index__
_SAME_KIND = {"jpeg": "jpg"}
BLOCK = 512  # bytes: of a header in a tar, and what members are filled up to
ABSENT = (-1, 0)  # offset and size of a member that is not there

LARGEST_HEADER = 2**20  # bytes of a long name; a header that claims more is damaged or made to exhaust memory
LARGEST_PADDING = 64 * 2**20  # bytes behind the end mark; tar fills up to 10 kB

_END_MARK = 2 * BLOCK  # zero bytes that close a tar
_ENDS = 2  # times that walking a whole tar without an end mark reads nothing


def key_and_kind(name: str) -> tuple[str, str] | None:
    """A member's key and its kind, one of MEMBERS; None for what is not plain data.

    The key ends at the first dot of the file's name and keeps its folders, as in WebDataset; plain `tar` puts `./`
    before them, which is dropped.
    """
    divided = _NAME.fullmatch(name.removeprefix("./"))
    if divided is None:
        return None
    key, kind = divided[1], divided[2].lower()
    kind = _SAME_KIND.get(kind, kind)
    return (key, kind) if kind in MEMBERS else None


def is_sample(name: str) -> bool:
    """False for a member that describes the tar and not a stimulus."""
    return not _NOT_A_SAMPLE.match(name)


def not_plain(place: Path | str, name: str) -> BadInput:
    """The error for a member of a kind that is never decoded."""
    return BadInput(f"{place}: {name}: not a member of plain data ({', '.join(MEMBERS)})")


def member_table(path: Path) -> tuple[list[str], np.ndarray]:
    """Find every member of one tar by walking its headers.

    Returns:
        the keys in their order, and for each key the offset and size of each of MEMBERS, int64 (stimuli, members, 2);
        ABSENT where it has none.

    Raises:
        BadInput: a damaged tar, a member of a kind that is not plain data, or members of one stimulus that lie apart.
    """
    places: dict[str, dict[str, tuple[int, int]]] = {}
    last = None
    for name, offset, size in _files(path):
        found = key_and_kind(name)
        if found is None:
            raise not_plain(path, name)
        key, kind = found
        if key != last and key in places:
            raise BadInput(f"{path}: {key}: twice in the tar, or its members do not lie together")
        if kind in places.setdefault(key, {}):
            raise BadInput(f"{path}: {key}: has {kind} twice; WebDataset cannot read such a tar either")
        places[key][kind] = (offset, size)
        last = key
    table = [[place.get(kind, ABSENT) for kind in MEMBERS] for place in places.values()]
    return list(places), np.array(table, dtype=np.int64).reshape(len(places), len(MEMBERS), 2)


class _Headers:
    """A tar for tarfile to walk: what a header claims costs neither memory nor, by leading backwards, endless time."""

    def __init__(self, file: BinaryIO):
        self._file, self._furthest, self._ends = file, 0, 0

    def read(self, size: int) -> bytes:
        if not 0 <= size <= LARGEST_HEADER:
            raise tarfile.ReadError(f"a header claims {size:,} bytes of text")
        data = self._file.read(size)
        self._furthest = self._file.tell()
        self._ends += not data
        if self._ends > _ENDS:
            raise tarfile.ReadError("a header leads beyond the end")
        return data

    def seek(self, position: int) -> None:
        if position < self._furthest:
            raise tarfile.ReadError(f"the header before byte {self._furthest} leads backwards")
        self._furthest = self._file.seek(position)

    def tell(self) -> int:
        return self._file.tell()


def _files(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of every file in a tar (GNU, pax or ustar)."""
    try:
        with path.open("rb") as file, tarfile.open(fileobj=_Headers(file), mode="r:") as tar:
            for member in tar:
                _check_name(path, member.name)
                if member.isdir() or not is_sample(member.name):
                    continue
                if not member.isreg() or member.issparse():
                    raise BadInput(
                        f"{path}: {member.name}: a link, a device or a file with holes; pack it as a plain file"
                    )
                yield member.name, member.offset_data, member.size
            end = tar.offset
    except BadInput:
        raise
    except Exception as error:  # tarfile meets a damaged header with any kind of error
        raise BadInput(f"{path} is not a whole tar file ({error}); pack or copy it again") from None
    _check_end(path, end)


def _check_name(path: Path, name: str) -> None:
    """Refuse names that lead out of a folder, or that no terminal could show."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise BadInput(f"{path}: {name!r}: the name is not UTF-8; rename it") from None
    if not is_name(name):
        raise BadInput(f"{path}: {name[:100]!r}: the name is too long or not printable; rename it")
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise BadInput(f"{path}: {name}: the name leads out of the folder; rename it")


def _check_end(path: Path, end: int) -> None:
    """Refuse a tar without its end mark: nothing else tells that it was cut at a member's border."""
    with path.open("rb") as file:
        file.seek(end)
        mark = file.read(_END_MARK)
        more = path.stat().st_size - file.tell() > LARGEST_PADDING or any(file.read(LARGEST_PADDING))
    if any(mark):
        raise BadInput(f"{path} is not a whole tar file (no header at byte {end}); pack or copy it again")
    if len(mark) < _END_MARK:
        raise BadInput(f"{path} is not a whole tar file (it ends without an end mark: cut short); copy it again")
    if more:
        raise BadInput(f"{path}: goes on after its end mark, which no reader does; were two tars joined?")


def read_json(data: bytes | memoryview | None, place: str) -> dict[str, Any]:
    """What a JSON member says; nothing where there is none.

    Raises:
        BadInput: not a JSON object.
    """
    try:
        found = parse_json(bytes(data or b"{}"))
    except ValueError as error:
        raise BadInput(f"{place}.json is not readable as JSON ({error})") from None
    if not isinstance(found, dict):
        raise BadInput(f'{place}.json must hold a JSON object such as {{"object": "face"}}')
    return found


def read_array(data: bytes | memoryview, place: str) -> np.ndarray:
    """An array of numbers as float32.

    Raises:
        BadInput: not a plain npy array of real numbers, or one with an infinite value.
    """
    try:
        array = npy_array(data)
    except ValueError as error:
        raise BadInput(f"{place} is not a plain npy array ({error})") from None
    if array.dtype.kind not in "fiu":
        raise BadInput(f"{place} must hold real numbers, not {array.dtype}")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32, copy=False)
    if np.isinf(array).any():
        raise BadInput(f"{place} holds an infinite value; NaN stands for what was not recorded")
    return array


def read_label(cls: bytes | memoryview | None, facts: dict[str, Any], place: str) -> str | None:
    """The class of a stimulus: what its member `cls` says, else the first of LABEL_FIELDS in its JSON member.

    Raises:
        BadInput: it is not a line of text.
    """
    if cls is not None:
        try:
            text = bytes(cls).decode().strip()
        except UnicodeDecodeError:
            text = ""
        if not is_name(text):
            raise BadInput(f"{place}.cls must be the number or the name of a class, as text")
        return text
    named = (facts[field] for field in LABEL_FIELDS if field in facts)
    label = next((str(name) for name in named if isinstance(name, str | int) and not isinstance(name, bool)), None)
    if label is not None and not is_name(label):
        raise BadInput(f"{place}.json: the class {label[:100]!r} is no name; it must be one printable line")
    return label
