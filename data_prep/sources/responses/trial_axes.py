"""Which axis of single trials is the repetitions, and whether trials and rates agree.

Trials are (stimuli, repetitions, sites). An array that is (stimuli, sites, repetitions) would pass for few "sites" with
many "repetitions", so the order is checked: repetitions of a site are alike, sites differ.
"""

from typing import Literal

import numpy as np

from data_prep.common.errors import BadInput
from data_prep.recording import trial_average
from data_prep.sources.responses.response_arrays import Responses

TrialAxes = Literal["repetitions-sites", "sites-repetitions"]

MOST_SAMPLED = 512  # stimuli that are looked at
MOST_COMPARED = 12  # slices along an axis that are correlated
CERTAIN = 0.999  # quantile beyond which a ratio of variances decides
LEAST_RATIO = 3.0
LEAST_RATIO_TO_ERROR = 30.0  # of a single axis: repetitions differ too, as responses adapt
TOLERANCE = 2e-3  # of a site's largest mean: rates may be stored as float16


class _SwappedAxes:
    """Trials whose last two axes are swapped when they are read."""

    def __init__(self, trials: Responses):
        self._trials = trials

    def __getitem__(self, stimuli: int | slice) -> np.ndarray:
        return np.swapaxes(np.asarray(self._trials.load()[stimuli]), -1, -2)


def in_order(trials: Responses, axes: TrialAxes | None, sites: int | None) -> Responses:
    """Trials as (stimuli, repetitions, sites).

    Args:
        trials: as they are in the file.
        axes: their order, if the user says it.
        sites: their number, if it is known.

    Raises:
        BadInput: the order is not said, and the numbers speak for the other one or for none.
    """
    if axes == "repetitions-sites":
        return trials
    stimuli, first, second = trials.shape
    if axes == "sites-repetitions":
        return Responses(trials.path, (stimuli, second, first), _SwappedAxes(trials))
    if sites is not None and sites != first:
        return trials  # the other files must have as many sites as this one's last axis, which is checked elsewhere
    if sites is not None and first != second:
        raise BadInput(
            f"{trials.path}: the shape {trials.shape} looks like (stimuli, sites, repetitions), as there are {sites} "
            "sites; if so, pack with --trial-axes sites-repetitions"
        )
    looks_like = _order_by_numbers(_sample(trials))
    if looks_like == "sites-repetitions":
        raise BadInput(
            f"{trials.path}: the shape {trials.shape} looks like (stimuli, sites, repetitions), as the numbers differ "
            "more along its second axis than along its third; say which with --trial-axes sites-repetitions or "
            "--trial-axes repetitions-sites"
        )
    if looks_like is None:
        raise BadInput(
            f"{trials.path}: the numbers do not tell whether the shape {trials.shape} is (stimuli, repetitions, sites) "
            "or (stimuli, sites, repetitions); say which with --trial-axes repetitions-sites or "
            "--trial-axes sites-repetitions"
        )
    return trials


def _sample(trials: Responses) -> np.ndarray:
    """The trials of evenly spaced stimuli, float64 (stimuli, first axis, second axis)."""
    array = trials.load()
    positions = np.unique(np.linspace(0, trials.shape[0] - 1, MOST_SAMPLED).astype(int))
    return np.stack([np.asarray(array[int(position)], np.float64) for position in positions])


def _order_by_numbers(sample: np.ndarray) -> TrialAxes | None:
    """The order that means, correlations or missing trials speak for, in this order; None if they do not tell."""
    for differences in (_means_differ, _correlations_differ, _missing_differ):
        first, second = differences(sample), differences(sample.swapaxes(1, 2))
        if second > max(first, 1):
            return "repetitions-sites"
        if first > max(second, 1):
            return "sites-repetitions"
    return None


def _means_differ(sample: np.ndarray) -> float:
    """How surely the mean over stimuli differs more along the first axis than along the second; above 1 decides.

    Repetitions have the same mean but for noise. Of an axis of length 1 nothing is known, so there the differences are
    compared with their standard error.
    """
    from scipy.stats import f  # slow to import

    recorded = ~np.isnan(sample)
    count = np.maximum(recorded.sum(0), 1)
    mean = np.where(recorded, sample, 0).sum(0) / count
    here, there = sample.shape[1:]
    if here == 1 or not recorded.any(0).all():
        return 0.0
    along_here = mean.var(axis=0, ddof=1).mean()
    if there == 1:
        squared_error = (np.where(recorded, (sample - mean) ** 2, 0).sum(0) / count**2).mean()
        return float(along_here / squared_error / LEAST_RATIO_TO_ERROR) if squared_error > 0 else 0.0
    along_there = mean.var(axis=1, ddof=1).mean()
    freedom = there * (here - 1), here * (there - 1)
    threshold = max(LEAST_RATIO, float(f.ppf(CERTAIN, *freedom)))
    return float(along_here / along_there / threshold) if along_there > 0 else float(np.inf if along_here > 0 else 0)


def _correlations_differ(sample: np.ndarray) -> float:
    """How much correlations over stimuli differ between pairs along the first axis, beyond noise; above 1 decides.

    All pairs of repetitions of a site correlate alike; pairs of sites do not.
    """
    stimuli, here, there = sample.shape
    if here < 3 or stimuli < 3 or there == 1:
        return 0.0
    spreads = []
    chosen = np.unique(np.linspace(0, here - 1, MOST_COMPARED).astype(int))
    pairs = np.triu_indices(len(chosen), 1)
    for k in np.unique(np.linspace(0, there - 1, MOST_COMPARED).astype(int)):
        rows = sample[:, chosen, k]
        if np.isnan(rows).all(axis=0).any():
            continue
        rows = np.where(np.isnan(rows), np.nanmean(rows, axis=0), rows)
        if (rows.std(axis=0) > 0).all():
            spreads.append(np.corrcoef(rows.T)[pairs].var())
    return float(np.mean(spreads) * stimuli / LEAST_RATIO) if spreads else 0.0


def _missing_differ(sample: np.ndarray) -> float:
    """2 if the second axis alone tells which trials are missing, as repetitions that were not shown are; else 0."""
    missing = np.isnan(sample)
    partly = missing[missing.any((1, 2)) & ~missing.all((1, 2))]
    if min(sample.shape[1:]) == 1 or not len(partly):
        return 0.0
    same_along_first = bool((partly == partly[:, :1]).all())
    same_along_second = bool((partly == partly[:, :, :1]).all())
    return 2.0 if same_along_first and not same_along_second else 0.0


def check_agreement(rates: Responses, trials: Responses, stimulus_ids: list[str], site_ids: list[str]) -> None:
    """Refuse rates that are not the means of the trials.

    Args:
        rates: (stimuli, sites).
        trials: (stimuli, repetitions, sites).
        stimulus_ids, site_ids: for the message.

    Raises:
        BadInput: naming a stimulus and a site with both numbers.
    """
    given = np.asarray(rates.load()[: len(stimulus_ids)], np.float64)
    array = trials.load()
    mean = np.stack([trial_average(np.asarray(array[row])) for row in range(len(stimulus_ids))]).astype(np.float64)
    scale = np.nan_to_num(np.nanmax(np.where(np.isnan(mean), -np.inf, np.abs(mean)), axis=0), neginf=0.0)
    with np.errstate(invalid="ignore"):
        differ = (np.isnan(given) != np.isnan(mean)) | (np.abs(given - mean) > TOLERANCE * scale)
    if not differ.any():
        return
    row, site = np.argwhere(differ)[0]
    raise BadInput(
        f"{rates.path} and {trials.path} disagree in {int(differ.sum()):,} of {differ.size:,} responses: that of site "
        f"{site_ids[site]!r} to stimulus {stimulus_ids[row]!r} is {given[row, site]:.6g} in the first, and the mean of "
        f"its repetitions {mean[row, site]:.6g} in the second; remove the wrong file"
    )
