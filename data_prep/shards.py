"""Writing, indexing, reading and verifying a shard folder.

A shard is a plain WebDataset tar. Beside the tars lies `index.npz`, which tells for every stimulus where in its tar
each member begins and how long it is, so that any stimulus can be read without scanning:

    members               (members,)     the extensions that may occur: MEMBERS in data_prep/members.py
    <split>.stimulus_id   (stimuli,)     ids in the order of the shards
    <split>.shard         (stimuli,)     position of its tar in the manifest's list for the split
    <split>.offset        (stimuli, members)   byte offset of the member's data in the tar, -1 where it is absent
    <split>.size          (stimuli, members)   bytes
"""

import hashlib
import io
import json
import mmap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import BadInput
from data_prep.foreign import is_foreign, open_foreign
from data_prep.manifest import Manifest, Shard, load_manifest
from data_prep.members import ABSENT, BLOCK, IMAGE_MEMBERS, MEMBERS, member_table, read_array, read_json, read_label
from data_prep.recording import Stimulus
from data_prep.writing import write_whole

# --------------------------------------------------------------------------------------------------------- writing


class _HashingFile:
    """A file for writing that hashes and counts what passes through, so that a shard is never read again for it."""

    def __init__(self, path: Path):
        self._file = path.open("wb")
        self._hash = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self.bytes += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


def write_shard(path: Path, stimuli: Iterable[Stimulus]) -> "tuple[Shard, SplitIndex]":
    """Write one WebDataset tar; equal stimuli give equal bytes (owner and time are fixed).

    Args:
        path: of the tar.
        stimuli: in the order in which they are to lie in the tar.

    Returns:
        The shard's entry in the manifest, and its index.
    """
    import webdataset  # here, because it imports torch: a second that only those who write should pay

    file = _HashingFile(path)
    ids: list[str] = []
    places: list[list[tuple[int, int]] | None] = []
    try:
        with webdataset.TarWriter(file, encoder=False, mtime=0, user="spiketune", group="spiketune") as writer:
            for stimulus in stimuli:
                members, start = _members_of(stimulus), writer.tarstream.offset
                writer.write(members)
                ids.append(stimulus.id)
                places.append(_places(members, start, writer.tarstream.offset))
    finally:
        file.close()
    index = index_shard(path) if None in places else SplitIndex.of_tar(ids, np.array(places, dtype=np.int64))
    return Shard(file=path.name, stimuli=len(ids), bytes=file.bytes, sha256=file.sha256), index


def _places(members: dict[str, Any], start: int, end: int) -> list[tuple[int, int]] | None:
    """Offset and size of each of MEMBERS in a tar where these were written from `start` to `end`.

    The writer puts them in alphabetical order, each behind a header of one block and filled up to whole blocks. None
    where that does not lead to `end`: a name that is too long for one block gets several.
    """
    found, offset = {}, start
    for kind in sorted(members.keys() - {"__key__"}):
        size = len(members[kind])
        found[kind] = (offset + BLOCK, size)
        offset += BLOCK + -(-size // BLOCK) * BLOCK
    return None if offset != end else [found.get(kind, ABSENT) for kind in MEMBERS]


def _members_of(stimulus: Stimulus) -> dict[str, Any]:
    members: dict[str, Any] = {"__key__": stimulus.id, stimulus.encoding: stimulus.image}
    arrays = {"rates.npy": stimulus.rates, "trials.npy": stimulus.trials, "truth.npy": stimulus.truth}
    members |= {name: _npy_bytes(array) for name, array in arrays.items() if array is not None}
    members["json"] = json.dumps(stimulus.meta, sort_keys=True, allow_nan=False).encode()
    return members


def _npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array, dtype=np.float32), allow_pickle=False)
    return buffer.getvalue()


# -------------------------------------------------------------------------------------------------------- indexing


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
        BadInput: the folder cannot be written.
    """
    arrays: dict[str, np.ndarray] = {"members": np.array(MEMBERS)}
    for name, index in splits.items():
        arrays |= {f"{name}.{part}": getattr(index, part) for part in SplitIndex.__dataclass_fields__}
    content = io.BytesIO()
    np.savez(content, **arrays)
    try:
        write_whole(folder / "index.npz", content.getvalue())
    except OSError as error:
        raise BadInput(f"{folder / 'index.npz'} cannot be written ({error.strerror})") from None


def reindex(folder: Path) -> None:
    """Read the tars of a folder anew and write its index, whoever wrote the tars.

    Raises:
        BadInput: a damaged tar, or a folder that is neither packed nor holds tars.
    """
    if is_foreign(folder):
        open_foreign(folder, anew=True)
    else:
        splits = load_manifest(folder).splits.items()
        write_index(
            folder,
            {
                name: SplitIndex.joined([index_shard(folder / shard.file) for shard in split.shards])
                for name, split in splits
            },
        )


def _load_index(folder: Path, manifest: Manifest) -> dict[str, SplitIndex]:
    path = folder / "index.npz"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            index = _index_of(arrays, manifest)
    except FileNotFoundError:
        raise BadInput(f"{folder} has no index.npz; data_prep/show.py {folder} --index makes one") from None
    except Exception as error:  # numpy raises many kinds for a damaged file
        raise BadInput(f"{path} cannot be read ({error}); data_prep/show.py {folder} --index makes it anew") from None
    for name, split in manifest.splits.items():
        counts = np.bincount(index[name].shard, minlength=len(split.shards)).tolist()
        if counts != [shard.stimuli for shard in split.shards]:
            raise BadInput(f"{path}: {name}: does not list the stimuli that manifest.json counts; pack again")
    return index


def _index_of(arrays: Mapping[str, np.ndarray], manifest: Manifest) -> dict[str, SplitIndex]:
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


# --------------------------------------------------------------------------------------------------------- reading


class ShardFolder:
    """An opened shard folder.

    Opening reads the manifest and the index and checks that every tar is there with the size the manifest gives. Of a
    folder of tars without a manifest both are derived, see data_prep/foreign.py.

    Args:
        folder: as written by data_prep/pack.py, or with tars that others wrote.

    Raises:
        BadInput: anything missing, damaged or contradictory that can be known without reading the tars.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        if is_foreign(self.folder):
            self.manifest, arrays = open_foreign(self.folder)
            self._index = _index_of(arrays, self.manifest)
        else:
            self.manifest = load_manifest(self.folder)
            self._check_files()
            self._index = _load_index(self.folder, self.manifest)

    def _check_files(self) -> None:
        for split in self.manifest.splits.values():
            for shard in split.shards:
                path = self.folder / shard.file
                if not path.is_file():
                    raise BadInput(f"{path} is missing, though manifest.json lists it; copy or pack the folder again")
                if (size := path.stat().st_size) != shard.bytes:
                    raise BadInput(f"{path} has {size} bytes, manifest.json says {shard.bytes}; copy or pack it again")

    def split(self, name: str) -> "ShardSplit":
        """One split for reading.

        Raises:
            BadInput: the folder has no such split.
        """
        if name not in self.manifest.splits:
            raise BadInput(f"{self.folder} has no split {name!r}; it has {', '.join(self.manifest.splits)}")
        return ShardSplit(self.folder, name, self.manifest, self._index[name])

    def verify(self) -> Iterable[tuple[Shard, str | None]]:
        """Rehash every tar and index it anew; yield each shard with what is wrong with it, or None."""
        for name, split in self.manifest.splits.items():
            for number, shard in enumerate(split.shards):
                yield shard, self._fault(name, number, shard)

    def _fault(self, split: str, number: int, shard: Shard) -> str | None:
        path = self.folder / shard.file
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                return "its bytes are not those that were packed (sha256 differs)"
        stored, fresh = self._index[split], index_shard(path)
        rows = stored.shard == number
        same = all(
            np.array_equal(getattr(stored, part)[rows], getattr(fresh, part))
            for part in ("stimulus_id", "offset", "size")
        )
        return None if same else "index.npz does not describe it"


class ShardSplit:
    """The stimuli of one split, readable in any order by position.

    Instances can be pickled or forked into worker processes; each opens its own memory maps.
    """

    def __init__(self, folder: Path, name: str, manifest: Manifest, index: SplitIndex):
        self.folder = folder
        self.name = name
        self.manifest = manifest
        self.stimulus_ids: list[str] = index.stimulus_id.tolist()
        self.has_responses = manifest.splits[name].responses
        self._index = index
        self._files = [shard.file for shard in manifest.splits[name].shards]
        self._maps: dict[int, memoryview] = {}

    def __len__(self) -> int:
        return len(self.stimulus_ids)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}

    @property
    def tars(self) -> list[Path]:
        """Where the stimuli lie, in the order of the manifest."""
        return [self.folder / file for file in self._files]

    def fingerprint(self, purpose: str) -> str:
        """A hash that changes when anything of the split may have changed, as 64 hexadecimal digits.

        It takes in which files they are and when they were last written, so that a damaged copy differs as well.

        Args:
            purpose: what it is for; it is hashed too.
        """
        files = [self.folder.resolve() / file for file in self._files]
        shards = self.manifest.splits[self.name].shards
        known = [[str(path), path.stat().st_mtime_ns, shard.sha256] for path, shard in zip(files, shards, strict=True)]
        found = hashlib.sha256(json.dumps([purpose, self.name, known]).encode())
        for part in (self._index.shard, self._index.offset, self._index.size):
            found.update(np.ascontiguousarray(part))
        return found.hexdigest()

    def _view(self, position: int, kind: str) -> memoryview | None:
        column = MEMBERS.index(kind)
        offset, size = int(self._index.offset[position, column]), int(self._index.size[position, column])
        if offset < 0:
            return None
        shard = int(self._index.shard[position])
        if shard not in self._maps:
            with (self.folder / self._files[shard]).open("rb") as file:
                self._maps[shard] = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return self._maps[shard][offset : offset + size]

    def place(self, position: int) -> str:
        """Where a stimulus lies, for messages: the tar and the id."""
        return f"{self.folder / self._files[int(self._index.shard[position])]}: {self.stimulus_ids[position]}"

    def image(self, position: int) -> tuple[memoryview, str]:
        """The encoded picture, as a view of the tar without a copy, and its encoding, one of IMAGE_MEMBERS."""
        for kind in IMAGE_MEMBERS:
            if (data := self._view(position, kind)) is not None:
                return data, kind
        raise BadInput(f"{self.place(position)} has no picture ({' or '.join(IMAGE_MEMBERS)})")

    def meta(self, position: int) -> dict[str, Any]:
        """The stimulus's JSON member; empty where it has none."""
        return read_json(self._view(position, "json"), self.place(position))

    def label(self, position: int) -> str | None:
        """The class of the stimulus, by name; None where nothing tells."""
        place = self.place(position)
        return read_label(self._view(position, "cls"), self.meta(position), place)

    def array(self, position: int, kind: str) -> np.ndarray | None:
        """A float32 array member: "rates.npy" (sites,), "trials.npy" (repetitions, sites) or "truth.npy" (sites,).

        Raises:
            BadInput: no plain array of numbers, or one for another number of sites.
        """
        data = self._view(position, kind)
        if data is None:
            return None
        place = f"{self.place(position)}.{kind}"
        array, sites = read_array(data, place), len(self.manifest.sites)
        if array.shape[-1:] != (sites,) or array.ndim != (2 if "trials" in kind else 1):
            raise BadInput(f"{place} has the shape {array.shape}; it must be for {sites} sites")
        return array

    def rates(self) -> np.ndarray:
        """All trial-averaged responses: float32 (stimuli, sites), NaN = not recorded.

        Raises:
            BadInput: the split has no responses, or a stimulus of it has none.
        """
        if not self.has_responses:
            raise BadInput(f"{self.folder}: the split {self.name!r} has no responses (rates.npy)")
        rates = np.empty((len(self), len(self.manifest.sites)), np.float32)
        for position in range(len(self)):
            row = self.array(position, "rates.npy")
            if row is None:
                raise BadInput(f"{self.place(position)} has no rates.npy, though the split {self.name!r} has responses")
            rates[position] = row
        return rates

    def trials(self) -> np.ndarray | None:
        """All single trials: float32 (stimuli, repetitions, sites), padded with NaN; None where there are none."""
        parts = [self.array(position, "trials.npy") for position in range(len(self))]
        depth = max((len(part) for part in parts if part is not None), default=0)
        if depth == 0:
            return None
        trials = np.full((len(self), depth, len(self.manifest.sites)), np.nan, np.float32)
        for position, part in enumerate(parts):
            if part is not None:
                trials[position, : len(part)] = part
        return trials

    def labels(self) -> np.ndarray:
        """The class of each stimulus, int64 (stimuli,): its position in the manifest's `classes`.

        Raises:
            BadInput: the recording has no classes, or a stimulus shows an object that is not among them.
        """
        if self.manifest.classes is None:
            raise BadInput(f"{self.folder}: manifest.json has no classes, so the stimuli have no labels")
        position_of = {name: position for position, name in enumerate(self.manifest.classes)}
        labels = np.empty(len(self), np.int64)
        for position in range(len(self)):
            name = self.label(position)
            if name not in position_of:
                raise BadInput(f"{self.place(position)}: object {name!r} is not among the manifest's classes")
            labels[position] = position_of[name]
        return labels
