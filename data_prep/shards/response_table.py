"""targets.npz: the responses and descriptions of all stimuli in one file.

They lie in the shards as well; a run on remote shards reads them here, or it would have to fetch every shard before its
first step.

    <split>.rates      float32 (stimuli, sites), NaN = not recorded; absent where the split has no responses
    <split>.json       uint8 (bytes,), the JSON members one after the other
    <split>.json_end   int64 (stimuli,), where each of them ends
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from data_prep.common.atomic_writes import write_npz
from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import npz_arrays
from data_prep.shards.manifest import Manifest, Table

if TYPE_CHECKING:
    from data_prep.shards.folder import ShardFolder


@dataclass(frozen=True)
class Targets:
    """Responses and descriptions of a split's stimuli; the arrays are described at the top of this file."""

    rates: np.ndarray | None
    json: np.ndarray
    json_end: np.ndarray

    @property
    def is_plain(self) -> bool:
        """Whether the arrays are of their types, and no description ends before it begins or beyond the end."""
        types = self.json.dtype == np.uint8 and self.json_end.dtype.kind == "i"
        if not types or self.json.ndim != 1 or (self.rates is not None and self.rates.dtype != np.float32):
            return False
        return bool((np.diff(self.json_end, prepend=0) >= 0).all() and (self.json_end <= len(self.json)).all())

    def meta(self, position: int) -> bytes:
        """A stimulus's JSON member."""
        start = int(self.json_end[position - 1]) if position else 0
        return self.json[start : int(self.json_end[position])].tobytes()


def write_targets(folder: Path, shards: "ShardFolder") -> dict[str, Table]:
    """Write targets.npz beside the shards.

    Returns:
        The tables that lie there now, index.npz too, for the manifest.
    """
    arrays: dict[str, np.ndarray] = {}
    for name in shards.manifest.splits:
        split = shards.split(name)
        parts = [split.member(position, "json") or b"{}" for position in range(len(split))]
        arrays[f"{name}.json"] = np.frombuffer(b"".join(parts), np.uint8)
        arrays[f"{name}.json_end"] = np.cumsum([len(part) for part in parts], dtype=np.int64)
        if split.has_responses:
            arrays[f"{name}.rates"] = split.rates()
    write_npz(folder / "targets.npz", arrays)
    return {file: _table(folder / file) for file in ("index.npz", "targets.npz")}


def _table(path: Path) -> Table:
    with path.open("rb") as file:
        return Table(bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def load_targets(file: BinaryIO, name: str, manifest: Manifest) -> dict[str, Targets]:
    """Read what `write_targets` has written, by split.

    Args:
        file: targets.npz, opened.
        name: of the file, for messages.
        manifest: of the shards.

    Raises:
        BadInput: it is damaged, or of other shards.
    """
    try:
        arrays = npz_arrays(file)
        found = {
            split: Targets(arrays.get(f"{split}.rates"), arrays[f"{split}.json"], arrays[f"{split}.json_end"])
            for split in manifest.splits
        }
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{name} cannot be read ({error}); pack the recording again") from None
    for split, facts in manifest.splits.items():
        rates, expected = found[split].rates, (facts.stimuli, len(manifest.sites))
        if not found[split].is_plain:
            raise BadInput(f"{name}: {split}: holds other types than float32, uint8 and int64; pack again")
        shape = rates.shape if rates is not None else expected if not facts.responses else None
        if shape != expected or found[split].json_end.shape != expected[:1]:
            raise BadInput(f"{name}: {split}: is not of the stimuli that manifest.json counts; pack again")
        if rates is not None and np.isinf(rates).any():
            raise BadInput(f"{name}: {split}: holds an infinite rate; NaN stands for what was not recorded")
    return found
