"""Compares models that predict the same stimuli, by a paired bootstrap.

All models are resampled with the same stimuli (Efron and Tibshirani 1993, chapter 16 on paired data; Koehn 2004 for
scores of systems), so what is hard or easy for all of them cancels in their difference.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.confidence_interval import confidence_interval
from train.evaluation.confidence_intervals import BOOTSTRAP_RESAMPLES, BOOTSTRAP_SEED, bootstrap_means
from train.evaluation.metrics import LOWER_IS_BETTER


@dataclass(frozen=True)
class ScoredPredictions:
    """A model's predictions, and what is needed to resample its scores.

    Attributes:
        prediction, response: float32 (stimuli, sites), in the same order for all models that are compared; NaN
            responses are left out.
        reliability: (sites,), for the scores relative to it; None without a ceiling.
    """

    prediction: np.ndarray
    response: np.ndarray
    reliability: np.ndarray | None = None

    def resampled(self, resamples: int = BOOTSTRAP_RESAMPLES, seed: int = BOOTSTRAP_SEED) -> dict[str, np.ndarray]:
        """Each metric's mean over sites on resamples, float64 (resamples,); the same stimuli for the same seed."""
        return bootstrap_means(self.prediction, self.response, resamples, seed, self.reliability)


@dataclass(frozen=True)
class Lead:
    """How far a model is ahead of the next one.

    Attributes:
        better, worse: indices of the two models.
        difference: of their scores, positive where `better` is better, whichever way the metric points.
        interval: 95 %, or None where it cannot be computed.
    """

    better: int
    worse: int
    difference: float
    interval: tuple[float, float] | None

    @property
    def is_certain(self) -> bool:
        """Whether the interval of the difference excludes 0."""
        return self.interval is not None and self.interval[0] > 0


def leads(
    metric: str, scores: Sequence[float | None], resampled: Sequence[Mapping[str, np.ndarray] | None], stimuli: int
) -> list[Lead]:
    """Each model's lead over the next, the best first.

    Args:
        metric: to compare by.
        scores: of the models; those without one take no part.
        resampled: `ScoredPredictions.resampled` of each, with the same seed; None where predictions are unknown.
        stimuli: number of stimuli scored.
    """
    sign = -1 if metric in LOWER_IS_BETTER else 1
    signed = {model: sign * score for model, score in enumerate(scores) if score is not None}
    ranked = sorted(signed, key=lambda model: -signed[model])
    values = [None if means is None else means.get(metric) for means in resampled]
    models_ahead = []
    for better, worse in itertools.pairwise(ranked):
        difference = signed[better] - signed[worse]
        values_of_better, values_of_worse = values[better], values[worse]
        interval = None
        if values_of_better is not None and values_of_worse is not None:
            interval = confidence_interval(difference, sign * (values_of_better - values_of_worse), stimuli)
        models_ahead.append(Lead(better, worse, difference, interval))
    return models_ahead
