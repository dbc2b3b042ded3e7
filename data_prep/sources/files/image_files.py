"""Images in a folder or a zip archive, found by the names in a table."""

import os
import stat
import unicodedata
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import is_name, read_regular_file
from data_prep.recording import OTHER_FORMAT

MAX_FILE_BYTES = 256 * 2**20  # an archive member that claims more is damaged or made to exhaust memory


@dataclass(frozen=True)
class EncodedImage:
    """An image as it goes into a shard.

    Attributes:
        data: the encoded image.
        encoding: "jpg", "png", or OTHER_FORMAT.
        location: where it lies, for messages.
    """

    data: bytes
    encoding: str
    location: str


def spelling(path: str) -> str:
    """What all spellings of a path have in common.

    They may differ in Windows' separators, in the case of the ending, and in whether letters with accents are composed.
    """
    path = unicodedata.normalize("NFC", path.replace("\\", "/")).removeprefix("./")
    ending = PurePosixPath(path).suffix
    return path.removesuffix(ending) + ending.lower() if ending else path


def is_inside(path: str) -> bool:
    """Whether a path stays below the folder that it starts from."""
    return not PurePosixPath(path).is_absolute() and ".." not in PurePosixPath(path).parts


@dataclass
class ImageFiles:
    """The image files in a folder and its sub-folders, or in a zip archive.

    Plain data: it can be pickled, and files are open only within `reading`.

    Attributes:
        path: the folder or the archive.
    """

    path: Path
    _is_archive: bool = field(init=False)

    def __post_init__(self) -> None:
        self._is_archive = self.path.is_file() and zipfile.is_zipfile(self.path)
        if not self._is_archive and not self.path.is_dir():
            raise BadInput(f"{self.path}: neither a folder nor a zip archive, so it cannot contain the images")

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_is_archive": self._is_archive}  # without the cached listings: they can be large

    def find(self, names: Sequence[str]) -> str | None:
        """The image of the first name that matches one.

        A name is a path below the folder, also in another `spelling`, else a file name in any sub-folder, else a file
        name without its ending. What several images match is ambiguous and matches none.

        Returns:
            The image's path below the folder, or None.
        """
        for name in (name.strip() for name in names):
            if not name:
                continue
            path = self.find_path(name)
            if path is None:
                file = PurePosixPath(spelling(name)).name
                path = self._paths_by_name.get(file) or self._paths_by_name.get(f"{file}.*")
            if path is not None:
                return path
        return None

    def find_path(self, name: str) -> str | None:
        """The image at a path below the folder: exactly there, or the only one whose path is spelled like it."""
        if is_inside(name) and self._has(name):
            return name
        return self._paths_by_spelling.get(spelling(name)) if is_inside(spelling(name)) else None

    def find_all(self, wanted: Mapping[str, Sequence[str]]) -> list[str]:
        """The image of every stimulus.

        Args:
            wanted: {stimulus: names that its image may have}.

        Raises:
            BadInput: some stimuli have none; the message counts them and names one.
        """
        paths, missing = [], []
        for stimulus, names in wanted.items():
            path = self.find(names)
            if path is None:
                missing.append(stimulus)
            else:
                paths.append(path)
        if missing:
            names_tried = ", ".join(dict.fromkeys(name for name in wanted[missing[0]] if name))
            raise BadInput(
                f"{self.path}: {len(missing)} of {len(wanted)} stimuli have no image there, e.g. {missing[0]!r} "
                f"(looked for {names_tried})"
            )
        return paths

    def _has(self, name: str) -> bool:
        return name in self._members if self._is_archive else (self.path / name).is_file()

    @cached_property
    def _members(self) -> set[str]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = archive.infolist()
        except Exception as error:  # zipfile raises errors of any kind for damaged archives
            raise BadInput(f"{self.path}: not a readable zip archive ({error})") from None
        for info in members:
            _check_member(self.path, info)
        return {info.filename for info in members if not info.is_dir()}

    @cached_property
    def _paths_by_name(self) -> dict[str, str | None]:
        """{file name, or name without ending + ".*": path}; None for an ambiguous name."""
        paths: dict[str, str | None] = {}
        for path in sorted(self._members if self._is_archive else self._walk()):
            file = PurePosixPath(spelling(path))
            if file.name.startswith(".") or "__MACOSX" in file.parts:
                continue
            for key in {file.name, f"{file.stem}.*"}:
                paths[key] = None if key in paths else path
        return paths

    @cached_property
    def _paths_by_spelling(self) -> dict[str, str | None]:
        """{spelling: path}; None for an ambiguous one."""
        paths: dict[str, str | None] = {}
        for path in self._members if self._is_archive else self._walk():
            paths[spelling(path)] = None if spelling(path) in paths else path
        return paths

    def _walk(self) -> Iterator[str]:
        for folder, _, files in os.walk(self.path):
            below = Path(folder).relative_to(self.path)
            yield from ((below / file).as_posix() for file in files)

    @contextmanager
    def reading(self) -> Iterator[Callable[[str], EncodedImage]]:
        """Open for reading: a function from a path that `find` returned to the image.

        Raises:
            BadInput: raised by that function for a file that is missing, too large or cannot be read. Whether it is an
                image shows when it is packed.
        """
        if not self._is_archive:
            yield lambda name: self._load(name, lambda: read_regular_file(self.path / name, MAX_FILE_BYTES))
            return
        with zipfile.ZipFile(self.path) as archive:
            yield lambda name: self._load(name, lambda: _extract(archive, name))

    def _load(self, name: str, read: Callable[[], bytes]) -> EncodedImage:
        from data_prep.common.image_decoding import sniff_encoding  # slow to import

        try:
            data = read()
        except Exception as error:  # zipfile raises errors of any kind for damaged archives
            raise BadInput(f"{self.path / name}: the image cannot be read ({error})") from error
        return EncodedImage(data, sniff_encoding(data) or OTHER_FORMAT, str(self.path / name))


def _check_member(path: Path, info: zipfile.ZipInfo) -> None:
    """Refuse names and kinds of members that only malicious archives have, though nothing is unpacked to disk."""
    name, kind = info.filename, stat.S_IFMT(info.external_attr >> 16)
    if not is_name(name):
        raise BadInput(f"{path}: {name[:100]!r}: the name is too long or not printable; rename it")
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise BadInput(f"{path}: {name}: the name points outside the archive; rename it")
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise BadInput(f"{path}: {name}: a link or a device; pack it as a plain file")


def _extract(archive: zipfile.ZipFile, name: str) -> bytes:
    info = archive.getinfo(name)
    if info.file_size > MAX_FILE_BYTES:
        raise ValueError(f"it claims {info.file_size} bytes")
    if info.flag_bits & 1:
        raise ValueError("the archive is protected by a password; unpack it first")
    return archive.read(info)
