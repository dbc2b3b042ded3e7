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
from train.evaluation.multiplicity import ComparedModels


@dataclass(frozen=True)
class ScoredPredictions:
    """A model's predictions, and what is needed to resample its scores.

    Attributes:
        prediction, response: float32 (stimuli, sites), in the same order for all models that are compared; NaN
            responses are left out.
        reliability: (sites,), for the scores relative to it; None without a ceiling.
        stimulus_ids, site_ids: of the rows and the columns; empty where they do not matter.
    """

    prediction: np.ndarray
    response: np.ndarray
    reliability: np.ndarray | None = None
    stimulus_ids: Sequence[str] = ()
    site_ids: Sequence[str] = ()

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
        adjusted: the same, but those of all pairs of models hold together with 95 % (`ComparedModels`); of two models
            it is `interval`.
    """

    better: int
    worse: int
    difference: float
    interval: tuple[float, float] | None
    adjusted: tuple[float, float] | None = None

    @property
    def is_certain(self) -> bool:
        """Whether the interval of the difference excludes 0, also when it is adjusted for the number of models."""
        return all(ends is not None and ends[0] > 0 for ends in (self.interval, self.adjusted))


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
    values = {
        model: sign * means[metric]
        for model, means in enumerate(resampled)
        if means is not None and metric in means and model in signed
    }
    together = compared_models(signed, values, stimuli)
    models_ahead = []
    for better, worse in itertools.pairwise(ranked):
        difference = signed[better] - signed[worse]
        ends = adjusted = None
        if better in values and worse in values:
            ends = confidence_interval(difference, values[better] - values[worse], stimuli)
            adjusted = ends
            if together is not None and len(values) > 2:
                adjusted = together.difference(*(list(values).index(model) for model in (better, worse)))
        models_ahead.append(Lead(better, worse, difference, ends, adjusted))
    return models_ahead


def compared_models(
    scores: Mapping[int, float], resampled: Mapping[int, np.ndarray], stimuli: int
) -> ComparedModels | None:
    """The models that were resampled, in their order, side by side.

    Args:
        scores: of all models by number; higher is better.
        resampled: of some of them, the scores on the same resamples.
        stimuli: number of stimuli.

    Returns:
        None for fewer than two models or stimuli, or where no resample has a score of each.
    """
    if len(resampled) < 2 or stimuli < 2:
        return None
    values = np.array(list(resampled.values()))
    if not np.isfinite(values).all(axis=0).any():
        return None
    return ComparedModels(np.array([scores[model] for model in resampled]), values, stimuli)
