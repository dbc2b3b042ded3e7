"""From spikes to responses: counts in windows, spikes per second, z-scores within sessions.

Windows are half-open, [start, end), relative to stimulus onset, in the time unit of the spikes.
"""

from collections.abc import Sequence

import numpy as np

from data_prep.common.errors import BadInput

Windows = Sequence[tuple[float, float]] | np.ndarray


def spike_counts(spike_times: np.ndarray, onsets: np.ndarray, windows: Windows) -> np.ndarray:
    """Count a site's spikes in windows around each presentation.

    Args:
        spike_times: float (spikes,), in ascending order.
        onsets: float (presentations,), stimulus onsets on the same clock, in the same unit; NaN = not presented.
        windows: (start, end) after onset, in the same unit; a spike at `start` counts, one at `end` does not.

    Returns:
        float64 (presentations, windows); NaN where the onset is NaN.

    Raises:
        BadInput: a window that does not start before it ends, or spike times that are NaN or out of order.
    """
    check_windows(windows)
    spike_times, onsets = np.asarray(spike_times, np.float64), np.asarray(onsets, np.float64)
    if not (np.diff(spike_times) >= 0).all() or np.isnan(spike_times).any():
        raise BadInput("spike times must be in ascending order, without NaN")
    counts = np.empty((len(onsets), len(windows)))
    for k, (start, end) in enumerate(windows):
        first = np.searchsorted(spike_times, onsets + start, side="left")
        counts[:, k] = np.searchsorted(spike_times, onsets + end, side="left") - first
    counts[np.isnan(onsets)] = np.nan
    return counts


def raster_counts(rasters: np.ndarray, first_ms: float, window_ms: tuple[float, float]) -> np.ndarray:
    """Count spikes in a window of rasters with bins of 1 ms.

    Args:
        rasters: integer (..., bins), spikes per millisecond; a trial with a negative number in the window is missing.
        first_ms: start of the first bin, after stimulus onset.
        window_ms: (start, end) after onset.

    Returns:
        float64 (...,), spikes; NaN = missing.

    Raises:
        BadInput: the window is not within the rasters, or does not start and end on a bin's edge.
    """
    bins = raster_bins(rasters.shape[-1], first_ms, window_ms)
    inside = rasters[..., bins]
    missing = ~(inside >= 0).all(axis=-1)
    return np.where(missing, np.nan, inside.sum(axis=-1, dtype=np.float64))


def raster_bins(bins: int, first_ms: float, window_ms: tuple[float, float]) -> slice:
    """The bins of a window, see `raster_counts`."""
    check_windows([window_ms])
    first, last = window_ms[0] - first_ms, window_ms[1] - first_ms
    if first != int(first) or last != int(last):
        raise BadInput(
            f"the window {_text(window_ms)} ms must start and end on the edge of a 1 ms bin ({first_ms:g} + k)"
        )
    if first < 0 or last > bins:
        raise BadInput(
            f"the window {_text(window_ms)} ms is not within the rasters, which span {first_ms:g} to "
            f"{first_ms + bins:g} ms after stimulus onset"
        )
    return slice(int(first), int(last))


def per_second(counts: np.ndarray, window_ms: tuple[float, float]) -> np.ndarray:
    """Counts in a window -> spikes/s."""
    return counts / ((window_ms[1] - window_ms[0]) / 1000)


def check_windows(windows: Windows) -> None:
    """Raise BadInput for the first window that does not start before it ends."""
    for start, end in windows:
        if not start < end:
            raise BadInput(f"a window must start before it ends, not {_text((start, end))}")


def _text(window: tuple[float, float]) -> str:
    return f"{window[0]:g} to {window[1]:g}"


class SessionScale:
    """Mean and standard deviation of every site in every session, over all its presentations.

    Presentations are added block by block, in float64 and merged by Chan's update, so that a recording never has to be
    in memory as a whole.

    Args:
        sessions: number of sessions; they are numbered from 0.
        sites: number of sites.
    """

    def __init__(self, sessions: int, sites: int):
        self.count = np.zeros((sessions, sites))
        self._mean = np.zeros((sessions, sites))
        self._squares = np.zeros((sessions, sites))

    def add(self, responses: np.ndarray, session: np.ndarray) -> None:
        """Add presentations.

        Args:
            responses: float (presentations, sites), NaN = missing.
            session: int (presentations,), the number of each presentation's session.
        """
        for number in np.unique(session):
            block = responses[session == number].astype(np.float64)
            recorded = ~np.isnan(block)
            n = recorded.sum(axis=0)
            mean = np.where(recorded, block, 0).sum(axis=0) / np.maximum(n, 1)
            squares = (np.where(recorded, block - mean, 0) ** 2).sum(axis=0)
            joint = np.maximum(self.count[number] + n, 1)
            delta = mean - self._mean[number]
            self._squares[number] += squares + delta**2 * self.count[number] * n / joint
            self._mean[number] += delta * n / joint
            self.count[number] += n

    @property
    def mean(self) -> np.ndarray:
        """float64 (sessions, sites); NaN where a site has no presentation."""
        return np.where(self.count > 0, self._mean, np.nan)

    @property
    def std(self) -> np.ndarray:
        """float64 (sessions, sites), of the population (divided by the count); NaN where the responses do not vary."""
        std = np.sqrt(self._squares / np.maximum(self.count, 1))
        return np.where(std > 1e-12 * np.abs(self._mean), std, np.nan)

    def z_score(self, responses: np.ndarray, session: np.ndarray) -> np.ndarray:
        """Responses in standard deviations from the session's mean: float64, the shape of `responses`.

        NaN where a site does not vary within a session.
        """
        return (responses - self.mean[session]) / self.std[session]
