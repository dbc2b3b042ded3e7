"""Folders of foreign tars, which pack.py did not write: they have no manifest, so it is derived from the tars.

WebDataset's own writer or plain `tar` may have written them. The path of a tar names its split (`train-000.tar`,
`val/000.tar`); if no path does, all stimuli are train. The tars are read once; the result is kept as `index.npz` beside
them, with the arrays of data_prep/shards/index.py and two more:

    manifest   ()   the derived manifest, as JSON
    tars       ()   name, size and time of every tar, as JSON; if these have changed, the tars are read again

If the folder cannot be written, that file is kept in the user's cache folder, or not at all.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.common import locks
from data_prep.common.atomic_writes import write_npz
from data_prep.common.errors import BadInput, CannotWrite
from data_prep.common.process_identity import speaks
from data_prep.common.safe_reading import read_npz
from data_prep.recording import SPLITS
from data_prep.remote.cache import user_cache
from data_prep.shards.derived_manifest import Derived, derive
from data_prep.shards.index import SplitIndex, index_of
from data_prep.shards.manifest import Manifest, parse_manifest
from data_prep.shards.members import MEMBERS

VERSION = 3  # raise it when something else is derived from the same tars

_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def is_foreign(folder: Path) -> bool:
    """Whether a folder contains tars but no manifest."""
    return folder.is_dir() and not (folder / "manifest.json").exists() and any(_visible(folder, ".tar", *_COMPRESSED))


def open_foreign(folder: Path, read_again: bool = False) -> tuple[Manifest, dict[str, SplitIndex]]:
    """The manifest and the index of a folder of tars, as kept from an earlier call or derived now.

    Args:
        folder: with tars, in it or in its sub-folders.
        read_again: read the tars even if nothing has changed.

    Raises:
        BadInput: a tar that is damaged or contains anything but stimuli of one kind, naming the tar and the key.
    """
    tars = _tars_by_split(folder)
    state = _state(folder, tars)
    with locks.exclusive(folder, required=False):  # the first process reads the tars, the others read its result
        candidates = [folder / "index.npz", _path_in_user_cache(folder)]
        derived = None if read_again else _first_valid(candidates, state)
        if derived is None:
            derived = derive(folder, tars)
            _save(derived, state, candidates, folder)
    return derived.manifest, derived.index


# ----------------------------------------------------------------------------------------------------- which tars


def _visible(folder: Path, *endings: str) -> Iterator[Path]:
    """The files in a folder and its sub-folders with one of these endings.

    Hidden files are left out, as packing may be writing them, and so are packed folders among the sub-folders.
    """
    for pattern in ("*", "*/*"):
        for path in sorted(folder.glob(pattern)):
            hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
            if path.name.endswith(endings) and not hidden and not (path.parent / "manifest.json").exists():
                yield path


def _tars_by_split(folder: Path) -> dict[str, list[Path]]:
    """The tars of each split, by their names; all are train if no name names a split."""
    compressed = next(_visible(folder, *_COMPRESSED), None)
    if compressed is not None:
        raise BadInput(f"{compressed} is compressed, so single stimuli cannot be read; decompress it")
    tars = list(_visible(folder, ".tar"))
    split_of = {path: _split_of(path.relative_to(folder)) for path in tars}
    if not any(split_of.values()):
        return {"train": tars}
    for path, split in split_of.items():
        if split is None:
            raise BadInput(f"{path}: its name contains no split, though other names do; add train, val or test to it")
    by_split = {split: [path for path in tars if split_of[path] == split] for split in SPLITS}
    return {split: paths for split, paths in by_split.items() if paths}


def _split_of(path: Path) -> str | None:
    words = re.split(r"[^a-z]+", str(path).lower())
    splits = {_SPLIT_NAMES[word] for word in words if word in _SPLIT_NAMES}
    if len(splits) > 1:
        raise BadInput(f"{path}: its name contains more than one split ({', '.join(sorted(splits))}); rename it")
    return next(iter(splits), None)


def _state(folder: Path, tars: dict[str, list[Path]]) -> str:
    """Changes when any tar changes."""
    files = []
    for path in (path for paths in tars.values() for path in paths):
        status = path.stat()
        files.append((path.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns))
    return json.dumps([VERSION, MEMBERS, files])


# ------------------------------------------------------------------------------------------ keeping the derived index


def _path_in_user_cache(folder: Path) -> Path:
    return user_cache() / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]}.npz"


def _first_valid(candidates: list[Path], state: str) -> Derived | None:
    loaded = (_load(path, state) for path in candidates)
    return next((derived for derived in loaded if derived is not None), None)


def _load(path: Path, state: str) -> Derived | None:
    """The manifest and index that were kept; None if the file is missing, damaged or out of date."""
    try:
        arrays = read_npz(path)
    except (OSError, ValueError):
        return None
    if "manifest" not in arrays and "members" in arrays:
        raise BadInput(
            f"{path.parent} has an index.npz of data_prep/pack.py but no manifest.json, so it is an incomplete copy; "
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
    """Write the manifest and index to the first of the candidates that can be written."""
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
        _note(f"{folder} cannot be written ({reason}), so the index of its tars is kept in {elsewhere}")
    except CannotWrite:
        _note(f"{folder} cannot be written ({reason}), nor can {elsewhere}: its tars are read again each time")


def _note(message: str) -> None:
    if speaks():
        print(f"note: {message}", file=sys.stderr, flush=True)
