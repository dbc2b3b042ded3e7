"""Writing, indexing, reading and verifying a shard folder.

A shard is a plain WebDataset tar. Beside the tars lies `index.npz`, which tells for every stimulus where in its tar
each member begins and how long it is, so that any stimulus can be read without scanning:

    members               (members,)     the extensions that occur: jpg, png, image.npy, rates.npy, trials.npy,
                                         truth.npy, json
    <split>.stimulus_id   (stimuli,)     ids in the order of the shards
    <split>.shard         (stimuli,)     position of its tar in the manifest's list for the split
    <split>.offset        (stimuli, members)   byte offset of the member's data in the tar, -1 where it is absent
    <split>.size          (stimuli, members)   bytes
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import BadInput
from data_prep.files import Files, LocalFiles, files_at
from data_prep.manifest import Manifest, Shard
from data_prep.recording import Stimulus
from data_prep.remote import FetchSettings, RemoteFiles, WrongBytes
from data_prep.targets import Targets, load_targets
from data_prep.url import FolderUrl, place_of

MEMBERS = ("jpg", "png", "rates.npy", "trials.npy", "truth.npy", "json", "image.npy")
IMAGE_MEMBERS = ("jpg", "png", "image.npy")


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


def write_shard(path: Path, stimuli: Iterable[Stimulus]) -> Shard:
    """Write one WebDataset tar; equal stimuli give equal bytes (owner and time are fixed).

    Args:
        path: of the tar.
        stimuli: in the order in which they are to lie in the tar.

    Returns:
        The shard's entry in the manifest.
    """
    import webdataset  # here, because it imports torch: a second that only those who write should pay

    file = _HashingFile(path)
    count = 0
    try:
        with webdataset.TarWriter(file, encoder=False, mtime=0, user="spiketune", group="spiketune") as writer:
            for stimulus in stimuli:
                writer.write(_members_of(stimulus))
                count += 1
    finally:
        file.close()
    return Shard(file=path.name, stimuli=count, bytes=file.bytes, sha256=file.sha256)


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


def index_shard(path: Path) -> SplitIndex:
    """Find every member of one tar by walking its headers.

    Raises:
        BadInput: a damaged tar, a member of a kind that is not plain data, or members of one stimulus that lie apart.
    """
    ids: list[str] = []
    places: list[dict[str, tuple[int, int]]] = []
    seen: set[str] = set()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                stimulus_id, _, kind = member.name.partition(".")
                if not member.isfile() or kind not in MEMBERS:
                    raise BadInput(f"{path}: {member.name}: not a member of plain data ({', '.join(MEMBERS)})")
                if not ids or ids[-1] != stimulus_id:
                    if stimulus_id in seen:
                        raise BadInput(f"{path}: {stimulus_id}: twice in the tar, or its members do not lie together")
                    ids.append(stimulus_id)
                    seen.add(stimulus_id)
                    places.append({})
                places[-1][kind] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise BadInput(f"{path} is not a whole tar file ({error}); pack or copy it again") from None
    absent = (-1, 0)
    table = np.array([[place.get(kind, absent) for kind in MEMBERS] for place in places], dtype=np.int64)
    table = table.reshape(len(ids), len(MEMBERS), 2)
    return SplitIndex(np.array(ids), np.zeros(len(ids), np.int32), table[..., 0], table[..., 1])


def index_split(folder: Path, shards: Iterable[Shard]) -> SplitIndex:
    """Index the tars of one split and join the tables."""
    parts = [index_shard(folder / shard.file) for shard in shards]
    return SplitIndex(
        stimulus_id=np.concatenate([part.stimulus_id for part in parts]),
        shard=np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.shard) for part in parts]),
        offset=np.concatenate([part.offset for part in parts]),
        size=np.concatenate([part.size for part in parts]),
    )


def write_index(folder: Path, manifest: Manifest) -> None:
    """Write `index.npz` for the tars that the manifest lists."""
    arrays: dict[str, np.ndarray] = {"members": np.array(MEMBERS)}
    for name, split in manifest.splits.items():
        index = index_split(folder, split.shards)
        arrays |= {f"{name}.{part}": getattr(index, part) for part in SplitIndex.__dataclass_fields__}
    np.savez(folder / "index.npz", **arrays)


def _load_index(folder: Path | FolderUrl, files: Files, manifest: Manifest) -> dict[str, SplitIndex]:
    path = folder / "index.npz"
    try:
        with files.table("index.npz", manifest) as file, np.load(file, allow_pickle=False) as arrays:
            members = tuple(arrays["members"])
            if members != MEMBERS[: len(members)]:  # those of older folders are fewer
                raise ValueError(f"it lists the members {', '.join(members)}")
            index = {
                name: _widened(**{part: arrays[f"{name}.{part}"] for part in SplitIndex.__dataclass_fields__})
                for name in manifest.splits
            }
    except BadInput:
        raise
    except Exception as error:  # numpy raises many kinds for a damaged file
        raise BadInput(f"{path} cannot be read ({error}); pack the recording again") from None
    for name, split in manifest.splits.items():
        counts = np.bincount(index[name].shard, minlength=len(split.shards)).tolist()
        if counts != [shard.stimuli for shard in split.shards]:
            raise BadInput(f"{path}: {name}: does not list the stimuli that manifest.json counts; pack again")
    return index


def _widened(stimulus_id: np.ndarray, shard: np.ndarray, offset: np.ndarray, size: np.ndarray) -> SplitIndex:
    """An index with a column for every member that there may be by now."""
    lacking = ((0, 0), (0, len(MEMBERS) - offset.shape[1]))
    return SplitIndex(
        stimulus_id, shard, np.pad(offset, lacking, constant_values=-1), np.pad(size, lacking, constant_values=0)
    )


# --------------------------------------------------------------------------------------------------------- reading


class ShardFolder:
    """An opened shard folder.

    Opening reads the manifest and the index. Of a folder of this machine it checks that every tar is there with the
    size the manifest gives; of a remote one, tars are fetched and verified when they are read.

    Args:
        folder: as written by data_prep/pack.py, or its URL.
        fetch: how remote shards are fetched and kept.

    Raises:
        BadInput: anything missing, damaged or contradictory that can be known without reading the tars.
    """

    def __init__(self, folder: Path | str | FolderUrl, fetch: FetchSettings | None = None):
        self.folder = place_of(folder)
        self._files = files_at(self.folder, fetch)
        self.manifest = self._files.manifest()
        self._files.check(self.manifest)
        self._index = _load_index(self.folder, self._files, self.manifest)
        self._targets: dict[str, Targets] = {}
        if self.is_remote and self.has_targets:
            table = self._files.table("targets.npz", self.manifest)
            self._targets = load_targets(table, str(self.folder / "targets.npz"), self.manifest)

    @property
    def is_remote(self) -> bool:
        """Whether its shards have to be fetched."""
        return isinstance(self._files, RemoteFiles)

    @property
    def has_targets(self) -> bool:
        """Whether the responses can be had without the shards."""
        return "targets.npz" in self.manifest.files

    def split(self, name: str) -> "ShardSplit":
        """One split for reading.

        Raises:
            BadInput: the folder has no such split.
        """
        if name not in self.manifest.splits:
            raise BadInput(f"{self.folder} has no split {name!r}; it has {', '.join(self.manifest.splits)}")
        return ShardSplit(self.folder, name, self.manifest, self._index[name], self._files, self._targets.get(name))

    def verify(self) -> Iterable[tuple[Shard, str | None]]:
        """Rehash every tar and index it anew; yield each shard with what is wrong with it, or None."""
        for name, split in self.manifest.splits.items():
            for number, shard in enumerate(split.shards):
                yield shard, self._fault(name, number, shard)

    def _fault(self, split: str, number: int, shard: Shard) -> str | None:
        try:
            with self._files.local(shard) as path:
                with path.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                        raise WrongBytes
                fresh = index_shard(path)
        except WrongBytes:
            return "its bytes are not those that were packed (sha256 differs)"
        stored = self._index[split]
        rows = stored.shard == number
        same = all(
            np.array_equal(getattr(stored, part)[rows], getattr(fresh, part))
            for part in ("stimulus_id", "offset", "size")
        )
        return None if same else "index.npz does not describe it"


class ShardSplit:
    """The stimuli of one split, readable in any order by position.

    Instances can be pickled or forked into worker processes.
    """

    def __init__(
        self,
        folder: Path | FolderUrl,
        name: str,
        manifest: Manifest,
        index: SplitIndex,
        files: LocalFiles | RemoteFiles,
        targets: Targets | None = None,
    ):
        self.folder = folder
        self.name = name
        self.manifest = manifest
        self.stimulus_ids: list[str] = index.stimulus_id.tolist()
        self.has_responses = manifest.splits[name].responses
        self._index = index
        self.files = files
        self.shards = manifest.splits[name].shards
        self._targets = targets

    def __len__(self) -> int:
        return len(self.stimulus_ids)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_targets": None}  # those who read pictures can do without

    def fingerprint(self, purpose: str) -> str:
        """A hash that changes when anything of the split may have changed, as 64 hexadecimal digits.

        Of files of this machine it takes in which they are and when they were last written, so that a damaged copy
        differs as well.

        Args:
            purpose: what it is for; it is hashed too.
        """
        known = [self.files.state(shard) for shard in self.shards]
        found = hashlib.sha256(json.dumps([purpose, self.name, known]).encode())
        for part in (self._index.shard, self._index.offset, self._index.size):
            found.update(np.ascontiguousarray(part))
        return found.hexdigest()

    def member(self, position: int, kind: str) -> bytes | None:
        """A member's bytes, one of MEMBERS; None where the stimulus lacks it."""
        if kind == "json" and self._targets is not None:
            return self._targets.meta(position)
        view = self._view(position, kind)
        return None if view is None else bytes(view)

    def _view(self, position: int, kind: str) -> memoryview | None:
        column = MEMBERS.index(kind)
        offset, size = int(self._index.offset[position, column]), int(self._index.size[position, column])
        if offset < 0:
            return None
        return self.files.member(self.shards[int(self._index.shard[position])], offset, size)

    @property
    def is_remote(self) -> bool:
        """Whether its shards have to be fetched."""
        return isinstance(self.files, RemoteFiles)

    def shards_of(self, positions: np.ndarray) -> np.ndarray:
        """The numbers of the tars that stimuli lie in, int32."""
        return self._index.shard[positions]

    def place(self, position: int) -> str:
        """Where a stimulus lies, for messages: the tar and the id."""
        return f"{self.folder / self.shards[int(self._index.shard[position])].file}: {self.stimulus_ids[position]}"

    def image(self, position: int) -> tuple[memoryview, str]:
        """The encoded picture, as a view of the tar without a copy, and its encoding, one of IMAGE_MEMBERS."""
        for kind in IMAGE_MEMBERS:
            if (data := self._view(position, kind)) is not None:
                return data, kind
        raise BadInput(f"{self.place(position)} has no picture ({' or '.join(IMAGE_MEMBERS)})")

    def meta(self, position: int) -> dict[str, Any]:
        """The stimulus's JSON member."""
        try:
            return json.loads(self.member(position, "json") or b"{}")
        except ValueError as error:
            raise BadInput(f"{self.place(position)}.json is not readable as JSON ({error})") from None

    def array(self, position: int, kind: str) -> np.ndarray | None:
        """A float32 array member: "rates.npy" (sites,), "trials.npy" (repetitions, sites) or "truth.npy" (sites,).

        Raises:
            BadInput: an array of another type or for another number of sites.
        """
        data = self.member(position, kind)
        if data is None:
            return None
        try:
            array = np.load(io.BytesIO(data), allow_pickle=False)
        except ValueError as error:
            raise BadInput(f"{self.place(position)}.{kind} is not a plain npy array ({error})") from None
        sites = len(self.manifest.sites)
        if array.dtype != np.float32 or array.shape[-1:] != (sites,) or array.ndim != (2 if "trials" in kind else 1):
            raise BadInput(
                f"{self.place(position)}.{kind} holds {array.dtype} of shape {array.shape}; "
                f"it must be float32 for {sites} sites"
            )
        return array

    def rates(self) -> np.ndarray:
        """All trial-averaged responses: float32 (stimuli, sites), NaN = not recorded.

        Raises:
            BadInput: the split has no responses, or a stimulus of it has none, or one is infinite.
        """
        if not self.has_responses:
            raise BadInput(f"{self.folder}: the split {self.name!r} has no responses (rates.npy)")
        rates = self._rates_of_shards() if self._targets is None else self._targets.rates
        if (wrong := np.flatnonzero(np.isinf(rates).any(axis=1))).size:
            raise BadInput(f"{self.place(int(wrong[0]))}.rates.npy holds an infinite rate")
        return rates

    def _rates_of_shards(self) -> np.ndarray:
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
            name = self.meta(position).get("object")
            if name not in position_of:
                raise BadInput(f"{self.place(position)}.json: object {name!r} is not among the manifest's classes")
            labels[position] = position_of[name]
        return labels
