"""95 % confidence intervals from bootstrap resamples of the stimuli; docs/metrics.md shows how often they hold."""

import math
from dataclasses import dataclass

import numpy as np

TAIL = 0.025


@dataclass(frozen=True)
class PossibleValues:
    """The values that a quantity can have over endless stimuli: R2, for one, is 1 at most."""

    least: float = -math.inf
    most: float = math.inf


ANY_VALUE = PossibleValues()


def confidence_interval(
    estimate: float, resampled: np.ndarray, stimuli: int, possible: PossibleValues = ANY_VALUE
) -> tuple[float, float] | None:
    """The 95 % interval, over endless stimuli, of a quantity that was estimated from some of them.

    The plain percentile interval is wrong for R2. On average a score over n stimuli lies (1 - R2) / n below that over
    endless ones, and a score over a resample as far below the first; the mean over many sites may not vary much more
    than that. So both biases, which the resamples estimate (Efron and Tibshirani 1993, chapter 10), are taken off. The
    tails are the expanded ones of Hesterberg (2015, "What teachers should know about the bootstrap", section 4.3),
    because resamples of few stimuli spread less than samples do.

    The bias is taken off as a shift, but that of a good score shrinks with its distance from 1: with few stimuli, the
    shift by what bad resamples show can lead beyond what is possible. Those values are left out, and as the truth is
    none of them, the interval holds as often as before.

    Args:
        estimate: from all stimuli.
        resampled: the same from resamples of the stimuli, float64 (resamples,); those that are not finite are left out.
        stimuli: number of stimuli.
        possible: the interval ends there.

    Returns:
        Lower and upper end; None if there is no finite value or only one stimulus, or nothing possible is left.
    """
    resampled = resampled[np.isfinite(resampled)]
    if stimuli < 2 or not resampled.size or not math.isfinite(estimate):
        return None
    bias = resampled.mean() - estimate
    tail = _expanded_tail(stimuli)
    low, high = np.quantile(resampled, [tail, 1 - tail]) - 2 * bias
    low, high = max(float(low), possible.least), min(float(high), possible.most)
    return (low, high) if low <= high else None


def percentile_interval(resampled: np.ndarray, stimuli: int) -> tuple[float, float] | None:
    """The 95 % interval, over endless stimuli, of a median over sites: percentiles with the expanded tails.

    No bias is taken off. Resamples show that of a median badly, since they also smear the distribution of the sites'
    scores, and an interval that is moved by it holds the truth too seldom.

    Args:
        resampled: the median on resamples of the stimuli, float64 (resamples,); not finite ones are left out.
        stimuli: number of stimuli.

    Returns:
        Lower and upper end; None if there is no finite value or only one stimulus.
    """
    resampled = resampled[np.isfinite(resampled)]
    if stimuli < 2 or not resampled.size:
        return None
    tail = _expanded_tail(stimuli)
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def _expanded_tail(stimuli: int) -> float:
    """The quantile that gives percentile intervals the width of Student's t, without the factor sqrt((n - 1) / n)."""
    from scipy.special import ndtr, stdtrit  # here, because command lines are parsed without scipy

    return float(ndtr(math.sqrt(stimuli / (stimuli - 1)) * stdtrit(stimuli - 1, TAIL)))
