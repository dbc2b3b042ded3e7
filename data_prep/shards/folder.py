"""Opening, reading and verifying a shard folder.

A shard is a plain WebDataset tar. With the `index.npz` beside the tars (data_prep/shards/index.py), any stimulus can be
read without scanning.
"""

import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common.errors import BadInput
from data_prep.common.image_decoding import decode
from data_prep.remote.cache import FetchSettings
from data_prep.remote.url import FolderUrl, parse_location
from data_prep.shards import response_table
from data_prep.shards.foreign_tars import is_foreign, open_foreign
from data_prep.shards.index import SplitIndex, index_shard, load_index
from data_prep.shards.manifest import Manifest, Shard
from data_prep.shards.members import IMAGE_MEMBERS, MEMBERS, read_array, read_json, read_label
from data_prep.shards.remote_files import RemoteFiles, WrongBytes
from data_prep.shards.response_table import ResponseTable, load_response_table
from data_prep.shards.storage import LocalFiles, open_files


class ShardFolder:
    """An opened shard folder.

    Opening reads the manifest and the index. In a local folder it checks that every tar exists and has the size that
    the manifest gives; remote tars are fetched and verified when they are read. For a folder of tars without a
    manifest both are derived, see data_prep/shards/foreign_tars.py.

    Args:
        folder: as written by data_prep/pack.py, or its URL, or a local folder of foreign tars.
        fetch: how remote shards are fetched and kept.

    Raises:
        BadInput: anything missing, damaged or contradictory that shows without reading the tars.
    """

    def __init__(self, folder: Path | str | FolderUrl, fetch: FetchSettings | None = None):
        self.folder = parse_location(folder)
        self._files = open_files(self.folder, fetch)
        self._response_tables: dict[str, ResponseTable] = {}
        if isinstance(self.folder, Path) and is_foreign(self.folder):
            self.manifest, self._index = open_foreign(self.folder)
            return
        self.manifest = self._files.manifest()
        self._files.check(self.manifest)
        self._index = load_index(self.folder, self._files, self.manifest)
        if self.is_remote and self.has_response_table:
            path = str(self.folder / response_table.FILE)
            with self._files.table(response_table.FILE, self.manifest) as file:
                self._response_tables = load_response_table(file, path, self.manifest)

    @property
    def is_remote(self) -> bool:
        """Whether its shards must be fetched."""
        return isinstance(self._files, RemoteFiles)

    @property
    def has_response_table(self) -> bool:
        """Whether the responses can be read without the shards."""
        return response_table.FILE in self.manifest.files

    def split(self, name: str) -> "ShardSplit":
        """One split for reading.

        Raises:
            BadInput: the folder has no such split.
        """
        if name not in self.manifest.splits:
            raise BadInput(f"{self.folder} has no split {name!r}; it has {', '.join(self.manifest.splits)}")
        return ShardSplit(
            self.folder, name, self.manifest, self._index[name], self._files, self._response_tables.get(name)
        )

    def verify(self) -> Iterator[tuple[Shard, str | None]]:
        """Rehash and index every tar and decode its images; yield each shard with its fault, or None."""
        for name, split in self.manifest.splits.items():
            for number, shard in enumerate(split.shards):
                yield shard, self._fault(name, number, shard)

    def _fault(self, split: str, number: int, shard: Shard) -> str | None:
        try:
            with self._files.local(shard) as path:
                with path.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                        raise WrongBytes
                tar_index = index_shard(path)
            if not self._index[split].describes(number, tar_index):
                return "index.npz does not describe it"
            return self._damaged_image(split, number)
        except WrongBytes:
            return "its bytes are not those that were packed (its sha256 differs)"

    def _damaged_image(self, split: str, number: int) -> str | None:
        """The first image of a shard that cannot be decoded, and why."""
        opened = self.split(split)
        for position in np.flatnonzero(opened.shards_of(np.arange(len(opened))) == number).tolist():
            data, encoding = opened.image(position)
            try:
                decode(data, encoding)
            except ValueError as error:
                return f"the image of {opened.stimulus_ids[position]} cannot be decoded ({error})"
        return None


class ShardSplit:
    """The stimuli of one split, readable in any order by position.

    Instances can be pickled or forked into worker processes.

    Args:
        folder: of the shards.
        name: of the split.
        manifest: of the folder.
        index: of the split.
        files: of the folder.
        table: the responses, if they are read from a table rather than from the shards.
    """

    def __init__(
        self,
        folder: Path | FolderUrl,
        name: str,
        manifest: Manifest,
        index: SplitIndex,
        files: LocalFiles | RemoteFiles,
        table: ResponseTable | None = None,
    ):
        self.folder = folder
        self.name = name
        self.manifest = manifest
        self.stimulus_ids: list[str] = index.stimulus_id.tolist()
        self.has_responses = manifest.splits[name].responses
        self._index = index
        self.files = files
        self.shards = manifest.splits[name].shards
        self._locations = [str(folder / shard.file) for shard in self.shards]
        self._response_table = table

    def __len__(self) -> int:
        return len(self.stimulus_ids)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_response_table": None}  # worker processes read images only

    def fingerprint(self, purpose: str) -> str:
        """A hash that changes when anything in the split may have changed, as 64 hexadecimal digits.

        It covers the paths and modification times of local files, so that a damaged copy differs as well.

        Args:
            purpose: of the hash; it is hashed too.
        """
        states = [self.files.state(shard) for shard in self.shards]
        digest = hashlib.sha256(json.dumps([purpose, self.name, states]).encode())
        for array in (self._index.shard, self._index.offset, self._index.size):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def member(self, position: int, kind: str) -> bytes | None:
        """A member's bytes, one of MEMBERS; None if the stimulus lacks it."""
        if kind == "json" and self._response_table is not None:
            return self._response_table.description(position)
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
        """Refuse a member whose bytes are not those that were indexed.

        Raises:
            BadInput: they differ, naming the stimulus and the member.
        """
        checksums = self._index.crc32
        if checksums is not None and zlib.crc32(data) != checksums[position, MEMBERS.index(kind)]:
            raise BadInput(
                f"{self.location(position)}.{kind}: these are not the bytes that were packed (the checksum in "
                "index.npz differs): the tar is damaged or newer than its index; copy or pack the folder again"
            )

    @property
    def is_remote(self) -> bool:
        """Whether its shards must be fetched."""
        return isinstance(self.files, RemoteFiles)

    def shards_of(self, positions: np.ndarray) -> np.ndarray:
        """The numbers of the tars that contain stimuli, int32."""
        return self._index.shard[positions]

    def location(self, position: int) -> str:
        """The tar and the id of a stimulus, for messages."""
        return f"{self._locations[int(self._index.shard[position])]}: {self.stimulus_ids[position]}"

    def image(self, position: int) -> tuple[memoryview, str]:
        """The encoded image, as a view of the tar without a copy, and its encoding, one of IMAGE_MEMBERS."""
        for kind in IMAGE_MEMBERS:
            if (data := self._view(position, kind)) is not None:
                return data, kind
        raise BadInput(f"{self.location(position)} has no image ({' or '.join(IMAGE_MEMBERS)})")

    def meta(self, position: int) -> dict[str, Any]:
        """The stimulus's JSON member; empty if it has none."""
        return read_json(self.member(position, "json"), self.location(position))

    def label(self, position: int) -> str | None:
        """The name of the stimulus's class; None if it has none."""
        return read_label(self.member(position, "cls"), self.meta(position), self.location(position))

    def array(self, position: int, kind: str) -> np.ndarray | None:
        """A float32 array member: "rates.npy" (sites,), "trials.npy" (repetitions, sites) or "truth.npy" (sites,).

        Raises:
            BadInput: not a plain array of numbers, or for another number of sites.
        """
        data = self.member(position, kind)
        return None if data is None else self._array(data, position, kind)

    def _array(self, data: bytes, position: int, kind: str) -> np.ndarray:
        location = f"{self.location(position)}.{kind}"
        array, sites = read_array(data, location), len(self.manifest.sites)
        if array.shape[-1:] != (sites,) or array.ndim != (2 if "trials" in kind else 1):
            raise BadInput(f"{location} has the shape {array.shape}, which does not fit the {sites} sites")
        return array

    def rates(self, positions: np.ndarray | None = None) -> np.ndarray:
        """Trial-averaged responses: float32 (stimuli, sites), NaN = not recorded.

        Args:
            positions: of the stimuli; by default all.

        Raises:
            BadInput: the split has no responses, or one of its stimuli has none.
        """
        if not self.has_responses:
            raise BadInput(f"{self.folder}: the split {self.name!r} has no responses (rates.npy)")
        wanted = np.arange(len(self)) if positions is None else positions
        if self._response_table is None:
            return self._rates_of_shards(wanted)
        assert self._response_table.rates is not None, "checked when the table was loaded"
        return self._response_table.rates[wanted]

    def _rates_of_shards(self, positions: np.ndarray) -> np.ndarray:
        rates = np.empty((len(positions), len(self.manifest.sites)), np.float32)
        for row, position in enumerate(positions.tolist()):
            values = self.array(position, "rates.npy")
            if values is None:
                raise BadInput(
                    f"{self.location(position)} has no rates.npy, though the split {self.name!r} has responses"
                )
            rates[row] = values
        return rates

    def response_table(self) -> ResponseTable:
        """The responses and descriptions of all stimuli, read from the shards."""
        descriptions = [self.member(position, "json") or b"{}" for position in range(len(self))]
        return ResponseTable.of(self.rates() if self.has_responses else None, descriptions)

    @property
    def encoded_hash(self) -> np.ndarray | None:
        """The hash of each encoded image, uint8 (stimuli, 16); None if the index has none (see image_identity.py)."""
        return self._index.encoded_hash

    @property
    def pixel_hash(self) -> np.ndarray | None:
        """The hash of each image's pixels, uint8 (stimuli, 16); None if the index has none (see image_identity.py)."""
        return self._index.pixel_hash

    @property
    def image_sizes(self) -> np.ndarray:
        """The bytes of each encoded image, int64 (stimuli,)."""
        return self._index.size[:, [MEMBERS.index(kind) for kind in IMAGE_MEMBERS]].max(axis=1)

    @property
    def trials_bytes(self) -> int:
        """Size of all single trials; 0 if there are none."""
        return int(self._index.size[:, MEMBERS.index("trials.npy")].sum())

    def trials(self, sites: slice = slice(None)) -> np.ndarray | None:
        """The single trials of all stimuli: float32 (stimuli, repetitions, sites), padded with NaN.

        Args:
            sites: to read; takes only the memory that these need.

        Returns:
            The trials, or None if there are none.
        """
        trials_of = self._trials_of_stimuli(sites)
        repetitions = max(map(len, trials_of.values()), default=0)
        if repetitions == 0:
            return None
        trials = np.full((len(self), repetitions, len(self.manifest.sites[sites])), np.nan, np.float32)
        for position, values in trials_of.items():
            trials[position, : len(values)] = values
        return trials

    def _trials_of_stimuli(self, sites: slice) -> dict[int, np.ndarray]:
        """float32 (repetitions, sites) by position, of the stimuli that have trials.

        Tars are read, not mapped: the pages of a mapped file count as memory of this process.
        """
        column = MEMBERS.index("trials.npy")
        offsets, sizes, shards = self._index.offset[:, column], self._index.size[:, column], self._index.shard
        trials = {}
        for number in np.unique(shards[offsets >= 0]).tolist():
            with self.files.local(self.shards[number]) as path, path.open("rb") as tar:
                for position in np.flatnonzero((shards == number) & (offsets >= 0)).tolist():
                    tar.seek(int(offsets[position]))
                    data = tar.read(int(sizes[position]))
                    trials[position] = self._array(data, position, "trials.npy")[:, sites].copy()
        return trials

    def labels(self, positions: np.ndarray | None = None) -> np.ndarray:
        """The class of stimuli, int64 (stimuli,): its position in the manifest's `classes`.

        Args:
            positions: of the stimuli; by default all.

        Raises:
            BadInput: the recording has no classes, or a stimulus shows an object that is not among them.
        """
        if self.manifest.classes is None:
            raise BadInput(
                f"{self.folder}: the stimuli have no labels (manifest.json has no classes), so there is nothing to "
                "classify; add a column `object` to stimuli.csv and pack again, or use task.kind regression"
            )
        label_of = {name: label for label, name in enumerate(self.manifest.classes)}
        wanted = range(len(self)) if positions is None else positions.tolist()
        labels = np.empty(len(wanted), np.int64)
        for row, position in enumerate(wanted):
            name = self.label(position)
            if name not in label_of:
                raise BadInput(f"{self.location(position)}: object {name!r} is not among the manifest's classes")
            labels[row] = label_of[name]
        return labels
