"""RUN/seen.npz: the images that a predictor has seen, by content, so that whatever scores it can compare.

version                 1
parts        (parts, 3) role, recording, and whom the images were inherited from ("" = nobody)
<k>.encoded  (images, 16), <k>.pixels (images, 16)    of part k, see data_prep/shards/image_identity.py
<k>.stimulus_id (images,)
unknown      (sources,) where the predictor comes from, as far as nobody knows what was seen there
pretrained   (networks,) published weights that it comes from: what they were trained on are other people's images

A run, a probe and an ensemble each have one. It includes the records of the weights, teachers and members they were
made of.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_prep.common.atomic_writes import write_bytes
from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import read_npz
from data_prep.shards.folder import ShardFolder
from data_prep.shards.image_identity import ImageIdentities, image_identities
from train.distributed.launch_environment import this_process

SEEN_FILE = "seen.npz"
VERSION = 1
FITTED, TAUGHT, SELECTED = "fitted", "taught", "selected"
ROLES = (FITTED, TAUGHT, SELECTED)


@dataclass(frozen=True)
class SeenImages:
    """Images of a recording that were seen in one way.

    Attributes:
        role: the network or regression was fitted on them; its teacher was; or they chose an epoch, a layer ...
        recording: its name.
        inherited_from: the weights, teacher or member that saw them, e.g. "weights runs/a"; "" for the predictor
            itself.
        images: their identities.
        stimulus_ids: of the stimuli that showed them.
    """

    role: str
    recording: str
    inherited_from: str
    images: ImageIdentities
    stimulus_ids: list[str]

    def at(self, keep: np.ndarray) -> "SeenImages":
        """Some of the images.

        Args:
            keep: bool (images,).
        """
        ids = [stimulus for stimulus, kept in zip(self.stimulus_ids, keep.tolist(), strict=True) if kept]
        return replace(self, images=self.images.at(keep), stimulus_ids=ids)


@dataclass(frozen=True)
class Overlap:
    """Which of some images were seen, and how; each bool (images,).

    Attributes:
        fitted, taught, selected: see `SeenImages.role`.
    """

    fitted: np.ndarray
    taught: np.ndarray
    selected: np.ndarray

    def at(self, rows: np.ndarray) -> "Overlap":
        """Of some of the images, by position or bool (images,)."""
        return Overlap(self.fitted[rows], self.taught[rows], self.selected[rows])

    @property
    def leaks(self) -> np.ndarray:
        """Images whose score would tell of memory: fitted, by the predictor or by its teacher."""
        return self.fitted | self.taught


@dataclass(frozen=True)
class SeenRecord:
    """What a predictor has seen.

    Attributes:
        parts: the images, by role, recording and origin.
        unknown: origins whose images nobody knows, e.g. "weights other.pth".
        pretrained: names of networks whose published weights it comes from.
    """

    parts: tuple[SeenImages, ...] = ()
    unknown: tuple[str, ...] = ()
    pretrained: tuple[str, ...] = ()

    def of_role(self, role: str) -> list[SeenImages]:
        """The parts of a role."""
        return [part for part in self.parts if part.role == role]

    def count(self, role: str) -> int:
        """The number of images of a role."""
        return sum(len(part.stimulus_ids) for part in self.of_role(role))

    def overlap(self, images: ImageIdentities) -> Overlap:
        """Which of these images were seen, and how."""
        return Overlap(*(self._seen_as(role, images) for role in ROLES))

    def _seen_as(self, role: str, images: ImageIdentities) -> np.ndarray:
        return is_among(images, joined([part.images for part in self.of_role(role)]))

    def origins(self, images: ImageIdentities) -> list[str]:
        """Whom the record inherited these images from, as far as they were fitted there."""
        parts = [part for part in self.parts if part.role in (FITTED, TAUGHT) and part.inherited_from]
        return list(dict.fromkeys(part.inherited_from for part in parts if is_among(images, part.images).any()))

    def adding(self, *parts: SeenImages) -> "SeenRecord":
        """The record and more images; those it has in the same role already are left out."""
        record = self
        for part in parts:
            known = joined([other.images for other in record.of_role(part.role)])
            new = part.at(~np.isin(_pairs(part.images), _pairs(known)))
            if new.stimulus_ids:
                record = replace(record, parts=(*record.parts, new))
        return record

    def inheriting(self, ancestor: "SeenRecord", origin: str, roles: Mapping[str, str] | None = None) -> "SeenRecord":
        """The record and what another one has.

        Args:
            ancestor: the record of the weights, of a teacher or of a member.
            origin: what these are, e.g. "weights runs/a".
            roles: to replace, e.g. fitted by taught for a teacher.
        """
        parts = [
            replace(part, role=(roles or {}).get(part.role, part.role), inherited_from=part.inherited_from or origin)
            for part in ancestor.parts
        ]
        merged = self.adding(*parts)
        return replace(
            merged,
            unknown=tuple(dict.fromkeys([*self.unknown, *ancestor.unknown])),
            pretrained=tuple(dict.fromkeys([*self.pretrained, *ancestor.pretrained])),
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of seen.npz."""
        table = [(part.role, part.recording, part.inherited_from) for part in self.parts]
        arrays = {
            "version": np.array(VERSION),
            "parts": np.array(table, str).reshape(-1, 3),
            "unknown": np.array(self.unknown, str),
            "pretrained": np.array(self.pretrained, str),
        }
        for number, part in enumerate(self.parts):
            arrays |= {
                f"{number}.encoded": part.images.encoded,
                f"{number}.pixels": part.images.pixels,
                f"{number}.stimulus_id": np.array(part.stimulus_ids, str),
            }
        return arrays

    def content(self) -> bytes:
        """The bytes of a seen.npz."""
        content, arrays = io.BytesIO(), dict[str, Any](self.arrays())
        np.savez(content, **arrays)
        return content.getvalue()

    def write(self, folder: Path) -> None:
        """Write FOLDER/seen.npz.

        Raises:
            CannotWrite: the disk is full, the folder read-only ...
        """
        write_bytes(folder / SEEN_FILE, self.content())


def record_of(folder: Path) -> SeenRecord | None:
    """The record of a run, a probe or an ensemble; None if it has none, as those of earlier versions.

    Raises:
        BadInput: the file is damaged.
    """
    path = folder / SEEN_FILE
    return read_record(path, str(path)) if path.exists() else None


def inherited_record(folder: Path) -> SeenRecord:
    """The record of a folder that something is made of; of unknown content if it has none."""
    return record_of(folder) or SeenRecord(unknown=(f"{folder} (it has no {SEEN_FILE})",))


def read_record(file: Path | BinaryIO, where: str) -> SeenRecord:
    """Read a seen.npz.

    Args:
        file: its path, or its content.
        where: it is, for messages.

    Raises:
        BadInput: it is damaged.
    """
    try:
        arrays = read_npz(file)
        version = arrays["version"]
        if version.shape or version.dtype.kind != "i" or int(version) != VERSION:
            raise ValueError("it was written by a newer version of Spiketune")
        parts = [_part(arrays, number, row) for number, row in enumerate(_texts(arrays["parts"], (-1, 3)))]
        unknown, pretrained = (tuple(_texts(arrays[name], (-1,))) for name in ("unknown", "pretrained"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{where} cannot be read ({error}); without it nobody knows what was seen") from None
    except KeyError as error:
        raise BadInput(f"{where} is damaged: it has no {error}; without it nobody knows what was seen") from None
    return SeenRecord(tuple(parts), unknown, pretrained)


def _part(arrays: Mapping[str, np.ndarray], number: int, row: list[str]) -> SeenImages:
    encoded, pixels, ids = (arrays[f"{number}.{name}"] for name in ("encoded", "pixels", "stimulus_id"))
    stimulus_ids = _texts(ids, (-1,))
    role, recording, inherited_from = row
    if role not in ROLES:
        raise ValueError(f"its role {role!r} is not one of {', '.join(ROLES)}")
    for hashes in (encoded, pixels):
        if hashes.dtype != np.uint8 or hashes.shape != (len(stimulus_ids), 16):
            raise ValueError("its hashes do not fit its stimuli")
    return SeenImages(role, recording, inherited_from, ImageIdentities(encoded, pixels), stimulus_ids)


def _texts(array: np.ndarray, shape: tuple[int, ...]) -> list:
    if array.dtype.kind != "U" or array.ndim != len(shape) or array.shape[1:] != shape[1:]:
        raise ValueError("its texts are not lists of texts")
    return array.tolist()


# -------------------------------------------------------------------------------------------------------- comparing


def images_of_split(shards: ShardFolder, split: str) -> ImageIdentities:
    """The images of a split; the first process alone shows the progress where they have to be computed."""
    return image_identities(shards, split, silent=this_process().rank != 0)


def joined(sets: Sequence[ImageIdentities]) -> ImageIdentities:
    """Several sets of images, or none, one after the other."""
    if not sets:
        return ImageIdentities(np.empty((0, 16), np.uint8), np.empty((0, 16), np.uint8))
    return ImageIdentities.joined(sets)


def is_among(images: ImageIdentities, others: ImageIdentities) -> np.ndarray:
    """Which images are among others: those with the same encoded bytes or the same pixels; bool (images,)."""
    return np.isin(_keys(images.encoded), _keys(others.encoded)) | np.isin(_keys(images.pixels), _keys(others.pixels))


def _pairs(images: ImageIdentities) -> np.ndarray:
    """Both hashes of each image as one value."""
    return _keys(np.concatenate([images.encoded, images.pixels], axis=1))


def _keys(hashes: np.ndarray) -> np.ndarray:
    """Hashes, uint8 (n, bytes), as one value each, which numpy can sort.

    All are of one length, so numpy's habit of ignoring zeros at the end of a text does no harm.
    """
    return np.ascontiguousarray(hashes).view(f"S{hashes.shape[1]}").ravel()
