"""Images of stimuli in a folder or a zip archive, found by the names that tables give them."""

import os
import stat
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

from data_prep.common.errors import BadInput
from data_prep.common.image_decoding import packable
from data_prep.common.safe_reading import is_name, read_regular

MAX_FILE_BYTES = 256 * 2**20  # an archive's member that claims more is damaged or made to exhaust memory

Loaded = tuple[bytes, str, dict[str, str]]  # the bytes, their encoding, and a note where they had to be converted


@dataclass
class ImageFiles:
    """The image files in a folder, its sub-folders included, or in a zip archive.

    Plain data: it can be pickled, and files are open only within `reading`.

    Attributes:
        path: the folder or the archive.
    """

    path: Path
    _archive: bool = field(init=False)

    def __post_init__(self) -> None:
        self._archive = self.path.is_file() and zipfile.is_zipfile(self.path)
        if not self._archive and not self.path.is_dir():
            raise BadInput(f"{self.path}: neither a folder nor a zip archive; the images are expected there")

    def __getstate__(self) -> dict:
        return {"path": self.path, "_archive": self._archive}  # what was found while looking is quickly made anew

    def find(self, names: Sequence[str]) -> str | None:
        """The image that one of `names` means, the first first.

        A name is a path below the folder, else the name of a file in any sub-folder, else that name without its ending.
        A file's name that occurs in several sub-folders does not tell which is meant.

        Returns:
            its path below the folder, or None.
        """
        for name in filter(None, (name.replace("\\", "/").strip() for name in names)):
            inside = not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
            if inside and self._has(name):
                return name
            file = PurePosixPath(name).name
            if found := self._index.get(file) or self._index.get(f"{file}.*"):
                return found
        return None

    def find_all(self, wanted: dict[str, Sequence[str]]) -> list[str]:
        """The image of every stimulus.

        Args:
            wanted: {stimulus: the names that its image may go by}.

        Raises:
            BadInput: some have none; the sentence counts them and names one.
        """
        found = {stimulus: self.find(names) for stimulus, names in wanted.items()}
        if missing := [stimulus for stimulus, name in found.items() if name is None]:
            looked_for = ", ".join(dict.fromkeys(filter(None, wanted[missing[0]])))
            raise BadInput(
                f"{self.path}: {len(missing)} of {len(found)} stimuli have no image there, {missing[0]!r} for one "
                f"(looked for: {looked_for})"
            )
        return list(found.values())

    def _has(self, name: str) -> bool:
        return name in self._members if self._archive else (self.path / name).is_file()

    @cached_property
    def _members(self) -> set[str]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = archive.infolist()
        except Exception as error:  # zipfile meets damage with any kind of error
            raise BadInput(f"{self.path}: not a readable zip archive ({error})") from None
        for info in members:
            _check_member(self.path, info)
        return {info.filename for info in members if not info.is_dir()}

    @cached_property
    def _index(self) -> dict[str, str | None]:
        """{file name, or name without ending + ".*": path}; None where it does not tell which file is meant."""
        index: dict[str, str | None] = {}
        for path in sorted(self._members if self._archive else self._walk()):
            file = PurePosixPath(path)
            if file.name.startswith(".") or "__MACOSX" in file.parts:
                continue
            for key in {file.name, f"{file.stem}.*"}:
                index[key] = None if key in index else path
        return index

    def _walk(self) -> Iterator[str]:
        for folder, _, files in os.walk(self.path):
            below = Path(folder).relative_to(self.path)
            yield from ((below / file).as_posix() for file in files)

    @contextmanager
    def reading(self) -> Iterator[Callable[[str], Loaded]]:
        """Open for reading: a function from a path that `find` gave to the image.

        Raises:
            BadInput: from that function, for an image that is missing, unreadable or absurdly large.
        """
        if not self._archive:
            yield lambda name: self._load(name, lambda: read_regular(self.path / name, MAX_FILE_BYTES))
            return
        with zipfile.ZipFile(self.path) as archive:
            yield lambda name: self._load(name, lambda: _extract(archive, name))

    def _load(self, name: str, read: Callable[[], bytes]) -> Loaded:
        try:
            return packable(read())
        except Exception as error:  # zipfile meets damage with any kind of error
            raise BadInput(f"{self.path / name}: the image cannot be read ({error})") from error


def _check_member(path: Path, info: zipfile.ZipInfo) -> None:
    """Refuse what no archive of images has; nothing is ever unpacked to disk, and yet its maker meant no good."""
    name, kind = info.filename, stat.S_IFMT(info.external_attr >> 16)
    if not is_name(name):
        raise BadInput(f"{path}: {name[:100]!r}: the name is too long or not printable; rename it")
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise BadInput(f"{path}: {name}: the name leads out of the archive; rename it")
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise BadInput(f"{path}: {name}: a link or a device; pack it as a plain file")


def _extract(archive: zipfile.ZipFile, name: str) -> bytes:
    info = archive.getinfo(name)
    if info.file_size > MAX_FILE_BYTES:
        raise ValueError(f"it claims {info.file_size} bytes")
    if info.flag_bits & 1:
        raise ValueError("the archive is locked by a password; unpack it first")
    return archive.read(info)
