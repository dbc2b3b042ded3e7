"""Whether one model is better than another on the same stimuli, by a paired bootstrap.

All models are resampled with the same stimuli (Efron and Tibshirani 1993, chapter 16 on paired data; Koehn 2004 for
the use on scores of systems), so that what is hard or easy for all of them cancels in their difference. The interval
is the percentile interval with the expanded tails of Hesterberg (2015, "What teachers should know about the bootstrap",
section 4.3), which undo that resamples spread less than samples do when stimuli are few.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm, t

from train.evaluation.confidence_intervals import BOOTSTRAP_RESAMPLES, BOOTSTRAP_SEED, bootstrap_means
from train.evaluation.metrics import LOWER_IS_BETTER


@dataclass(frozen=True)
class Predictions:
    """What a model predicted, and what is needed to resample its scores.

    Attributes:
        prediction, target: float32 (stimuli, sites), in the same order for all models that are compared; NaN targets
            are left out.
        reliability: (sites,), for the scores relative to it; None where there is no ceiling.
    """

    prediction: np.ndarray
    target: np.ndarray
    reliability: np.ndarray | None = None

    def resampled(self, resamples: int = BOOTSTRAP_RESAMPLES, seed: int = BOOTSTRAP_SEED) -> dict[str, np.ndarray]:
        """Each metric's mean over sites on resamples, float64 (resamples,); the same stimuli for the same seed."""
        return bootstrap_means(self.prediction, self.target, resamples, seed, self.reliability)


@dataclass(frozen=True)
class Lead:
    """By how much a model is ahead of the next one.

    Attributes:
        of, over: their numbers.
        difference: of the scores, positive where `of` is better, whichever way the metric points.
        interval: 95 %, or None where it could not be computed.
    """

    of: int
    over: int
    difference: float
    interval: tuple[float, float] | None

    @property
    def is_certain(self) -> bool:
        """Whether the difference is beyond its interval: the interval does not reach 0."""
        return self.interval is not None and self.interval[0] > 0


def leads(
    metric: str, scores: Sequence[float | None], resampled: Sequence[Mapping[str, np.ndarray] | None], stimuli: int
) -> list[Lead]:
    """Each model's lead over the next, the best first.

    Args:
        metric: which.
        scores: of the models; those without one take no part.
        resampled: `Predictions.resampled` of each, with the same seed; None where the predictions are not known.
        stimuli: how many were scored.
    """
    sign = -1 if metric in LOWER_IS_BETTER else 1
    order = [k for k, score in enumerate(scores) if score is not None]
    order.sort(key=lambda k: -sign * scores[k])
    found = []
    for of, over in itertools.pairwise(order):
        pair = [None if resampled[k] is None else resampled[k].get(metric) for k in (of, over)]
        interval = (
            None if any(values is None for values in pair) else paired_interval(sign * (pair[0] - pair[1]), stimuli)
        )
        found.append(Lead(of, over, sign * (scores[of] - scores[over]), interval))
    return found


def paired_interval(differences: np.ndarray, stimuli: int) -> tuple[float, float] | None:
    """The 95 % interval of a difference from its values on resamples of `stimuli` stimuli; None where it has none."""
    differences = differences[np.isfinite(differences)]
    if stimuli < 2 or not len(differences):
        return None
    tail = float(norm.cdf(math.sqrt(stimuli / (stimuli - 1)) * t.ppf(0.025, stimuli - 1)))
    low, high = np.quantile(differences, [tail, 1 - tail])
    return float(low), float(high)
