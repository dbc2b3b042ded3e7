"""From presentations, in the order in which they were shown, to the trials of each stimulus."""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from data_prep.common.errors import BadInput
from data_prep.recording import trial_average

TRIALS_BYTES = 128 * 2**20  # trials that are gathered in one pass over a source


def rows_by_stimulus(stimuli: Sequence[str], order: Sequence[Any] | None = None) -> dict[str, np.ndarray]:
    """Which presentations showed each stimulus.

    Args:
        stimuli: the stimulus of every presentation.
        order: sorts the presentations of one stimulus, by number of repetition for instance; by default they stay as
            they are.

    Returns:
        {stimulus: int64 rows in `stimuli`}, the stimuli in the order of their first presentation.
    """
    if not len(stimuli):
        return {}
    names, first, number = np.unique(np.asarray(stimuli), return_index=True, return_inverse=True)
    position = np.arange(len(stimuli))
    keys = (position, number) if order is None else (position, np.asarray(order), number)
    groups = np.split(np.lexsort(keys), np.cumsum(np.bincount(number))[:-1])
    return {str(names[k]): groups[k] for k in np.argsort(first)}


def gather_trials(
    read: Callable[[slice], np.ndarray], rows: Sequence[np.ndarray], sites: int, rows_at_once: int
) -> Iterator[np.ndarray]:
    """Yield the trials of one stimulus after the other, in passes over a source that is in the order of presentation.

    A pass reads those pieces of the source that hold a presentation it needs, each once.

    Args:
        read: from a range of presentations to their responses, (presentations, sites).
        rows: of each stimulus, the presentations; none for one that was not shown.
        sites: number of sites.
        rows_at_once: length of a piece.

    Yields:
        float32 (presentations of the stimulus, sites).
    """
    room = max(1, TRIALS_BYTES // (4 * max(1, sites)))
    start = 0
    while start < len(rows):
        end, total = start + 1, len(rows[start])
        while end < len(rows) and total + len(rows[end]) <= room:
            total += len(rows[end])
            end += 1
        yield from _one_pass(read, rows[start:end], sites, rows_at_once)
        start = end


def _one_pass(read: Callable, rows: Sequence[np.ndarray], sites: int, rows_at_once: int) -> Iterator[np.ndarray]:
    wanted = np.concatenate(rows).astype(np.int64)
    order = np.argsort(wanted, kind="stable")
    trials = np.empty((len(wanted), sites), np.float32)
    pieces = np.split(order, np.flatnonzero(np.diff(wanted[order] // rows_at_once)) + 1)
    for piece in (piece for piece in pieces if len(piece)):
        first, last = int(wanted[piece[0]]), int(wanted[piece[-1]])
        with np.errstate(over="ignore"):  # what is too large for float32 becomes inf, which is refused
            trials[piece] = read(slice(first, last + 1))[wanted[piece] - first]
    yield from np.split(trials, np.cumsum([len(part) for part in rows])[:-1])


def rates_and_trials(found: Iterator[np.ndarray], repetitions: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """From the trials of each stimulus, float32 (presentations, sites), to rates and trials as a Stimulus has them.

    Args:
        found: the trials.
        repetitions: the most that any stimulus has; with one, what was recorded are rates and there are no trials.
    """
    for trials in found:
        if repetitions == 1:
            yield (trials[0] if len(trials) else np.full(trials.shape[1], np.nan, np.float32)), None
        else:
            missing = repetitions - len(trials)
            yield trial_average(trials), np.pad(trials, ((0, missing), (0, 0)), constant_values=np.nan)


def safe_ids(names: Sequence[str]) -> list[str]:
    """Ids for the shards, where they become file names: letters, digits, `_` and `-`, anything else becomes `_`.

    Names that would become the same id get a part of their hash as well.
    """
    ids = [re.sub(r"[^A-Za-z0-9_-]", "_", name) or "_" for name in names]
    alike: dict[str, set[str]] = {}
    for name, safe in zip(names, ids, strict=True):
        alike.setdefault(safe, set()).add(name)
    return [
        safe if len(alike[safe]) == 1 else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        for name, safe in zip(names, ids, strict=True)
    ]


def select_sites(
    sites: Sequence[dict[str, Any]], field: str, wanted: Sequence[str], flag: str, path: Any
) -> np.ndarray:
    """Which sites have one of the wanted values.

    Args:
        sites: facts of every site.
        field: the fact that decides, such as "region".
        wanted: its values to keep; none keeps all sites.
        flag: the option, and `path`: the file, for the message.

    Returns:
        bool (sites,).

    Raises:
        BadInput: a value that no site has, with those there are.
    """
    values = [str(site[field]) if field in site else None for site in sites]
    for value in wanted:
        if value not in values:
            there = ", ".join(sorted({known for known in values if known is not None})) or "the file names none"
            raise BadInput(f"{path}: no site has the {field} {value!r} ({flag}); there are: {there}")
    return np.array([not wanted or value in wanted for value in values], dtype=bool)


def unique_site_ids(names: Sequence[str], owners: Sequence[str]) -> list[str]:
    """Ids for sites: the names where they are unique, else with the owner (animal, recording) before them.

    Raises:
        BadInput: they are not unique even so.
    """
    if len(set(names)) == len(names):
        return list(names)
    ids = [f"{owner}_{name}" if owner else name for owner, name in zip(owners, names, strict=True)]
    if len(set(ids)) != len(ids):
        twice = next(name for k, name in enumerate(ids) if name in ids[:k])
        raise BadInput(f"two sites are called {twice!r}; each needs an id of its own")
    return ids
