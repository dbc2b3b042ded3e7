"""index.npz: the offset and size of every member in its tar, so that any stimulus can be read without scanning.

members               (members,)     the extensions that may occur: MEMBERS in data_prep/shards/members.py
<split>.stimulus_id   (stimuli,)     ids in the order of the shards
<split>.shard         (stimuli,)     position of its tar in the manifest's list for the split
<split>.offset        (stimuli, members)   byte offset of the member's data in the tar, -1 if absent
<split>.size          (stimuli, members)   bytes
<split>.crc32         (stimuli, members)   of these bytes, so that a flipped bit is noticed; optional
<split>.encoded_hash  (stimuli, 16)   of the image's encoded bytes, see data_prep/shards/image_hashes.py; optional
<split>.pixel_hash    (stimuli, 16)   of its pixels; optional
"""

import mmap
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.common.atomic_writes import write_npz
from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import is_name, read_npz
from data_prep.remote.url import FolderUrl
from data_prep.shards.image_hashes import HASH_BYTES, encoded_hashes, pixel_hashes
from data_prep.shards.manifest import Manifest, Split
from data_prep.shards.members import MEMBERS, member_table
from data_prep.shards.storage import LocalFiles, RemoteFiles

FILE = "index.npz"


@dataclass(frozen=True)
class SplitIndex:
    """The positions of the members of a split's stimuli; the arrays are described at the top of this file."""

    stimulus_id: np.ndarray
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    crc32: np.ndarray | None
    encoded_hash: np.ndarray | None = None
    pixel_hash: np.ndarray | None = None

    @classmethod
    def of_tar(
        cls,
        ids: list[str],
        extents: np.ndarray,
        checksums: np.ndarray,
        encoded_hash: np.ndarray,
        pixel_hash: np.ndarray | None = None,
    ) -> "SplitIndex":
        """The index of one tar.

        Args:
            ids: of its stimuli.
            extents: offset and size of each member, int64 (stimuli, members, 2).
            checksums: CRC-32 of each member, uint32 (stimuli, members).
            encoded_hash, pixel_hash: of each image, uint8 (stimuli, 16).
        """
        extents = extents.reshape(len(ids), len(MEMBERS), 2)
        shard = np.zeros(len(ids), np.int32)
        return cls(np.array(ids), shard, extents[..., 0], extents[..., 1], checksums, encoded_hash, pixel_hash)

    @classmethod
    def joined(cls, tars: "Sequence[SplitIndex]") -> "SplitIndex":
        """The index of a split, from those of its tars."""
        return cls(
            stimulus_id=np.concatenate([tar.stimulus_id for tar in tars]),
            shard=np.repeat(np.arange(len(tars), dtype=np.int32), [len(tar.shard) for tar in tars]),
            offset=np.concatenate([tar.offset for tar in tars]),
            size=np.concatenate([tar.size for tar in tars]),
            crc32=_joined([tar.crc32 for tar in tars]),
            encoded_hash=_joined([tar.encoded_hash for tar in tars]),
            pixel_hash=_joined([tar.pixel_hash for tar in tars]),
        )

    def describes(self, shard: int, tar: "SplitIndex") -> bool:
        """Whether it describes one shard just as the index of that tar alone does."""
        rows = self.shard == shard
        same = (
            np.array_equal(self.stimulus_id[rows], tar.stimulus_id)
            and np.array_equal(self.offset[rows], tar.offset)
            and np.array_equal(self.size[rows], tar.size)
        )
        for ours, of_tar in ((self.crc32, tar.crc32), (self.encoded_hash, tar.encoded_hash)):
            if ours is not None and of_tar is not None:
                same = same and np.array_equal(ours[rows], of_tar)
        return same

    def arrays(self, split: str) -> dict[str, np.ndarray]:
        """Its arrays by their names in the file."""
        arrays = {f"{split}.{name}": getattr(self, name) for name in SplitIndex.__dataclass_fields__}
        return {name: array for name, array in arrays.items() if array is not None}


def _joined(of_tars: "Sequence[np.ndarray | None]") -> np.ndarray | None:
    """The optional arrays of tars, one after the other; None if any lacks it."""
    present = [array for array in of_tars if array is not None]
    return np.concatenate(present) if len(present) == len(of_tars) else None


def index_shard(path: Path, decode: bool = False) -> SplitIndex:
    """Index one tar: find every member, and read it for its checksum.

    Args:
        path: of the tar.
        decode: decode the images for the hashes of their pixels, which are left out otherwise.

    Raises:
        BadInput: as `member_table`.
    """
    ids, extents = member_table(path)
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as content,
    ):
        pixel_hash = pixel_hashes(content, extents) if decode else None
        encoded_hash = encoded_hashes(content, extents)
        return SplitIndex.of_tar(ids, extents, checksums(content, extents), encoded_hash, pixel_hash)


def checksums(content: memoryview, extents: np.ndarray) -> np.ndarray:
    """CRC-32 of each member of a tar, 0 for absent ones: uint32 (stimuli, members).

    Args:
        content: of the tar.
        extents: offset and size of each member, int64 (stimuli, members, 2).
    """
    flat = extents.reshape(-1, 2).tolist()
    sums = [0 if offset < 0 else zlib.crc32(content[offset : offset + size]) for offset, size in flat]
    return np.array(sums, np.uint32).reshape(extents.shape[:2])


def write_index(folder: Path, splits: Mapping[str, SplitIndex]) -> None:
    """Write `index.npz`.

    Raises:
        CannotWrite: the disk is full, the folder read-only ...
    """
    arrays: dict[str, np.ndarray] = {"members": np.array(MEMBERS)}
    for name, index in splits.items():
        arrays |= index.arrays(name)
    write_npz(folder / FILE, arrays)


def load_index(folder: Path | FolderUrl, files: LocalFiles | RemoteFiles, manifest: Manifest) -> dict[str, SplitIndex]:
    """The index of a packed folder, by split.

    Args:
        folder: of the shards, for messages.
        files: of the folder.
        manifest: of the folder.

    Raises:
        BadInput: it is missing, damaged, or belongs to other shards.
    """
    path = folder / FILE
    try:
        with files.table(FILE, manifest) as file:
            index = index_of(read_npz(file), manifest)
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(
            f"{path} cannot be read ({error}); rebuild it with data_prep/show.py --index beside the tars"
        ) from None
    _check_disjoint(path, index)
    return index


def _check_disjoint(path: Path | str, index: Mapping[str, SplitIndex]) -> None:
    """Refuse a stimulus that is in two splits: held-out scores would include fitted stimuli."""
    split_of: dict[str, str] = {}
    for name, split in index.items():
        for stimulus in split.stimulus_id.tolist():
            if (other := split_of.setdefault(stimulus, name)) != name:
                raise BadInput(f"{path}: stimulus {stimulus} is in both {other} and {name}; pack the recording again")


def index_of(arrays: Mapping[str, np.ndarray], manifest: Manifest) -> dict[str, SplitIndex]:
    """The index by split, from its arrays.

    Raises:
        ValueError: it lists unknown members, or other stimuli than the manifest counts.
        KeyError: an array is missing.
    """
    members = tuple(arrays["members"].tolist())
    if members != MEMBERS[: len(members)]:  # older folders list fewer
        raise ValueError(f"it lists the members {', '.join(map(str, members))}")
    indexes = {}
    for name, split in manifest.splits.items():
        index = SplitIndex(
            stimulus_id=arrays[f"{name}.stimulus_id"],
            shard=arrays[f"{name}.shard"],
            offset=arrays[f"{name}.offset"],
            size=arrays[f"{name}.size"],
            crc32=arrays.get(f"{name}.crc32"),
            encoded_hash=arrays.get(f"{name}.encoded_hash"),
            pixel_hash=arrays.get(f"{name}.pixel_hash"),
        )
        _check(name, index, split, len(members))
        indexes[name] = _with_all_members(index)
    return indexes


def _check(name: str, index: SplitIndex, split: Split, members: int) -> None:
    """Refuse an index that does not describe the manifest's shards.

    Raises:
        ValueError: naming the split and what is wrong.
    """
    per_stimulus, per_member = (split.stimuli,), (split.stimuli, members)
    _check_array(f"{name}: stimulus_id", index.stimulus_id, "U", per_stimulus)
    _check_array(f"{name}: shard", index.shard, "iu", per_stimulus)
    _check_array(f"{name}: offset", index.offset, "i", per_member)
    _check_array(f"{name}: size", index.size, "iu", per_member)
    if index.crc32 is not None:
        _check_array(f"{name}: crc32", index.crc32, "u", per_member)
    for kind, hashes in (("encoded_hash", index.encoded_hash), ("pixel_hash", index.pixel_hash)):
        if hashes is not None and (hashes.dtype != np.uint8 or hashes.shape != (split.stimuli, HASH_BYTES)):
            raise ValueError(f"{name}: {kind} is {hashes.dtype} {hashes.shape}, not {HASH_BYTES} bytes a stimulus")
    if index.shard.min() < 0 or index.shard.max() >= len(split.shards) or (np.diff(index.shard) < 0).any():
        raise ValueError(f"{name}: shard must ascend from 0 to {len(split.shards) - 1}")
    counts = np.bincount(index.shard, minlength=len(split.shards)).tolist()
    if counts != [shard.stimuli for shard in split.shards]:
        raise ValueError(f"{name}: it does not list the stimuli that manifest.json counts in each shard")
    length = np.array([shard.bytes for shard in split.shards])[index.shard, None]
    exists = index.offset >= 0
    if (exists & ((index.size < 0) | (index.size > length) | (index.offset > length - index.size))).any():
        raise ValueError(f"{name}: a member lies beyond the end of its shard")
    _check_ids(name, index.stimulus_id.tolist())


def _check_array(name: str, array: np.ndarray, kinds: str, shape: tuple[int, ...]) -> None:
    if array.dtype.kind not in kinds or array.shape != shape:
        raise ValueError(
            f"{name} is {array.dtype} {array.shape}; it does not list the {shape[0]} stimuli that manifest.json counts"
        )


def _check_ids(name: str, ids: list[str]) -> None:
    for stimulus_id, count in Counter(ids).items():
        if count > 1:
            raise ValueError(f"{name}: stimulus {stimulus_id} is listed twice")
        if not is_name(stimulus_id):
            raise ValueError(f"{name}: stimulus id {stimulus_id[:100]!r} is not printable or too long")


def _with_all_members(index: SplitIndex) -> SplitIndex:
    """An index with a column for each of MEMBERS."""
    missing_columns = ((0, 0), (0, len(MEMBERS) - index.offset.shape[1]))
    return SplitIndex(
        index.stimulus_id,
        index.shard,
        np.pad(index.offset, missing_columns, constant_values=-1),
        np.pad(index.size, missing_columns),
        None if index.crc32 is None else np.pad(index.crc32, missing_columns),
        index.encoded_hash,
        index.pixel_hash,
    )
