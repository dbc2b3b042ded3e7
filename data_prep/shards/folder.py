"""Writing, reading and verifying a shard folder.

A shard is a plain WebDataset tar. Beside the tars lies `index.npz` (data_prep/shards/index.py), so any stimulus can
be read without scanning.
"""

import hashlib
import io
import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common.errors import BadInput, CannotWrite
from data_prep.recording import Stimulus
from data_prep.remote.url import FolderUrl, place_of
from data_prep.shards.files import LocalFiles, files_at
from data_prep.shards.foreign_tars import is_foreign, open_foreign
from data_prep.shards.index import SplitIndex, index_shard, load_index, write_index
from data_prep.shards.manifest import Manifest, Shard, load_manifest
from data_prep.shards.members import ABSENT, BLOCK, IMAGE_MEMBERS, MEMBERS, read_array, read_json, read_label
from data_prep.shards.remote_files import FetchSettings, RemoteFiles, WrongBytes
from data_prep.shards.response_table import Targets, load_targets, write_targets

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


def write_shard(path: Path, stimuli: Iterable[Stimulus]) -> tuple[Shard, SplitIndex]:
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
    sums: list[list[int]] = []
    try:
        with webdataset.TarWriter(file, encoder=False, mtime=0, user="spiketune", group="spiketune") as writer:
            for stimulus in stimuli:
                members, start = _members_of(stimulus), writer.tarstream.offset
                writer.write(members)
                ids.append(stimulus.id)
                places.append(_places(members, start, writer.tarstream.offset))
                sums.append([zlib.crc32(members.get(kind, b"")) for kind in MEMBERS])  # of nothing: 0
    finally:
        file.close()
    if None in places:
        index = index_shard(path)
    else:
        index = SplitIndex.of_tar(ids, np.array(places, np.int64), np.array(sums, np.uint32))
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


# --------------------------------------------------------------------------------------------------------- reading


class ShardFolder:
    """An opened shard folder.

    Opening reads the manifest and the index. Of a folder of this machine it checks that every tar is there with the
    size the manifest gives; of a remote one, tars are fetched and verified when they are read. Of a folder of tars
    without a manifest both are derived, see data_prep/shards/foreign_tars.py.

    Args:
        folder: as written by data_prep/pack.py, or its URL, or with tars that others wrote.
        fetch: how remote shards are fetched and kept.

    Raises:
        BadInput: anything missing, damaged or contradictory that can be known without reading the tars.
    """

    def __init__(self, folder: Path | str | FolderUrl, fetch: FetchSettings | None = None):
        self.folder = place_of(folder)
        self._files = files_at(self.folder, fetch)
        self._targets: dict[str, Targets] = {}
        if isinstance(self.folder, Path) and is_foreign(self.folder):
            self.manifest, self._index = open_foreign(self.folder)
            return
        self.manifest = self._files.manifest()
        self._files.check(self.manifest)
        self._index = load_index(self.folder, self._files, self.manifest)
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
            for part in ("stimulus_id", "offset", "size", *(["crc32"] if stored.crc32 is not None else []))
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
        return self.__dict__ | {"_targets": None}  # those who read images can do without

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
        data = self.files.member(self.shards[int(self._index.shard[position])], offset, size)
        self.check_bytes(position, kind, data)
        return data

    def check_bytes(self, position: int, kind: str, data: bytes | memoryview) -> None:
        """Refuse a member's bytes that are not those that were indexed.

        Raises:
            BadInput: they differ, naming the stimulus and the member.
        """
        known = self._index.crc32
        if known is not None and zlib.crc32(data) != known[position, MEMBERS.index(kind)]:
            raise BadInput(
                f"{self.place(position)}.{kind}: these are not the bytes that were packed (the checksum in index.npz "
                "differs): the tar is damaged or newer than its index; copy the folder again, or pack it again"
            )

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
        """The encoded image, as a view of the tar without a copy, and its encoding, one of IMAGE_MEMBERS."""
        for kind in IMAGE_MEMBERS:
            if (data := self._view(position, kind)) is not None:
                return data, kind
        raise BadInput(f"{self.place(position)} has no image ({' or '.join(IMAGE_MEMBERS)})")

    def meta(self, position: int) -> dict[str, Any]:
        """The stimulus's JSON member; empty where it has none."""
        return read_json(self.member(position, "json"), self.place(position))

    def label(self, position: int) -> str | None:
        """The class of the stimulus, by name; None where nothing tells."""
        return read_label(self.member(position, "cls"), self.meta(position), self.place(position))

    def array(self, position: int, kind: str) -> np.ndarray | None:
        """A float32 array member: "rates.npy" (sites,), "trials.npy" (repetitions, sites) or "truth.npy" (sites,).

        Raises:
            BadInput: no plain array of numbers, or one for another number of sites.
        """
        data = self.member(position, kind)
        return None if data is None else self._array(data, position, kind)

    def _array(self, data: bytes, position: int, kind: str) -> np.ndarray:
        place = f"{self.place(position)}.{kind}"
        array, sites = read_array(data, place), len(self.manifest.sites)
        if array.shape[-1:] != (sites,) or array.ndim != (2 if "trials" in kind else 1):
            raise BadInput(f"{place} has the shape {array.shape}; it must be for {sites} sites")
        return array

    def rates(self, positions: np.ndarray | None = None) -> np.ndarray:
        """Trial-averaged responses: float32 (stimuli, sites), NaN = not recorded.

        Args:
            positions: of the stimuli; by default all.

        Raises:
            BadInput: the split has no responses, or a stimulus of it has none.
        """
        if not self.has_responses:
            raise BadInput(f"{self.folder}: the split {self.name!r} has no responses (rates.npy)")
        wanted = np.arange(len(self)) if positions is None else positions
        return self._rates_of_shards(wanted) if self._targets is None else self._targets.rates[wanted]

    def _rates_of_shards(self, positions: np.ndarray) -> np.ndarray:
        rates = np.empty((len(positions), len(self.manifest.sites)), np.float32)
        for place, position in enumerate(positions.tolist()):
            row = self.array(position, "rates.npy")
            if row is None:
                raise BadInput(f"{self.place(position)} has no rates.npy, though the split {self.name!r} has responses")
            rates[place] = row
        return rates

    @property
    def image_sizes(self) -> np.ndarray:
        """The bytes of each encoded image, int64 (stimuli,)."""
        return self._index.size[:, [MEMBERS.index(kind) for kind in IMAGE_MEMBERS]].max(axis=1)

    @property
    def trials_bytes(self) -> int:
        """How large the single trials are; 0 where there are none."""
        return int(self._index.size[:, MEMBERS.index("trials.npy")].sum())

    def trials(self, sites: slice = slice(None)) -> np.ndarray | None:
        """The single trials of all stimuli: float32 (stimuli, repetitions, sites), padded with NaN.

        Args:
            sites: read these only; never more than they take is held.

        Returns:
            the trials, or None where there are none.
        """
        parts = self._trials_of_stimuli(sites)
        depth = max((len(part) for part in parts if part is not None), default=0)
        if depth == 0:
            return None
        trials = np.full((len(self), depth, len(self.manifest.sites[sites])), np.nan, np.float32)
        for position, part in enumerate(parts):
            if part is not None:
                trials[position, : len(part)] = part
        return trials

    def _trials_of_stimuli(self, sites: slice) -> list[np.ndarray | None]:
        """float32 (repetitions, sites) of each stimulus, None where it has none.

        Tars are read here, not mapped: the pages of a mapped file count as this process's memory.
        """
        column, found = MEMBERS.index("trials.npy"), [None] * len(self)
        for number in np.unique(self._index.shard[self._index.offset[:, column] >= 0]):
            with self.files.local(self.shards[number]) as path, path.open("rb") as tar:
                for position in np.flatnonzero(self._index.shard == number):
                    offset, size = int(self._index.offset[position, column]), int(self._index.size[position, column])
                    if offset >= 0:
                        tar.seek(offset)
                        found[position] = self._array(tar.read(size), position, "trials.npy")[:, sites].copy()
        return found

    def labels(self, positions: np.ndarray | None = None) -> np.ndarray:
        """The class of stimuli, int64 (stimuli,): its position in the manifest's `classes`.

        Args:
            positions: of the stimuli; by default all.

        Raises:
            BadInput: the recording has no classes, or a stimulus shows an object that is not among them.
        """
        if self.manifest.classes is None:
            raise BadInput(f"{self.folder}: manifest.json has no classes, so the stimuli have no labels")
        position_of = {name: position for position, name in enumerate(self.manifest.classes)}
        wanted = range(len(self)) if positions is None else positions.tolist()
        labels = np.empty(len(wanted), np.int64)
        for place, position in enumerate(wanted):
            name = self.label(position)
            if name not in position_of:
                raise BadInput(f"{self.place(position)}: object {name!r} is not among the manifest's classes")
            labels[place] = position_of[name]
        return labels


def reindex(place: Path | str | FolderUrl) -> None:
    """Read the tars of a folder anew and write its tables, whoever wrote the tars.

    Of a packed folder that is index.npz, targets.npz, and what the manifest says of both.

    Raises:
        BadInput: a damaged tar, a folder that is neither packed nor holds tars, that cannot be written, or a URL.
    """
    folder = place_of(place)
    if isinstance(folder, FolderUrl):
        raise BadInput(f"{folder}: tars are indexed where they lie; use --index there and copy the folder again")
    if is_foreign(folder):
        open_foreign(folder, anew=True)
        return
    manifest = load_manifest(folder)
    manifest.files = {}
    LocalFiles(folder).check(manifest)
    for split in manifest.splits.values():
        for shard in split.shards:
            _check_sum(folder / shard.file, shard)
    index = {
        name: SplitIndex.joined([index_shard(folder / shard.file) for shard in split.shards])
        for name, split in manifest.splits.items()
    }
    try:
        write_index(folder, index)
        manifest.save(folder / "manifest.json")  # or it would know the index that was there before
        manifest.files = write_targets(folder, ShardFolder(folder))
        manifest.save(folder / "manifest.json")
    except CannotWrite as error:
        raise BadInput(str(error)) from None


def _check_sum(path: Path, shard: Shard) -> None:
    """Refuse to index bytes that were not packed: an index would make damage pass as data."""
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            raise BadInput(f"{path}: its bytes are not those that were packed (sha256 differs); copy or pack it again")
