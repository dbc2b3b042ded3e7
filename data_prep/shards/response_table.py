"""targets.npz: the responses and descriptions of all stimuli in one file.

The shards contain them as well. A run on remote shards reads them here, to avoid fetching every shard before its first
step.

    <split>.rates      float32 (stimuli, sites), NaN = not recorded; absent if the split has no responses
    <split>.json       uint8 (bytes,), the JSON members, concatenated
    <split>.json_end   int64 (stimuli,), the end of each of them
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_prep.common.atomic_writes import write_npz
from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import read_npz
from data_prep.shards.manifest import Manifest

FILE = "targets.npz"


@dataclass(frozen=True)
class ResponseTable:
    """Responses and descriptions of a split's stimuli; the arrays are described at the top of this file."""

    rates: np.ndarray | None
    json: np.ndarray
    json_end: np.ndarray

    @classmethod
    def of(cls, rates: np.ndarray | None, descriptions: Sequence[bytes]) -> "ResponseTable":
        """The table of a split.

        Args:
            rates: float32 (stimuli, sites), or None for a split without responses.
            descriptions: the JSON member of each stimulus.
        """
        ends = np.cumsum([len(description) for description in descriptions], dtype=np.int64)
        return cls(rates, np.frombuffer(b"".join(descriptions), np.uint8), ends)

    @property
    def is_well_formed(self) -> bool:
        """Whether the arrays have the right types, and every description lies within `json`."""
        types = self.json.dtype == np.uint8 and self.json_end.dtype.kind == "i"
        if not types or self.json.ndim != 1 or (self.rates is not None and self.rates.dtype != np.float32):
            return False
        return bool((np.diff(self.json_end, prepend=0) >= 0).all() and (self.json_end <= len(self.json)).all())

    def description(self, position: int) -> bytes:
        """A stimulus's JSON member."""
        start = int(self.json_end[position - 1]) if position else 0
        return self.json[start : int(self.json_end[position])].tobytes()


def write_response_table(folder: Path, tables: Mapping[str, ResponseTable]) -> None:
    """Write targets.npz into a shard folder.

    Args:
        folder: of the shards.
        tables: by split.

    Raises:
        CannotWrite: the disk is full, the folder read-only ...
    """
    arrays: dict[str, np.ndarray] = {}
    for split, table in tables.items():
        arrays[f"{split}.json"] = table.json
        arrays[f"{split}.json_end"] = table.json_end
        if table.rates is not None:
            arrays[f"{split}.rates"] = table.rates
    write_npz(folder / FILE, arrays)


def load_response_table(file: BinaryIO, name: str, manifest: Manifest) -> dict[str, ResponseTable]:
    """Read a file of `write_response_table`: the table of each split.

    Args:
        file: targets.npz, opened.
        name: of the file, for messages.
        manifest: of the shards.

    Raises:
        BadInput: it is damaged, or belongs to other shards.
    """
    tables: dict[str, ResponseTable] = {}
    try:
        arrays = read_npz(file)
        for split in manifest.splits:
            rates = arrays.get(f"{split}.rates")
            tables[split] = ResponseTable(rates, arrays[f"{split}.json"], arrays[f"{split}.json_end"])
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{name} cannot be read ({error}); pack the recording again") from None
    for split, table in tables.items():
        _check(table, f"{name}: {split}", manifest, split)
    return tables


def _check(table: ResponseTable, location: str, manifest: Manifest, split: str) -> None:
    facts = manifest.splits[split]
    if not table.is_well_formed:
        raise BadInput(f"{location}: damaged arrays (other types, or ends out of order); pack the recording again")
    matches = table.json_end.shape == (facts.stimuli,)
    if table.rates is None:
        matches = matches and not facts.responses
    else:
        matches = matches and table.rates.shape == (facts.stimuli, len(manifest.sites))
    if not matches:
        raise BadInput(f"{location}: does not have the stimuli of manifest.json; pack the recording again")
    if table.rates is not None and np.isinf(table.rates).any():
        raise BadInput(f"{location}: contains an infinite rate; use NaN for missing responses")
