"""Writing the tables beside the shards, index.npz and targets.npz, after packing and on request."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from data_prep.common.errors import BadInput, CannotWrite
from data_prep.common.progress import Progress
from data_prep.remote.url import FolderUrl, parse_location
from data_prep.shards import index, response_table
from data_prep.shards.copies import copy_facts
from data_prep.shards.folder import ShardFolder
from data_prep.shards.foreign_tars import is_foreign, open_foreign
from data_prep.shards.index import SplitIndex, index_shard, write_index
from data_prep.shards.manifest import Ceiling, Manifest, Shard, Table, load_manifest
from data_prep.shards.response_table import write_response_table
from data_prep.shards.storage import LocalFiles


def write_tables(
    folder: Path,
    manifest: Manifest,
    split_indexes: Mapping[str, SplitIndex],
    estimate_ceiling: Callable[[ShardFolder], Ceiling | None] | None = None,
) -> None:
    """Write index.npz, targets.npz and manifest.json beside the shards.

    Args:
        folder: of the shards.
        manifest: of the shards; its entries for the tables are filled in.
        split_indexes: by split.
        estimate_ceiling: returns the manifest's ceiling, from the shards; by default the ceiling stays as it is.

    Raises:
        CannotWrite: the disk is full, the folder read-only ...
    """
    write_index(folder, split_indexes)
    manifest.files = {}
    manifest.save(folder / "manifest.json")  # needed to read the shards; must not list an earlier index
    shards = ShardFolder(folder)
    if estimate_ceiling is not None:
        manifest.ceiling = estimate_ceiling(shards)
    write_response_table(folder, {name: shards.split(name).response_table() for name in manifest.splits})
    manifest.files = {file: Table.of(folder / file) for file in (index.FILE, response_table.FILE)}
    manifest.save(folder / "manifest.json")


def reindex(location: Path | str | FolderUrl) -> None:
    """Read the tars of a packed or foreign folder again and rewrite its tables.

    Raises:
        BadInput: a damaged tar, a folder that is not packed and holds no tars, one that cannot be written, or a URL.
    """
    folder = parse_location(location)
    if isinstance(folder, FolderUrl):
        raise BadInput(f"{folder}: --index works on local folders only; use it there, and upload the folder again")
    if is_foreign(folder):
        open_foreign(folder, read_again=True)
        return
    manifest = load_manifest(folder)
    LocalFiles(folder).check(manifest)
    split_indexes: dict[str, SplitIndex] = {}
    tar_count = sum(len(split.shards) for split in manifest.splits.values())
    with Progress(tar_count, f"indexing {folder}", "tars") as progress:
        for name, split in manifest.splits.items():
            tars = []
            for shard in split.shards:
                _check_sha256(folder / shard.file, shard)
                tars.append(index_shard(folder / shard.file, decode=True))
                progress.advance()
            split_indexes[name] = SplitIndex.joined(tars)
    copies = copy_facts(split_indexes)
    if copies is not None:
        manifest.provenance["copies"] = copies
    try:
        write_tables(folder, manifest, split_indexes)
    except CannotWrite as error:
        raise BadInput(str(error)) from None


def _check_sha256(path: Path, shard: Shard) -> None:
    """Refuse bytes that were not packed: indexing them would make damage look like data."""
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            raise BadInput(f"{path}: its bytes are not those that were packed (sha256 differs); copy or pack it again")
