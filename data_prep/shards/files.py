"""The files of a shard folder on this machine; those behind a URL are in `data_prep/shards/remote_files.py`."""

import hashlib
import mmap
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from data_prep.common.errors import BadInput
from data_prep.remote.url import FolderUrl, place_of
from data_prep.shards.manifest import Manifest, Shard, load_manifest
from data_prep.shards.remote_files import FetchSettings, RemoteFiles


class Files(Protocol):
    """Reads a shard folder's files. It can be passed to other processes."""

    def manifest(self) -> Manifest:
        """The folder's manifest, checked."""
        ...

    def check(self, manifest: Manifest) -> None:
        """Refuse what is known to be wrong with the shards without reading them."""
        ...

    def table(self, file: str, manifest: Manifest) -> BinaryIO:
        """One of the folder's tables (.npz), opened."""
        ...

    def member(self, shard: Shard, offset: int, size: int) -> memoryview:
        """Bytes of a shard."""
        ...

    def local(self, shard: Shard) -> AbstractContextManager[Path]:
        """A shard as a file of this machine."""
        ...

    def state(self, shard: Shard) -> list[Any]:
        """What a shard's bytes depend on, for a hash."""
        ...


def files_at(place: Path | str | FolderUrl, settings: FetchSettings | None = None) -> "LocalFiles | RemoteFiles":
    """The files of the shard folder at a path or a URL.

    Args:
        place: of the folder.
        settings: how remote shards are fetched and kept.

    Raises:
        BadInput: a URL that cannot be read.
    """
    found = place_of(place)
    return RemoteFiles(found, settings or FetchSettings()) if isinstance(found, FolderUrl) else LocalFiles(found)


class LocalFiles:
    """The files of a folder of this machine. Shards are mapped into memory, by each process that reads them."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._maps: dict[str, memoryview] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}

    def manifest(self) -> Manifest:
        """See `load_manifest`."""
        return load_manifest(self._folder)

    def check(self, manifest: Manifest) -> None:
        """Refuse a folder where a shard is missing or has another size than the manifest gives.

        Raises:
            BadInput: naming the shard.
        """
        for split in manifest.splits.values():
            for shard in split.shards:
                path = self._folder / shard.file
                if not path.is_file():
                    raise BadInput(f"{path} is missing, though manifest.json lists it; copy or pack the folder again")
                if (size := path.stat().st_size) != shard.bytes:
                    raise BadInput(f"{path} has {size} bytes, manifest.json says {shard.bytes}; copy or pack it again")

    def table(self, file: str, manifest: Manifest) -> BinaryIO:
        """One of the folder's tables, opened.

        Raises:
            BadInput: it is not there, or is not the one that the manifest knows.
        """
        path = self._folder / file
        if not path.is_file():
            raise BadInput(f"{self._folder} has no {file}; data_prep/show.py {self._folder} --index makes one")
        opened, known = path.open("rb"), manifest.files.get(file)
        if known is not None and hashlib.file_digest(opened, "sha256").hexdigest() != known.sha256:
            opened.close()
            raise BadInput(
                f"{path} is not the one that was packed with manifest.json (its sha256 differs): damaged, or of other "
                "shards; copy the folder again, or let data_prep/show.py --index make it anew"
            )
        opened.seek(0)
        return opened

    def member(self, shard: Shard, offset: int, size: int) -> memoryview:
        """Bytes of a shard, without a copy."""
        if shard.file not in self._maps:
            with (self._folder / shard.file).open("rb") as file:
                self._maps[shard.file] = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return self._maps[shard.file][offset : offset + size]

    @contextmanager
    def local(self, shard: Shard) -> Iterator[Path]:
        """Where a shard lies."""
        yield self._folder / shard.file

    def state(self, shard: Shard) -> list[Any]:
        """Where a shard lies and when it was last written, so that a damaged copy differs as well."""
        path = self._folder.resolve() / shard.file
        return [str(path), path.stat().st_mtime_ns, shard.sha256]
