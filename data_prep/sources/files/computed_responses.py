"""Responses computed from others when they are read: spikes/s from rasters, z-scores from rates or trials.

Both look like an array (stimuli, repetitions, sites) that is indexed by stimuli, hold next to nothing, and can be
pickled to packing processes.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.common.errors import BadInput
from data_prep.sources.files.response_arrays import Responses, check_shape, open_npy
from data_prep.sources.files.tables import Table, filled
from data_prep.spikes import SessionScale, per_second, raster_bins, raster_counts

_BLOCK_STIMULI = 64


class CountedRasters:
    """Single trials in spikes/s, counted in rasters with bins of 1 ms.

    Args:
        rasters: integers (stimuli, repetitions, sites, bins) in a .npy file; negative = missing trial.
        first_ms: time of the first bin after stimulus onset.
        window_ms: of the response.
        baseline_ms: of a baseline that is subtracted from the same trial, or None.

    Raises:
        BadInput: an array of another shape, or windows outside it.
    """

    def __init__(
        self,
        rasters: Responses,
        first_ms: float,
        window_ms: tuple[float, float],
        baseline_ms: tuple[float, float] | None,
    ):
        for name, window in (("--window-ms", window_ms), ("--baseline-ms", baseline_ms)):
            if window is not None:
                try:
                    raster_bins(rasters.shape[-1], first_ms, window)
                except BadInput as fault:
                    raise BadInput(f"{rasters.path}: {name}: {fault}") from None
        self._rasters, self._first_ms = rasters, first_ms
        self._window_ms, self._baseline_ms = window_ms, baseline_ms
        self.shape = rasters.shape[:-1]

    def __getitem__(self, stimuli: int | slice) -> np.ndarray:
        """float64 (..., repetitions, sites); NaN for a missing trial."""
        rasters = self._rasters.load()[stimuli]
        rates = self._rate(rasters, self._window_ms)
        return rates if self._baseline_ms is None else rates - self._rate(rasters, self._baseline_ms)

    def _rate(self, rasters: np.ndarray, window_ms: tuple[float, float]) -> np.ndarray:
        return per_second(raster_counts(rasters, self._first_ms, window_ms), window_ms)


class ZScored:
    """Responses as z-scores within sessions, per site over all presentations of a session.

    Args:
        responses: (stimuli, sites) or (stimuli, repetitions, sites), with NaN for what is missing.
        sessions: int, the shape of `responses` without its last axis.
    """

    def __init__(self, responses: Responses, sessions: np.ndarray):
        self._responses, self._sessions, self.shape = responses, sessions, responses.shape
        self._scale = SessionScale(int(sessions.max()) + 1, responses.shape[-1])
        numbers = responses.load()
        for start in range(0, self.shape[0], _BLOCK_STIMULI):
            block = np.asarray(numbers[start : start + _BLOCK_STIMULI])
            self._scale.add(block.reshape(-1, block.shape[-1]), sessions[start : start + _BLOCK_STIMULI].ravel())

    def __getitem__(self, stimuli: int | slice) -> np.ndarray:
        """float64, the shape of the responses there."""
        return self._scale.z_score(np.asarray(self._responses.load()[stimuli], np.float64), self._sessions[stimuli])


def counted(
    path: Path,
    stimuli: int,
    first_ms: float,
    window_ms: tuple[float, float] | None,
    baseline_ms: tuple[float, float] | None,
) -> Responses:
    """Single trials (stimuli, repetitions, sites) in spikes/s from a .npy file of rasters, see `CountedRasters`."""
    if window_ms is None:
        raise BadInput(f"{path}: rasters need --window-ms, the window in which spikes are counted")
    rasters = open_npy(path)
    check_shape(rasters, stimuli, "(stimuli, repetitions, sites, milliseconds)", 4)
    array = CountedRasters(rasters, first_ms, window_ms, baseline_ms)
    return Responses(path, array.shape, array)


def z_scored(responses: Responses, sessions: str | None, table: Table) -> Responses:
    """Responses as z-scores.

    Args:
        responses: rates or trials.
        sessions: a column of `table`, a .npy file, or None for one session; see `ZScored`.
        table: of the stimuli.

    Raises:
        BadInput: `sessions` is neither.
    """
    shape = responses.shape[:-1]
    if sessions is None:
        numbers = np.zeros(shape, np.int64)
    elif sessions.endswith(".npy"):
        numbers = open_sessions(Path(sessions), shape)
    elif sessions in table.columns:
        numbers = number_sessions(filled(table, sessions), shape)
    else:
        raise table.lacks(sessions, "--sessions")
    return Responses(responses.path, responses.shape, ZScored(responses, numbers))


def number_sessions(names: Sequence | np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sessions named per stimulus, or per stimulus and repetition, as numbers from 0: int, of `shape`."""
    names = np.asarray(names)
    numbers = np.unique(names, return_inverse=True)[1].reshape(names.shape)
    missing_axes = len(shape) - numbers.ndim
    return np.broadcast_to(numbers.reshape(numbers.shape + (1,) * missing_axes), shape)


def open_sessions(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The session of each presentation from a .npy file of integers, of `shape`.

    Raises:
        BadInput: another shape or type.
    """
    sessions = open_npy(path)
    numbers = sessions.load()
    if sessions.shape != shape or numbers.dtype.kind not in "iu":
        raise BadInput(f"{path}: {numbers.dtype} of shape {sessions.shape}; expected are integers of shape {shape}")
    return number_sessions(numbers, shape)
