"""Safe and unique ids of stimuli and sites, and the selection of sites by their facts."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common.errors import BadInput


def safe_ids(names: Sequence[str]) -> list[str]:
    """Ids for the shards, where they become file names: anything but letters, digits, `_` and `-` becomes `_`.

    Names that would get the same id have part of their hash appended.
    """
    ids = [re.sub(r"[^A-Za-z0-9_-]", "_", name) or "_" for name in names]
    names_with_id: dict[str, set[str]] = {}
    for name, safe in zip(names, ids, strict=True):
        names_with_id.setdefault(safe, set()).add(name)
    return [
        safe if len(names_with_id[safe]) == 1 else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        for name, safe in zip(names, ids, strict=True)
    ]


def source_id(name: str, safe_id: str) -> dict[str, Any]:
    """The fact that records a stimulus's name in the source, if its id differs from the name."""
    return {} if safe_id == name else {"source_id": name}


def unique_site_ids(names: Sequence[str], owners: Sequence[str]) -> list[str]:
    """Ids for sites: their names if these are unique, else prefixed with the owner (animal, recording).

    Raises:
        BadInput: the prefixed names are not unique either.
    """
    if len(set(names)) == len(names):
        return list(names)
    ids = [f"{owner}_{name}" if owner else name for owner, name in zip(owners, names, strict=True)]
    if len(set(ids)) != len(ids):
        repeated = next(name for k, name in enumerate(ids) if name in ids[:k])
        raise BadInput(f"two sites are named {repeated!r}; each needs its own id")
    return ids


def select_sites(
    sites: Sequence[dict[str, Any]], fact: str, wanted: Sequence[str], flag: str, path: Path | str
) -> np.ndarray:
    """Which sites have one of the wanted values of a fact.

    Args:
        sites: facts about every site.
        fact: name of the fact to select by, such as "region".
        wanted: values to select; if empty, all sites are selected.
        flag: the option, for the message.
        path: of the file, for the message.

    Returns:
        bool (sites,).

    Raises:
        BadInput: a value that no site has; the message lists those that exist.
    """
    values = [str(site[fact]) if fact in site else None for site in sites]
    for value in wanted:
        if value not in values:
            known = ", ".join(sorted({value for value in values if value is not None})) or "none"
            raise BadInput(f"{path}: no site has the {fact} {value!r} ({flag}); the sites have: {known}")
    return np.array([not wanted or value in wanted for value in values], dtype=bool)
