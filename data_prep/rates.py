"""From spike times to spike counts and rates."""

from collections.abc import Sequence

import numpy as np


def counts_in_windows(spikes: np.ndarray, onsets: np.ndarray, windows: Sequence[tuple[float, float]]) -> np.ndarray:
    """Count the spikes of one unit in windows after each onset; a spike on the start counts, one on the end does not.

    Args:
        spikes: float (spikes,), times in seconds; sorted here if they are not.
        onsets: float (presentations,), seconds on the same clock; NaN = not known.
        windows: start and end of each window after the onset, in ms.

    Returns:
        float32 (presentations, windows); NaN where the onset is.
    """
    if len(spikes) and np.any(np.diff(spikes) < 0):
        spikes = np.sort(spikes)
    counts = np.empty((len(onsets), len(windows)), np.float32)
    for k, (start, end) in enumerate(windows):
        until = [np.searchsorted(spikes, onsets + edge / 1000, side="left") for edge in (start, end)]
        counts[:, k] = until[1] - until[0]
    counts[np.isnan(onsets)] = np.nan
    return counts
