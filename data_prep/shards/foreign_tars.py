"""Folders of tars that others wrote: without a manifest, so what it would say is read out of the tars.

WebDataset's own writer or plain `tar` may have written them. Which split a tar belongs to, its path tells
(`train-000.tar`, `val/000.tar`); where none does, all are train. Every tar is read once; what was found is kept as
`index.npz` beside the tars, with the arrays of data_prep/shards/index.py and two more:

    manifest   ()   what manifest.json would say, as JSON
    tars       ()   name, size and time of every tar, as JSON; if they are others by now, all is read anew

Where the folder cannot be written, that file is kept in the user's cache folder, or not at all.
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
from data_prep.common.safe_reading import LONGEST_NAME, npz_arrays
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

VERSION = 2  # raise it when this file comes to find something else in the same tars

_SPLIT_NAMES = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_SPLIT_NAMES |= dict.fromkeys(("val", "valid", "validation"), "val")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")

Derived = tuple[Manifest, dict[str, SplitIndex]]


def is_foreign(folder: Path) -> bool:
    """Whether a folder holds tars and no manifest."""
    return folder.is_dir() and not (folder / "manifest.json").exists() and any(_visible(folder, ".tar", *_COMPRESSED))


def open_foreign(folder: Path, read_again: bool = False) -> Derived:
    """The manifest and the index of a folder of tars, as kept from an earlier time or read from the tars.

    Args:
        folder: with tars, in it or in its sub-folders.
        read_again: read the tars even if nothing has changed.

    Raises:
        BadInput: a tar that is damaged or that holds anything but stimuli of one kind, naming the tar and the key.
    """
    tars = _tars_by_split(folder)
    state = _state(folder, tars)
    with locks.exclusive(folder, required=False):  # the first process reads the tars, the others what it found
        places = [folder / "index.npz", _place_elsewhere(folder)]
        derived = None if read_again else next(filter(None, (_kept(path, state) for path in places)), None)
        if derived is None:
            derived = _derive(folder, tars)
            _keep(derived, state, places, folder)
    return derived


# ----------------------------------------------------------------------------------------------------- which tars


def _visible(folder: Path, *endings: str) -> Iterator[Path]:
    """The files in a folder and its sub-folders with one of these endings.

    Not what is hidden, which a pack may have half written, nor what belongs to a packed folder in there.
    """
    for pattern in ("*", "*/*"):
        for path in sorted(folder.glob(pattern)):
            hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
            if path.name.endswith(endings) and not hidden and not (path.parent / "manifest.json").exists():
                yield path


def _tars_by_split(folder: Path) -> dict[str, list[Path]]:
    """The tars of each split, by their names; all are train where no name tells."""
    if (path := next(_visible(folder, *_COMPRESSED), None)) is not None:
        raise BadInput(f"{path} is compressed, so that nothing in it is found without reading it all; unpack it")
    tars = list(_visible(folder, ".tar"))
    named = {path: _split_of(path.relative_to(folder)) for path in tars}
    if not any(named.values()):
        return {"train": tars}
    if nameless := [path for path, split in named.items() if split is None]:
        raise BadInput(f"{nameless[0]}: the name tells no split, and others do; put train, val or test into it")
    return {split: mine for split in SPLITS if (mine := [path for path in tars if named[path] == split])}


def _split_of(path: Path) -> str | None:
    words = re.split(r"[^a-z]+", str(path).lower())
    splits = {_SPLIT_NAMES[word] for word in words if word in _SPLIT_NAMES}
    if len(splits) > 1:
        raise BadInput(f"{path}: the name tells several splits ({', '.join(sorted(splits))}); rename it")
    return next(iter(splits), None)


def _state(folder: Path, tars: dict[str, list[Path]]) -> str:
    status = [(path.relative_to(folder).as_posix(), path.stat()) for paths in tars.values() for path in paths]
    return json.dumps([VERSION, MEMBERS, [(name, found.st_size, found.st_mtime_ns) for name, found in status]])


# ---------------------------------------------------------------------------------------------- what was kept of it


def _place_elsewhere(folder: Path) -> Path:
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "spiketune" / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]}.npz"


def _kept(path: Path, state: str) -> Derived | None:
    """What was found in the tars as they are now; None where nothing whole is kept of them."""
    try:
        found = npz_arrays(path)
    except (OSError, ValueError):
        return None
    if "manifest" not in found and "members" in found:
        raise BadInput(
            f"{path.parent} has an index.npz of data_prep/pack.py and no manifest.json, so it is not a whole copy; "
            "copy manifest.json too, or remove index.npz to read the tars as they are"
        )
    try:
        if str(found["tars"]) != state:
            return None
        manifest = parse_manifest(str(found["manifest"]).encode(), path)
        return manifest, index_of(found, manifest)
    except (BadInput, ValueError, KeyError):
        return None


def _keep(derived: Derived, state: str, places: list[Path], folder: Path) -> None:
    """Write what was found to the first place that can be written, under a temporary name first."""
    manifest, index = derived
    arrays = {"members": np.array(MEMBERS), "manifest": np.array(manifest.model_dump_json()), "tars": np.array(state)}
    for split, found in index.items():
        arrays |= found.arrays(split)
    failure: CannotWrite | None = None
    for path in places:
        try:
            write_npz(path, arrays)
        except CannotWrite as error:
            failure = failure or error
            continue
        if path.parent != folder:
            _say(f"{folder} cannot be written ({failure.reason}), so the index of its tars is kept as {path}")
        return
    _say(f"{folder} cannot be written ({failure.reason}), nor {places[-1]}: its tars are read again each time")


def _say(message: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"note: {message}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------ what is in a tar


@dataclass
class _Tar:
    """What one tar holds: the manifest's entry, where the members lie, and what the stimuli say of themselves."""

    shard: Shard
    index: SplitIndex
    rates: list[np.ndarray | None]
    labels: list[str | None]
    images: set[tuple[int, int, str]]

    @property
    def keys(self) -> list[str]:
        """Of the stimuli, in their order."""
        return self.index.stimulus_id.tolist()


def _read_tar(folder: Path, path: Path) -> _Tar:
    file = path.relative_to(folder).as_posix()
    keys, places = member_table(path)
    if not keys:
        raise BadInput(f"{path} holds no stimuli; remove it")
    with path.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
        content = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
    try:
        shard = Shard(file=file, stimuli=len(keys), bytes=len(content), sha256=sha256)
    except ValidationError:
        raise BadInput(f"{path}: rename it to letters, digits, _, - and dots only, so that it can be listed") from None
    tar = _Tar(shard, SplitIndex.of_tar(keys, places, checksums(content, places)), [], [], set())
    for key, row in zip(keys, places.tolist(), strict=True):
        there = {kind: place for kind, place in zip(MEMBERS, row, strict=True) if place[0] >= 0}
        members = {kind: content[start : start + size] for kind, (start, size) in there.items()}
        _look(members, f"{path}: {key}", tar)
    return tar


def _look(members: dict[str, memoryview], place: str, tar: _Tar) -> None:
    """Add to `tar` what the members of one stimulus say."""
    kind = next((kind for kind in IMAGE_MEMBERS if kind in members), None)
    if kind is None:
        raise BadInput(f"{place}: has no image ({', '.join(IMAGE_MEMBERS)}) beside {', '.join(members)}")
    try:
        image = bytes(members[kind])
        tar.images.add(image_size(image))
        if kind in ("jpg", "png") and sniff_encoding(image) != kind:
            raise ValueError("the image is of another format than its name says")
    except ValueError as error:
        raise BadInput(f"{place}.{kind}: {error}") from None
    rates = None
    if "rates.npy" in members:
        rates = read_array(members["rates.npy"], f"{place}.rates.npy")
        if rates.ndim != 1 or not rates.size:
            raise BadInput(f"{place}.rates.npy has the shape {rates.shape}; it must be (sites,)")
    tar.rates.append(rates)
    tar.labels.append(read_label(members.get("cls"), read_json(members.get("json"), place), place))


# ------------------------------------------------------------------------------------------------ what follows of it


def _derive(folder: Path, tars: dict[str, list[Path]]) -> Derived:
    splits: dict[str, list[_Tar]] = {}
    with Progress(sum(map(len, tars.values())), f"indexing {folder}", "tars") as progress:
        for split, paths in tars.items():
            for path in paths:
                splits.setdefault(split, []).append(_read_tar(folder, path))
                progress.advance()
    for found in splits.values():
        _check_keys(folder, found)
        for what in ("rates", "labels"):
            _check_all_or_none(folder, found, what)
    rates = {split: _rates(folder, found) for split, found in splits.items()}
    manifest = _manifest(folder, splits, {split: rows for split, rows in rates.items() if rows is not None})
    return manifest, {split: SplitIndex.joined([tar.index for tar in found]) for split, found in splits.items()}


def _check_keys(folder: Path, tars: list[_Tar]) -> None:
    first: dict[str, str] = {}
    for tar in tars:
        for key in tar.keys:
            if (other := first.setdefault(key, tar.shard.file)) != tar.shard.file:
                raise BadInput(
                    f"{folder / tar.shard.file}: {key}: is in {other} too; every stimulus of a split needs its own key"
                )


def _check_all_or_none(folder: Path, tars: list[_Tar], what: str) -> None:
    """Refuse a split where some stimuli have responses (or a label) and others have none."""
    there = [value is not None for tar in tars for value in getattr(tar, what)]
    if any(there) and not all(there):
        places = [f"{folder / tar.shard.file}: {key}" for tar in tars for key in tar.keys]
        lacking = "rates.npy" if what == "rates" else f"label (cls, or {', '.join(LABEL_FIELDS)} in its json)"
        raise BadInput(f"{places[there.index(False)]}: has no {lacking}, though other stimuli of the split have one")


def _rates(folder: Path, tars: list[_Tar]) -> np.ndarray | None:
    """float32 (stimuli, sites), or None for a split without responses."""
    if tars[0].rates[0] is None:
        return None
    sites = len(tars[0].rates[0])
    for tar in tars:
        _check_sites(folder, tar, sites)
    return np.stack([rates for tar in tars for rates in tar.rates])


def _check_sites(folder: Path, tar: _Tar, sites: int) -> None:
    for key, rates in zip(tar.keys, tar.rates, strict=True):
        if len(rates) != sites:
            raise BadInput(f"{folder / tar.shard.file}: {key}.rates.npy has {len(rates)} sites, others have {sites}")


def _manifest(folder: Path, splits: dict[str, list[_Tar]], rates: dict[str, np.ndarray]) -> Manifest:
    widths = {rows.shape[1] for rows in rates.values()}
    if len(widths) > 1:
        counted = ", ".join(f"{rows.shape[1]} in {split}" for split, rows in rates.items())
        raise BadInput(f"{folder}: rates.npy has another number of sites in each split ({counted})")
    fitted = rates.get("train", next(iter(rates.values()), np.empty((0, 0), np.float32)))
    images = set().union(*(tar.images for found in splits.values() for tar in found))
    labels = {label for found in splits.values() for tar in found for label in tar.labels if label is not None}
    return Manifest(
        name=printable(folder.resolve().name)[:LONGEST_NAME] or "tars",
        simulated=False,
        provenance={"source": "tars", "path": str(folder.resolve()), "warnings": _warnings(splits, images)},
        splits={
            split: Split(
                stimuli=sum(tar.shard.stimuli for tar in found),
                responses=split in rates,
                shards=[tar.shard for tar in found],
            )
            for split, found in splits.items()
        },
        sites=[{"id": f"site_{site:03d}"} for site in range(fitted.shape[1])],
        classes=_class_order(labels) if labels else None,
        image=Image.of(images),
        rates=Rates.of(fitted, "as recorded"),
        response_window_ms=None,
    )


def _class_order(labels: set[str]) -> list[str]:
    """By number where all classes are numbers, else by name."""
    ordered = sorted(labels)
    return sorted(ordered, key=int) if all(re.fullmatch(r"-?[0-9]+", label) for label in labels) else ordered


def _warnings(splits: dict[str, list[_Tar]], images: set[tuple[int, int, str]]) -> list[str]:
    warnings = []
    seen: set[str] = set()
    for split, tars in splits.items():
        keys = {key for tar in tars for key in tar.keys}
        if twice := sorted(keys & seen):
            warnings.append(
                f"{len(twice)} keys of {split} are in another split too, {twice[0]} for one: fine if every split was "
                "numbered anew, but held-out scores are too good if they are the same stimuli"
            )
        seen |= keys
    if len(images) > 1:
        warnings.append("the images differ in size or mode; images.size says what size the network is to see")
    return warnings
