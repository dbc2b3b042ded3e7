"""Many models at once: intervals that hold together, and how sure each model's rank is.

*Simultaneous intervals.* With many models, some interval of a difference excludes 0 by chance. Here all of them hold
together with 95 %: the largest of the standardised deviations of all differences, |resampled - mean| / sd, takes the
place of each one's own (Westfall and Young 1993; Romano and Wolf 2005). It knows how strongly models resemble each
other, so it is narrower than Bonferroni's correction.

*Probability of ranks.* How often each model takes each rank on resamples of the stimuli, with the bias of resamples
taken off. It says how the order would vary over other stimuli, not which model is truly better: equal models share
their ranks evenly.

*Possible ranks.* A model's rank lies between 1 + the number of models that are surely better, and the number of models
less those surely worse, by the simultaneous intervals: all of these ranges hold together with 95 % (Mogstad, Romano,
Shaikh and Wilhelm 2024).

All resamples are of the same stimuli for all models (paired), the tails those of Student's t.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

LEVEL = 0.95
ROUNDING = 1e-9  # differences that vary less than this part of the scores vary by rounding


@dataclass(frozen=True)
class Standing:
    """A model among others.

    Attributes:
        interval: of its score; the intervals of all models hold together.
        probabilities: of each rank, the best first; they add up to 1.
        best, worst: the best and the worst possible rank, from 1.
    """

    interval: tuple[float, float]
    probabilities: list[float]
    best: int
    worst: int

    def content(self) -> dict[str, Any]:
        """For a JSON file."""
        ranks = {"probability": self.probabilities, "best": self.best, "worst": self.worst}
        return {"adjusted": list(self.interval), "ranks": ranks}


class ComparedModels:
    """Several models' scores on the same stimuli.

    Args:
        scores: float64 (models,); higher is better.
        resampled: the scores on the same resamples of the stimuli, float64 (models, resamples); resamples on which one
            of them is not finite are left out.
        stimuli: number of stimuli, at least two.
    """

    def __init__(self, scores: np.ndarray, resampled: np.ndarray, stimuli: int):
        self.stimuli, self._scores = stimuli, scores
        self._resampled = resampled[:, np.isfinite(resampled).all(axis=0)]
        self._means = self._resampled.mean(axis=1)
        # As in `confidence_interval`: a resample's bias is taken off once for it, and once for the sample's own.
        self._centres = 2 * scores - self._means

    @cached_property
    def _critical_difference(self) -> float:
        """How many standard errors the simultaneous intervals of all differences reach to either side."""
        return self._critical(self._deviations(first) for first in range(len(self._scores) - 1))

    def difference(self, better: int, worse: int) -> tuple[float, float]:
        """The interval of a model's score less another's; those of all pairs hold together."""
        centre = self._centres[better] - self._centres[worse]
        spread = float((self._resampled[better] - self._resampled[worse]).std())
        half = self._critical_difference * spread
        return float(centre - half), float(centre + half)

    def standings(self) -> list[Standing]:
        """Of each model."""
        deviations = self._resampled - self._means[:, None]
        half = self._critical([deviations]) * deviations.std(axis=1)
        probabilities = self._rank_probabilities()
        count, standings = len(self._scores), []
        for model in range(count):
            ends = [self.difference(model, other) for other in range(count) if other != model]
            standings.append(
                Standing(
                    interval=(float(self._centres[model] - half[model]), float(self._centres[model] + half[model])),
                    probabilities=probabilities[model].tolist(),
                    best=1 + sum(high < 0 for _, high in ends),
                    worst=count - sum(low > 0 for low, _ in ends),
                )
            )
        return standings

    def _deviations(self, first: int) -> np.ndarray:
        """Resampled differences of a model and each later one, less their means: (models, resamples)."""
        differences = self._resampled[first] - self._resampled[first + 1 :]
        return differences - differences.mean(axis=1, keepdims=True)

    def _critical(self, blocks: Iterable[np.ndarray]) -> float:
        """The standard errors by which intervals must reach to either side so that all hold together.

        The largest standardised deviation of each resample is exceeded with 5 %; the level that a normal variable gives
        to that is the level of each interval. Student's t is used for it, as in `confidence_interval`.

        Args:
            blocks: deviations from the mean, (quantities, resamples) each.
        """
        from scipy.special import ndtr, stdtrit  # here, because command lines are parsed without scipy

        largest = np.zeros(self._resampled.shape[1])
        rounding = ROUNDING * self._resampled.std(axis=1).max()
        for deviations in blocks:
            spread = deviations.std(axis=1)
            varying = spread > rounding
            if varying.any():
                standardised = np.abs(deviations[varying]) / spread[varying, None]
                largest = np.maximum(largest, standardised.max(axis=0))
        critical = np.quantile(largest, LEVEL)
        return float(stdtrit(self.stimuli - 1, ndtr(critical)) * math.sqrt(self.stimuli / (self.stimuli - 1)))

    def _rank_probabilities(self) -> np.ndarray:
        """float64 (models, ranks); equal models share their ranks."""
        widened = math.sqrt(self.stimuli / (self.stimuli - 1)) * (self._resampled - self._means[:, None])
        values = self._centres[:, None] + widened
        count, resamples = values.shape
        probabilities = np.zeros((count, count))
        for model in range(count):
            above = (values > values[model]).sum(axis=0)
            equal = (values == values[model]).sum(axis=0)
            for ties in np.unique(equal):
                ranks = np.bincount(above[equal == ties], minlength=count) / (ties * resamples)
                for rank in np.flatnonzero(ranks):
                    probabilities[model, rank : rank + ties] += ranks[rank]
        return probabilities
