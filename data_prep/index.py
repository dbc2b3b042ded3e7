"""index.npz: where in its tar each member of each stimulus lies.

Any stimulus can be read without scanning:

    members               (members,)     the extensions that may occur: MEMBERS in data_prep/members.py
    <split>.stimulus_id   (stimuli,)     ids in the order of the shards
    <split>.shard         (stimuli,)     position of its tar in the manifest's list for the split
    <split>.offset        (stimuli, members)   byte offset of the member's data in the tar, -1 where it is absent
    <split>.size          (stimuli, members)   bytes
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.errors import BadInput
from data_prep.files import Files
from data_prep.manifest import Manifest
from data_prep.members import MEMBERS, member_table
from data_prep.url import FolderUrl
from data_prep.writing import write_arrays


@dataclass(frozen=True)
class SplitIndex:
    """Where the members of a split's stimuli lie; the arrays are described at the top of this file."""

    stimulus_id: np.ndarray
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray

    @classmethod
    def of_tar(cls, ids: list[str], places: np.ndarray) -> "SplitIndex":
        """The index of one tar, from offset and size of each member: int64 (stimuli, members, 2)."""
        places = places.reshape(len(ids), len(MEMBERS), 2)
        return cls(np.array(ids), np.zeros(len(ids), np.int32), places[..., 0], places[..., 1])

    @classmethod
    def joined(cls, tars: "Sequence[SplitIndex]") -> "SplitIndex":
        """The index of a split, from those of its tars."""
        return cls(
            stimulus_id=np.concatenate([tar.stimulus_id for tar in tars]),
            shard=np.repeat(np.arange(len(tars), dtype=np.int32), [len(tar.shard) for tar in tars]),
            offset=np.concatenate([tar.offset for tar in tars]),
            size=np.concatenate([tar.size for tar in tars]),
        )


def index_shard(path: Path) -> SplitIndex:
    """Find every member of one tar.

    Raises:
        BadInput: as `member_table`.
    """
    return SplitIndex.of_tar(*member_table(path))


def write_index(folder: Path, splits: Mapping[str, SplitIndex]) -> None:
    """Write `index.npz`.

    Raises:
        OSError: the folder cannot be written.
    """
    arrays: dict[str, np.ndarray] = {"members": np.array(MEMBERS)}
    for name, index in splits.items():
        arrays |= {f"{name}.{part}": getattr(index, part) for part in SplitIndex.__dataclass_fields__}
    write_arrays(folder / "index.npz", arrays)


def load_index(folder: Path | FolderUrl, files: Files, manifest: Manifest) -> dict[str, SplitIndex]:
    """The index of a packed folder, by split.

    Args:
        folder: that it describes, for messages.
        files: of the folder.
        manifest: of the folder.

    Raises:
        BadInput: it is missing, damaged, or of other shards.
    """
    path = folder / "index.npz"
    try:
        with files.table("index.npz", manifest) as file, np.load(file, allow_pickle=False) as arrays:
            index = index_of(arrays, manifest)
    except BadInput:
        raise
    except Exception as error:  # numpy raises many kinds for a damaged file
        raise BadInput(
            f"{path} cannot be read ({error}); data_prep/show.py with --index makes it anew where the tars lie"
        ) from None
    for name, split in manifest.splits.items():
        counts = np.bincount(index[name].shard, minlength=len(split.shards)).tolist()
        if counts != [shard.stimuli for shard in split.shards]:
            raise BadInput(f"{path}: {name}: does not list the stimuli that manifest.json counts; pack again")
    return index


def index_of(arrays: Mapping[str, np.ndarray], manifest: Manifest) -> dict[str, SplitIndex]:
    """The index by split, from its arrays.

    Raises:
        ValueError: it lists members that there are not.
        KeyError: an array is missing.
    """
    members = tuple(arrays["members"])
    if members != MEMBERS[: len(members)]:  # those of older folders are fewer
        raise ValueError(f"it lists the members {', '.join(members)}")
    return {
        name: _widened(**{part: arrays[f"{name}.{part}"] for part in SplitIndex.__dataclass_fields__})
        for name in manifest.splits
    }


def _widened(stimulus_id: np.ndarray, shard: np.ndarray, offset: np.ndarray, size: np.ndarray) -> SplitIndex:
    """An index with a column for every member that there may be by now."""
    lacking = ((0, 0), (0, len(MEMBERS) - offset.shape[1]))
    return SplitIndex(
        stimulus_id, shard, np.pad(offset, lacking, constant_values=-1), np.pad(size, lacking, constant_values=0)
    )
