"""The files of a shard folder: on this machine, or behind a URL (data_prep/shards/remote_files.py)."""

import hashlib
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.common.errors import BadInput
from data_prep.remote.cache import FetchSettings
from data_prep.remote.url import FolderUrl, parse_location
from data_prep.shards.manifest import Manifest, Shard, load_manifest
from data_prep.shards.remote_files import RemoteFiles


def open_files(location: Path | str | FolderUrl, settings: FetchSettings | None = None) -> "LocalFiles | RemoteFiles":
    """The files of the shard folder at a path or a URL.

    Args:
        location: of the folder.
        settings: how remote shards are fetched and kept.

    Raises:
        BadInput: a URL that cannot be read.
    """
    location = parse_location(location)
    if isinstance(location, FolderUrl):
        return RemoteFiles(location, settings or FetchSettings())
    return LocalFiles(location)


class LocalFiles:
    """The files of a local folder, with the methods of `RemoteFiles`. Each process maps the shards that it reads."""

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
                size = path.stat().st_size
                if size != shard.bytes:
                    raise BadInput(
                        f"{path} has {size} bytes, but manifest.json lists {shard.bytes}; copy or pack it again"
                    )

    def table(self, file: str, manifest: Manifest) -> BinaryIO:
        """One of the folder's tables, opened.

        Raises:
            BadInput: it does not exist, or is not the one that the manifest lists.
        """
        path = self._folder / file
        if not path.is_file():
            raise BadInput(f"{self._folder} has no {file}; data_prep/show.py {self._folder} --index writes it")
        table, entry = path.open("rb"), manifest.files.get(file)
        if entry is not None and hashlib.file_digest(table, "sha256").hexdigest() != entry.sha256:
            table.close()
            raise BadInput(
                f"{path} is not the file that was packed with manifest.json (its sha256 differs): it is damaged or "
                "belongs to other shards; copy the folder again, or rebuild the file with data_prep/show.py --index"
            )
        table.seek(0)
        return table

    def member(self, shard: Shard, offset: int, size: int) -> memoryview:
        """Bytes of a shard, without a copy."""
        if shard.file not in self._maps:
            with (self._folder / shard.file).open("rb") as file:
                self._maps[shard.file] = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return self._maps[shard.file][offset : offset + size]

    @contextmanager
    def local(self, shard: Shard) -> Iterator[Path]:
        """The path of a shard."""
        yield self._folder / shard.file

    def state(self, shard: Shard) -> list[Any]:
        """The path, modification time and hash of a shard, so that a damaged copy differs as well."""
        path = self._folder.resolve() / shard.file
        return [str(path), path.stat().st_mtime_ns, shard.sha256]
