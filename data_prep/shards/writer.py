"""Writing one shard: a plain WebDataset tar, with its hash and its index."""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_prep.recording import Stimulus
from data_prep.shards.image_hashes import encoded_hash
from data_prep.shards.index import SplitIndex, index_shard
from data_prep.shards.manifest import Shard
from data_prep.shards.members import ABSENT, BLOCK, MEMBERS

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _HashingFile(io.BufferedWriter):
    """A file for writing that hashes its content, so that a shard need not be read again for that."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path, "w"))
        self.hash = hashlib.sha256()

    def write(self, data: ReadableBuffer, /) -> int:
        self.hash.update(data)
        return super().write(data)


def write_shard(path: Path, stimuli: Iterable[Stimulus]) -> tuple[Shard, SplitIndex]:
    """Write one WebDataset tar; equal stimuli give equal bytes (owner and time are fixed).

    Args:
        path: of the tar.
        stimuli: in the order of the tar.

    Returns:
        The shard's entry in the manifest, and its index.

    Raises:
        OSError: the tar cannot be written.
    """
    import webdataset  # here because it imports torch, which takes a second

    file = _HashingFile(path)
    ids: list[str] = []
    extents: list[list[tuple[int, int]] | None] = []
    checksums: list[list[int]] = []
    hashes: list[np.ndarray] = []
    try:
        with webdataset.TarWriter(file, encoder=False, mtime=0, user="spiketune", group="spiketune") as writer:
            for stimulus in stimuli:
                members, start = _members_of(stimulus), writer.tarstream.offset
                writer.write({"__key__": stimulus.id, **members})
                ids.append(stimulus.id)
                extents.append(_extents(members, start, writer.tarstream.offset))
                checksums.append([zlib.crc32(members.get(kind, b"")) for kind in MEMBERS])  # of nothing: 0
                hashes.append(encoded_hash(stimulus.image))
    finally:
        file.close()
    if None in extents:
        index = index_shard(path)
    else:
        index = SplitIndex.of_tar(ids, np.array(extents, np.int64), np.array(checksums, np.uint32), np.stack(hashes))
    shard = Shard(file=path.name, stimuli=len(ids), bytes=path.stat().st_size, sha256=file.hash.hexdigest())
    return shard, index


def _extents(members: dict[str, bytes], start: int, end: int) -> list[tuple[int, int]] | None:
    """Offset and size of each of MEMBERS in a tar where these were written from `start` to `end`.

    The writer puts them in alphabetical order, each after a header of one block and padded to whole blocks. None if
    that does not add up to `end`: a long name takes more than one header block.
    """
    extents, offset = {}, start
    for kind in sorted(members):
        size = len(members[kind])
        extents[kind] = (offset + BLOCK, size)
        offset += BLOCK + -(-size // BLOCK) * BLOCK
    if offset != end:
        return None
    return [extents.get(kind, ABSENT) for kind in MEMBERS]


def _members_of(stimulus: Stimulus) -> dict[str, bytes]:
    facts = json.dumps(stimulus.meta, sort_keys=True, allow_nan=False)
    members = {stimulus.encoding: stimulus.image, "json": facts.encode()}
    arrays = {"rates.npy": stimulus.rates, "trials.npy": stimulus.trials, "truth.npy": stimulus.truth}
    for kind, array in arrays.items():
        if array is not None:
            members[kind] = _npy_bytes(array)
    return members


def _npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array, dtype=np.float32), allow_pickle=False)
    return buffer.getvalue()
