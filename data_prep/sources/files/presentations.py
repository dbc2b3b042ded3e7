"""From presentations, in the order of the recording, to the trials of each stimulus."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from data_prep.recording import trial_average

TRIALS_BYTES = 128 * 2**20  # size of the trials that are gathered in one pass over a source


def rows_by_stimulus(stimuli: Sequence[str], order: Sequence[Any] | np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Which presentations showed each stimulus.

    Args:
        stimuli: the stimulus of every presentation.
        order: sorts the presentations of a stimulus, e.g. the number of the repetition; by default they keep their
            order.

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
    """Yield the trials of each stimulus in turn, in passes over a source that is in the order of presentation.

    A pass reads only the blocks of the source that hold a presentation it needs, each once.

    Args:
        read: from a range of presentations to their responses, (presentations, sites).
        rows: the presentations of each stimulus; empty for one that was not shown.
        sites: number of sites.
        rows_at_once: length of a block.

    Yields:
        float32 (presentations of the stimulus, sites).
    """
    most_rows = rows_in_memory(sites)
    start = 0
    while start < len(rows):
        end, total = start + 1, len(rows[start])
        while end < len(rows) and total + len(rows[end]) <= most_rows:
            total += len(rows[end])
            end += 1
        yield from _gather_in_one_pass(read, rows[start:end], sites, rows_at_once)
        start = end


def rows_in_memory(sites: int) -> int:
    """Number of presentations, float32 (presentations, sites), that take `TRIALS_BYTES`."""
    return max(1, TRIALS_BYTES // (4 * max(1, sites)))


def _gather_in_one_pass(
    read: Callable[[slice], np.ndarray], rows: Sequence[np.ndarray], sites: int, rows_at_once: int
) -> Iterator[np.ndarray]:
    wanted = np.concatenate(rows).astype(np.int64)
    order = np.argsort(wanted, kind="stable")
    trials = np.empty((len(wanted), sites), np.float32)
    blocks = np.split(order, np.flatnonzero(np.diff(wanted[order] // rows_at_once)) + 1)
    for block in blocks:
        if not len(block):
            continue
        first, last = int(wanted[block[0]]), int(wanted[block[-1]])
        with np.errstate(over="ignore"):  # too large for float32 becomes inf, which is refused later
            trials[block] = read(slice(first, last + 1))[wanted[block] - first]
    yield from np.split(trials, np.cumsum([len(stimulus_rows) for stimulus_rows in rows])[:-1])


def rates_and_trials(
    trials_per_stimulus: Iterable[np.ndarray], repetitions: int
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Yield `Stimulus.rates` and `Stimulus.trials`.

    Args:
        trials_per_stimulus: float32 (presentations, sites) for each stimulus.
        repetitions: the largest number of any stimulus; if it is 1, the responses are rates and there are no trials.
    """
    for trials in trials_per_stimulus:
        if repetitions == 1:
            yield (trials[0] if len(trials) else np.full(trials.shape[1], np.nan, np.float32)), None
        else:
            yield trial_average(trials), pad_repetitions(trials, repetitions)


def pad_repetitions(trials: np.ndarray, repetitions: int) -> np.ndarray:
    """Trials (presentations, sites), padded with rows of NaN to a number of repetitions."""
    return np.pad(trials, ((0, repetitions - len(trials)), (0, 0)), constant_values=np.nan)
