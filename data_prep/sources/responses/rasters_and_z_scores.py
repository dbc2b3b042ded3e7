"""Responses computed when they are read: spikes/s counted in rasters, and z-scores of rates or trials.

Both are indexed by stimuli like an array (stimuli, repetitions, sites), take little memory, and can be pickled to the
packing processes.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_prep.common.errors import BadInput
from data_prep.sources.files.tables import Table
from data_prep.sources.responses.response_arrays import Responses, map_npy, open_npy
from data_prep.spikes import SessionScale, per_second, raster_bins, raster_counts

_BLOCK_STIMULI = 64


class CountedRasters:
    """Single trials in spikes/s, counted in rasters with bins of 1 ms.

    Args:
        rasters: integers (stimuli, repetitions, sites, bins) in a .npy file; negative = missing trial.
        first_ms: start of the first bin after stimulus onset.
        window_ms: of the response.
        baseline_ms: of a baseline that is subtracted from the same trial, or None.

    Raises:
        BadInput: windows that lie outside the rasters.
    """

    def __init__(
        self,
        rasters: Responses,
        first_ms: float,
        window_ms: tuple[float, float],
        baseline_ms: tuple[float, float] | None,
    ):
        for flag, window in (("--window-ms", window_ms), ("--baseline-ms", baseline_ms)):
            if window is None:
                continue
            try:
                raster_bins(rasters.shape[-1], first_ms, window)
            except BadInput as error:
                raise BadInput(f"{rasters.path}: {flag}: {error}") from None
        self._rasters, self._first_ms = rasters, first_ms
        self._window_ms, self._baseline_ms = window_ms, baseline_ms

    def __getitem__(self, stimuli: int | slice) -> np.ndarray:
        """float64 (..., repetitions, sites); NaN for a missing trial."""
        rasters = self._rasters.load()[stimuli]
        rates = self._rates(rasters, self._window_ms)
        return rates if self._baseline_ms is None else rates - self._rates(rasters, self._baseline_ms)

    def _rates(self, rasters: np.ndarray, window_ms: tuple[float, float]) -> np.ndarray:
        return per_second(raster_counts(rasters, self._first_ms, window_ms), window_ms)


class ZScored:
    """Responses as z-scores within sessions, per site over all presentations of a session.

    Args:
        responses: (stimuli, sites) or (stimuli, repetitions, sites), NaN = missing.
        sessions: int, the shape of `responses` without its last axis.
    """

    def __init__(self, responses: Responses, sessions: np.ndarray):
        self._responses, self._sessions = responses, sessions
        self._scale = SessionScale(int(sessions.max()) + 1, responses.shape[-1])
        numbers = responses.load()
        for start in range(0, responses.shape[0], _BLOCK_STIMULI):
            block = np.asarray(numbers[start : start + _BLOCK_STIMULI])
            self._scale.add(block.reshape(-1, block.shape[-1]), sessions[start : start + _BLOCK_STIMULI].ravel())

    def __getitem__(self, stimuli: int | slice) -> np.ndarray:
        """float64, the shape of the responses to these stimuli."""
        return self._scale.z_score(np.asarray(self._responses.load()[stimuli], np.float64), self._sessions[stimuli])


def count_rasters(
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
    rasters.check_shape(stimuli, ("stimuli", "repetitions", "sites", "milliseconds"))
    return Responses(path, rasters.shape[:-1], CountedRasters(rasters, first_ms, window_ms, baseline_ms))


def to_z_scores(responses: Responses, sessions: str | None, table: Table) -> Responses:
    """Responses as z-scores.

    Args:
        responses: rates or trials.
        sessions: a column of `table`, a .npy file of integers, or None for one session.
        table: of the stimuli.

    Raises:
        BadInput: `sessions` is neither, or has another shape than the presentations.
    """
    shape = responses.shape[:-1]
    if sessions is None:
        numbers = np.zeros(shape, np.int64)
    elif sessions.endswith(".npy"):
        numbers = _read_sessions(Path(sessions), shape)
    else:
        numbers = _number_sessions(table.complete_column(sessions, "--sessions"), shape)
    return replace(responses, array=ZScored(responses, numbers))


def _number_sessions(names: Sequence | np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sessions named per stimulus, or per stimulus and repetition, as numbers from 0: int, of `shape`."""
    names = np.asarray(names)
    numbers = np.unique(names, return_inverse=True)[1].reshape(names.shape)
    missing_axes = len(shape) - numbers.ndim
    return np.broadcast_to(numbers.reshape(numbers.shape + (1,) * missing_axes), shape)


def _read_sessions(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    sessions = map_npy(path)
    if sessions.shape != shape or sessions.dtype.kind not in "iu":
        raise BadInput(f"{path}: {sessions.dtype} of shape {sessions.shape}; expected integers of shape {shape}")
    return _number_sessions(sessions, shape)
