"""Folders of tars of other origin: they have no manifest, so it is derived from the tars.

WebDataset's own writer or plain `tar` may have written them. The path of a tar says which split it belongs to
(`train-000.tar`, `val/000.tar`); if no path does, all are train. Every tar is read once; what was derived is kept as
`index.npz` beside the tars, with the arrays of data_prep/shards/index.py and two more:

    manifest   ()   the derived manifest, as JSON
    tars       ()   name, size and time of every tar, as JSON; if these have changed, the tars are read again

If the folder cannot be written, that file is kept in the user's cache folder, or not at all.
"""

import hashlib
import json
import mmap
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from data_prep.common import locks
from data_prep.common.atomic_writes import write_npz
from data_prep.common.errors import BadInput, CannotWrite
from data_prep.common.image_decoding import image_size, sniff_encoding
from data_prep.common.progress import Progress
from data_prep.common.safe_reading import LONGEST_NAME, read_npz
from data_prep.common.terminal import printable
from data_prep.recording import SPLITS
from data_prep.shards.index import SplitIndex, checksums, index_of
from data_prep.shards.manifest import Image, Manifest, Rates, Shard, Split, parse_manifest
from data_prep.shards.members import (
    IMAGE_MEMBERS,
    LABEL_FIELDS,
    MEMBERS,
    member_table,
    read_array,
    read_json,
    read_label,
)

VERSION = 2  # raise it when other things are derived from the same tars

_SPLIT_NAMES = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_SPLIT_NAMES |= dict.fromkeys(("val", "valid", "validation"), "val")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True)
class Derived:
    """What was derived from the tars of a folder."""

    manifest: Manifest
    index: dict[str, SplitIndex]


def is_foreign(folder: Path) -> bool:
    """Whether a folder contains tars and no manifest."""
    return folder.is_dir() and not (folder / "manifest.json").exists() and any(_visible(folder, ".tar", *_COMPRESSED))


def open_foreign(folder: Path, read_again: bool = False) -> tuple[Manifest, dict[str, SplitIndex]]:
    """The manifest and the index of a folder of tars, kept from an earlier time or derived from the tars.

    Args:
        folder: with tars, in it or in its sub-folders.
        read_again: read the tars even if nothing has changed.

    Raises:
        BadInput: a tar that is damaged or contains anything but stimuli of one kind, naming the tar and the key.
    """
    tars = _tars_by_split(folder)
    state = _state(folder, tars)
    with locks.exclusive(folder, required=False):  # the first process reads the tars, the others what it derived
        candidates = [folder / "index.npz", _path_in_user_cache(folder)]
        derived = None if read_again else _first_valid(candidates, state)
        if derived is None:
            derived = _derive(folder, tars)
            _save(derived, state, candidates, folder)
    return derived.manifest, derived.index


# ----------------------------------------------------------------------------------------------------- which tars


def _visible(folder: Path, *endings: str) -> Iterator[Path]:
    """The files in a folder and its sub-folders with one of these endings.

    Hidden files are left out, as a pack may have half written them, and so are those of packed folders in there.
    """
    for pattern in ("*", "*/*"):
        for path in sorted(folder.glob(pattern)):
            hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
            if path.name.endswith(endings) and not hidden and not (path.parent / "manifest.json").exists():
                yield path


def _tars_by_split(folder: Path) -> dict[str, list[Path]]:
    """The tars of each split, by their names; all are train if no name tells."""
    compressed = next(_visible(folder, *_COMPRESSED), None)
    if compressed is not None:
        raise BadInput(f"{compressed} is compressed, so stimuli in it cannot be read one by one; unpack it")
    tars = list(_visible(folder, ".tar"))
    split_of = {path: _split_of(path.relative_to(folder)) for path in tars}
    if not any(split_of.values()):
        return {"train": tars}
    for path, split in split_of.items():
        if split is None:
            raise BadInput(f"{path}: its name says no split, and others do; put train, val or test into it")
    by_split = {split: [path for path in tars if split_of[path] == split] for split in SPLITS}
    return {split: paths for split, paths in by_split.items() if paths}


def _split_of(path: Path) -> str | None:
    words = re.split(r"[^a-z]+", str(path).lower())
    splits = {_SPLIT_NAMES[word] for word in words if word in _SPLIT_NAMES}
    if len(splits) > 1:
        raise BadInput(f"{path}: its name says several splits ({', '.join(sorted(splits))}); rename it")
    return next(iter(splits), None)


def _state(folder: Path, tars: dict[str, list[Path]]) -> str:
    """Changes when any tar changes."""
    files = []
    for path in (path for paths in tars.values() for path in paths):
        status = path.stat()
        files.append((path.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns))
    return json.dumps([VERSION, MEMBERS, files])


# ------------------------------------------------------------------------------------------- keeping what was derived


def _path_in_user_cache(folder: Path) -> Path:
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "spiketune" / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]}.npz"


def _first_valid(candidates: list[Path], state: str) -> Derived | None:
    for path in candidates:
        derived = _load(path, state)
        if derived is not None:
            return derived
    return None


def _load(path: Path, state: str) -> Derived | None:
    """What was derived from the tars as they are now; None if the file is missing, damaged or out of date."""
    try:
        arrays = read_npz(path)
    except (OSError, ValueError):
        return None
    if "manifest" not in arrays and "members" in arrays:
        raise BadInput(
            f"{path.parent} has an index.npz of data_prep/pack.py and no manifest.json, so it is not a complete copy; "
            "copy manifest.json too, or remove index.npz to read the tars as they are"
        )
    try:
        if str(arrays["tars"]) != state:
            return None
        manifest = parse_manifest(str(arrays["manifest"]).encode(), path)
        return Derived(manifest, index_of(arrays, manifest))
    except (BadInput, ValueError, KeyError):
        return None


def _save(derived: Derived, state: str, candidates: list[Path], folder: Path) -> None:
    """Write what was derived to the first of the candidates that can be written."""
    arrays = {
        "members": np.array(MEMBERS),
        "manifest": np.array(derived.manifest.model_dump_json()),
        "tars": np.array(state),
    }
    for split, index in derived.index.items():
        arrays |= index.arrays(split)
    beside, elsewhere = candidates
    try:
        write_npz(beside, arrays)
        return
    except CannotWrite as error:
        reason = error.reason
    try:
        write_npz(elsewhere, arrays)
        _note(f"{folder} cannot be written ({reason}), so the index of its tars is kept as {elsewhere}")
    except CannotWrite:
        _note(f"{folder} cannot be written ({reason}), nor {elsewhere}: its tars are read again each time")


def _note(message: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"note: {message}", file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------- what a tar contains


@dataclass(frozen=True)
class _Stimulus:
    """What matters of one stimulus for the manifest.

    Attributes:
        image: width, height and mode.
        rates: float32 (sites,), or None without responses.
        label: its class, or None.
    """

    key: str
    image: tuple[int, int, str]
    rates: np.ndarray | None
    label: str | None


@dataclass(frozen=True)
class _Tar:
    """What one tar contains: the manifest's entry, where the members lie, and the stimuli."""

    shard: Shard
    index: SplitIndex
    stimuli: list[_Stimulus]


_Splits = dict[str, list[_Tar]]


def _read_tar(folder: Path, path: Path) -> _Tar:
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
    index = SplitIndex.of_tar(keys, extents, checksums(content, extents))
    stimuli = []
    for key, of_kind in zip(keys, extents.tolist(), strict=True):
        members = {
            kind: content[offset : offset + size]
            for kind, (offset, size) in zip(MEMBERS, of_kind, strict=True)
            if offset >= 0
        }
        stimuli.append(_read_stimulus(key, members, f"{path}: {key}"))
    return _Tar(shard, index, stimuli)


def _read_stimulus(key: str, members: dict[str, memoryview], location: str) -> _Stimulus:
    kind = next((kind for kind in IMAGE_MEMBERS if kind in members), None)
    if kind is None:
        raise BadInput(f"{location}: has no image ({', '.join(IMAGE_MEMBERS)}) beside {', '.join(members)}")
    image = bytes(members[kind])
    try:
        size = image_size(image)
        if kind in ("jpg", "png") and sniff_encoding(image) != kind:
            raise ValueError("the image has another format than its name says")
    except ValueError as error:
        raise BadInput(f"{location}.{kind}: {error}") from None
    label = read_label(members.get("cls"), read_json(members.get("json"), location), location)
    return _Stimulus(key, size, _read_rates(members, location), label)


def _read_rates(members: dict[str, memoryview], location: str) -> np.ndarray | None:
    if "rates.npy" not in members:
        return None
    rates = read_array(members["rates.npy"], f"{location}.rates.npy")
    if rates.ndim != 1 or not rates.size:
        raise BadInput(f"{location}.rates.npy has the shape {rates.shape}; it must be (sites,)")
    return rates


# ------------------------------------------------------------------------------------------- what follows from them


def _derive(folder: Path, tars: dict[str, list[Path]]) -> Derived:
    splits: _Splits = {}
    with Progress(sum(map(len, tars.values())), f"indexing {folder}", "tars") as progress:
        for split, paths in tars.items():
            for path in paths:
                splits.setdefault(split, []).append(_read_tar(folder, path))
                progress.advance()
    rates: dict[str, np.ndarray] = {}
    for split, of_split in splits.items():
        _check_keys(folder, of_split)
        _check_all_or_none(folder, of_split)
        responses = _rates(folder, of_split)
        if responses is not None:
            rates[split] = responses
    index = {split: SplitIndex.joined([tar.index for tar in of_split]) for split, of_split in splits.items()}
    return Derived(_manifest(folder, splits, rates), index)


def _check_keys(folder: Path, tars: list[_Tar]) -> None:
    tar_of: dict[str, str] = {}
    for tar in tars:
        for stimulus in tar.stimuli:
            other = tar_of.setdefault(stimulus.key, tar.shard.file)
            if other != tar.shard.file:
                raise BadInput(
                    f"{folder / tar.shard.file}: {stimulus.key}: is in {other} too; every stimulus of a split needs a "
                    "key of its own"
                )


def _check_all_or_none(folder: Path, tars: list[_Tar]) -> None:
    """Refuse a split where some stimuli have responses (or a label) and others have none."""
    stimuli = [(f"{folder / tar.shard.file}: {stimulus.key}", stimulus) for tar in tars for stimulus in tar.stimuli]
    without_rates = [location for location, stimulus in stimuli if stimulus.rates is None]
    without_label = [location for location, stimulus in stimuli if stimulus.label is None]
    label = f"label (cls, or {', '.join(LABEL_FIELDS)} in its json)"
    for lacking, member in ((without_rates, "rates.npy"), (without_label, label)):
        if lacking and len(lacking) < len(stimuli):
            raise BadInput(f"{lacking[0]}: has no {member}, though other stimuli of the split have one")


def _rates(folder: Path, tars: list[_Tar]) -> np.ndarray | None:
    """float32 (stimuli, sites), or None for a split without responses."""
    rows: list[np.ndarray] = []
    for tar in tars:
        for stimulus in tar.stimuli:
            if stimulus.rates is None:
                return None
            if rows and len(stimulus.rates) != len(rows[0]):
                raise BadInput(
                    f"{folder / tar.shard.file}: {stimulus.key}.rates.npy has {len(stimulus.rates)} sites, others have "
                    f"{len(rows[0])}"
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
    """By number if all classes are numbers, else by name."""
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
                f"{len(shared)} keys of {split} are in another split too, e.g. {shared[0]}: fine if each split was "
                "numbered on its own, but held-out scores are too good if they are the same stimuli"
            )
        earlier |= keys
    if len(images) > 1:
        warnings.append("the images differ in size or mode; images.size sets the size that the network sees")
    return warnings
