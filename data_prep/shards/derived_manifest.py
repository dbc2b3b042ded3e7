"""The manifest and the index of a folder of foreign tars, derived from what the tars contain."""

import hashlib
import mmap
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from data_prep.common.errors import BadInput
from data_prep.common.image_decoding import image_size, sniff_encoding
from data_prep.common.progress import Progress
from data_prep.common.safe_reading import LONGEST_NAME
from data_prep.common.terminal import printable
from data_prep.shards.copies import copy_facts
from data_prep.shards.image_hashes import HASH_BYTES, encoded_hashes, pixel_hash_of
from data_prep.shards.index import SplitIndex, checksums
from data_prep.shards.manifest import Image, Manifest, Rates, Shard, Split
from data_prep.shards.members import (
    IMAGE_MEMBERS,
    LABEL_FIELDS,
    MEMBERS,
    member_table,
    read_array,
    read_json,
    read_label,
)
from data_prep.shards.shown_images import may_look_otherwise


@dataclass(frozen=True)
class Derived:
    """The manifest of a folder of tars, and the index of each split."""

    manifest: Manifest
    index: dict[str, SplitIndex]


@dataclass(frozen=True)
class _Stimulus:
    """The facts about a stimulus that the manifest needs.

    Attributes:
        image: width, height and mode.
        rates: float32 (sites,), or None without responses.
        label: its class, or None.
        pixel_hash: uint8 (16,).
        looks_otherwise: whether packing might have changed what is seen of it, see `may_look_otherwise`.
    """

    key: str
    image: tuple[int, int, str]
    rates: np.ndarray | None
    label: str | None
    pixel_hash: np.ndarray
    looks_otherwise: bool


@dataclass(frozen=True)
class _Tar:
    """A tar's entry in the manifest, its index, and its stimuli."""

    shard: Shard
    index: SplitIndex
    stimuli: list[_Stimulus]


_Splits = dict[str, list[_Tar]]


def read_tar(folder: Path, path: Path) -> _Tar:
    """Read one tar of a folder and check its stimuli.

    Raises:
        BadInput: it is damaged or contains anything but stimuli, naming the tar and the key.
    """
    file = path.relative_to(folder).as_posix()
    keys, extents = member_table(path)
    if not keys:
        raise BadInput(f"{path} contains no stimuli; remove it")
    with path.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
        content = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
    try:
        shard = Shard(file=file, stimuli=len(keys), bytes=len(content), sha256=sha256)
    except ValidationError:
        raise BadInput(f"{path}: rename it to letters, digits, _, - and dots only, so that it can be listed") from None
    stimuli, pixel_hash = [], np.empty((len(keys), HASH_BYTES), np.uint8)
    for row, (key, of_kind) in enumerate(zip(keys, extents.tolist(), strict=True)):
        members = {
            kind: content[offset : offset + size]
            for kind, (offset, size) in zip(MEMBERS, of_kind, strict=True)
            if offset >= 0
        }
        stimuli.append(_read_stimulus(key, members, f"{path}: {key}"))
        pixel_hash[row] = stimuli[row].pixel_hash
    index = SplitIndex.of_tar(keys, extents, checksums(content, extents), encoded_hashes(content, extents), pixel_hash)
    return _Tar(shard, index, stimuli)


def _read_stimulus(key: str, members: dict[str, memoryview], location: str) -> _Stimulus:
    kind = next((kind for kind in IMAGE_MEMBERS if kind in members), None)
    if kind is None:
        raise BadInput(f"{location}: has no image ({', '.join(IMAGE_MEMBERS)}), only {', '.join(members)}")
    image = bytes(members[kind])
    try:
        size = image_size(image)
        if kind in ("jpg", "png") and sniff_encoding(image) != kind:
            raise ValueError("the format of the image is not that of its name")
    except ValueError as error:
        raise BadInput(f"{location}.{kind}: {error}") from None
    seen = kind != "image.npy" and may_look_otherwise(image, kind, size[2])
    label = read_label(members.get("cls"), read_json(members.get("json"), location), location)
    return _Stimulus(key, size, _read_rates(members, location), label, pixel_hash_of(image, kind), seen)


def _read_rates(members: dict[str, memoryview], location: str) -> np.ndarray | None:
    if "rates.npy" not in members:
        return None
    rates = read_array(members["rates.npy"], f"{location}.rates.npy")
    if rates.ndim != 1 or not rates.size:
        raise BadInput(f"{location}.rates.npy has the shape {rates.shape}; it must be (sites,)")
    return rates


# ------------------------------------------------------------------------------------------ deriving the manifest


def derive(folder: Path, tars: dict[str, list[Path]]) -> Derived:
    """Read the tars of a folder and derive its manifest and index.

    Args:
        folder: of the tars.
        tars: by split.

    Raises:
        BadInput: a tar that is damaged or contains anything but stimuli of one kind, naming the tar and the key.
    """
    splits: _Splits = {}
    with Progress(sum(map(len, tars.values())), f"indexing {folder}", "tars") as progress:
        for split, paths in tars.items():
            for path in paths:
                splits.setdefault(split, []).append(read_tar(folder, path))
                progress.advance()
    rates: dict[str, np.ndarray] = {}
    for split, split_tars in splits.items():
        _check_keys(folder, split_tars)
        _check_all_or_none(folder, split_tars)
        responses = _rates(folder, split_tars)
        if responses is not None:
            rates[split] = responses
    index = {split: SplitIndex.joined([tar.index for tar in split_tars]) for split, split_tars in splits.items()}
    manifest = _manifest(folder, splits, rates)
    manifest.provenance["copies"] = copy_facts(index)
    return Derived(manifest, index)


def _check_keys(folder: Path, tars: list[_Tar]) -> None:
    tar_of: dict[str, str] = {}
    for tar in tars:
        for stimulus in tar.stimuli:
            other = tar_of.setdefault(stimulus.key, tar.shard.file)
            if other != tar.shard.file:
                raise BadInput(
                    f"{folder / tar.shard.file}: {stimulus.key}: is also in {other}; every stimulus of a split needs "
                    "its own key"
                )


def _check_all_or_none(folder: Path, tars: list[_Tar]) -> None:
    """Refuse a split in which only some stimuli have responses, or only some have a label."""
    stimuli = [(f"{folder / tar.shard.file}: {stimulus.key}", stimulus) for tar in tars for stimulus in tar.stimuli]
    without_rates = [location for location, stimulus in stimuli if stimulus.rates is None]
    without_label = [location for location, stimulus in stimuli if stimulus.label is None]
    label = f"label (cls, or {', '.join(LABEL_FIELDS)} in its json)"
    for lacking, member in ((without_rates, "rates.npy"), (without_label, label)):
        if lacking and len(lacking) < len(stimuli):
            raise BadInput(f"{lacking[0]}: has no {member}, though other stimuli of its split do")


def _rates(folder: Path, tars: list[_Tar]) -> np.ndarray | None:
    """float32 (stimuli, sites), or None for a split without responses."""
    rows: list[np.ndarray] = []
    for tar in tars:
        for stimulus in tar.stimuli:
            if stimulus.rates is None:
                return None
            if rows and len(stimulus.rates) != len(rows[0]):
                raise BadInput(
                    f"{folder / tar.shard.file}: {stimulus.key}.rates.npy has {len(stimulus.rates)} sites, but earlier "
                    f"stimuli have {len(rows[0])}"
                )
            rows.append(stimulus.rates)
    return np.stack(rows)


def _manifest(folder: Path, splits: _Splits, rates: dict[str, np.ndarray]) -> Manifest:
    if len({rows.shape[1] for rows in rates.values()}) > 1:
        counts = ", ".join(f"{rows.shape[1]} in {split}" for split, rows in rates.items())
        raise BadInput(f"{folder}: rates.npy has a different number of sites in each split ({counts})")
    fitted = rates.get("train", next(iter(rates.values()), np.empty((0, 0), np.float32)))
    stimuli = [stimulus for tars in splits.values() for tar in tars for stimulus in tar.stimuli]
    images = {stimulus.image for stimulus in stimuli}
    labels = {stimulus.label for stimulus in stimuli if stimulus.label is not None}
    return Manifest(
        name=printable(folder.resolve().name)[:LONGEST_NAME] or "tars",
        simulated=False,
        provenance={"source": "tars", "path": str(folder.resolve()), "warnings": _warnings(splits, images)},
        splits={
            split: Split(
                stimuli=sum(tar.shard.stimuli for tar in tars),
                responses=split in rates,
                shards=[tar.shard for tar in tars],
            )
            for split, tars in splits.items()
        },
        sites=[{"id": f"site_{site:03d}"} for site in range(fitted.shape[1])],
        classes=_class_order(labels) if labels else None,
        image=Image.of(images),
        rates=Rates.of(fitted, "as recorded"),
        response_window_ms=None,
    )


def _class_order(labels: set[str]) -> list[str]:
    """In numerical order if all classes are numbers, else in alphabetical order."""
    ordered = sorted(labels)
    return sorted(ordered, key=int) if all(re.fullmatch(r"-?[0-9]+", label) for label in labels) else ordered


def _warnings(splits: _Splits, images: set[tuple[int, int, str]]) -> list[str]:
    warnings = []
    earlier: set[str] = set()
    for split, tars in splits.items():
        keys = {stimulus.key for tar in tars for stimulus in tar.stimuli}
        shared = sorted(keys & earlier)
        if shared:
            warnings.append(
                f"{len(shared)} keys of {split} are also in another split, e.g. {shared[0]}: harmless if each split "
                "was numbered separately, but held-out scores are too good if they are the same stimuli"
            )
        earlier |= keys
    otherwise = sum(stimulus.looks_otherwise for tars in splits.values() for tar in tars for stimulus in tar.stimuli)
    if otherwise:
        warnings.append(
            f"{otherwise} images have an EXIF orientation, transparent parts, several frames or CMYK colours, and are "
            "read as stored: not turned, with what transparency hides; save them as they were shown"
        )
    if len(images) > 1:
        warnings.append("the images differ in size or mode; set images.size to the size that the network is to see")
    return warnings
