"""What a shard may hold: which members of a tar are plain data, where they lie, and what the small ones say."""

import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import BadInput

MEMBERS = ("jpg", "png", "rates.npy", "trials.npy", "truth.npy", "json", "image.npy", "cls")
IMAGE_MEMBERS = ("jpg", "png", "image.npy")
LABEL_FIELDS = ("object", "label", "class")  # of a JSON member that names the class, in order of preference

_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # as WebDataset divides names into key and extension
_NOT_A_SAMPLE = re.compile(r"__[^/]*__($|/)")  # members that WebDataset passes over, such as __index__
_SAME_KIND = {"jpeg": "jpg"}
BLOCK = 512  # bytes: of a header in a tar, and what members are filled up to
ABSENT = (-1, 0)  # offset and size of a member that is not there

_END_MARK = 2 * BLOCK  # zero bytes that close a tar


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


def _files(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of every file in a tar (GNU, pax or ustar)."""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isdir() or not is_sample(member.name):
                    continue
                if not member.isreg() or member.issparse():
                    raise BadInput(f"{path}: {member.name}: a link or a file with holes; pack it as a plain file")
                if not _is_text(member.name):
                    raise BadInput(f"{path}: {member.name!r}: the name is not UTF-8; rename it")
                yield member.name, member.offset_data, member.size
            end = tar.offset
    except (tarfile.TarError, OSError) as error:
        raise BadInput(f"{path} is not a whole tar file ({error}); pack or copy it again") from None
    _check_end(path, end)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_end(path: Path, end: int) -> None:
    """Refuse a tar without its end mark: nothing else tells that it was cut at a member's border."""
    with path.open("rb") as file:
        file.seek(end)
        mark = file.read(_END_MARK)
        more = any(any(block) for block in iter(lambda: file.read(1 << 20), b""))
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
        found = json.loads(bytes(data or b"{}"))
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
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise BadInput(f"{place} is not a plain npy array ({error})") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise BadInput(f"{place} must hold real numbers, not {getattr(array, 'dtype', 'an archive')}")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32, copy=False)
    if np.isinf(array).any():
        raise BadInput(f"{place} holds an infinite value; NaN stands for what was not recorded")
    return array


def read_label(cls: bytes | memoryview | None, facts: dict[str, Any], place: str) -> str | None:
    """The class of a stimulus: what its member `cls` says, else the first of LABEL_FIELDS in its JSON member.

    Raises:
        BadInput: `cls` is not a line of text.
    """
    if cls is not None:
        try:
            text = bytes(cls).decode().strip()
        except UnicodeDecodeError:
            text = ""
        if not text or not text.isprintable():
            raise BadInput(f"{place}.cls must be the number or the name of a class, as text")
        return text
    named = (facts[field] for field in LABEL_FIELDS if field in facts)
    return next((str(name) for name in named if isinstance(name, str | int) and not isinstance(name, bool)), None)
