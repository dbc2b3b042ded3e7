"""How a score grows with training stimuli: a power law through the scores of a system with several numbers of them.

    score(N) = most - loss N^-rate,   loss >= 0

the usual form of learning curves (Cortes et al. 1994; Viering and Loog 2023). For each rate the other two follow by
least squares. Beyond the largest N it is an extrapolation, and callers say so.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAST_SIZES = 3
RATES = np.linspace(0.1, 1.5, 57)


@dataclass(frozen=True)
class LearningCurve:
    """A fitted curve.

    Attributes:
        most: the score with endless stimuli.
        loss, rate: see above.
        least_stimuli, most_stimuli: that were measured.
    """

    most: float
    loss: float
    rate: float
    least_stimuli: int
    most_stimuli: int

    def at(self, stimuli: float) -> float:
        """The score with so many training stimuli."""
        return self.most - self.loss * stimuli**-self.rate

    def is_measured(self, stimuli: float) -> bool:
        """Whether a number of stimuli lies between those that were measured."""
        return self.least_stimuli <= stimuli <= self.most_stimuli


def fit_learning_curve(stimuli: Sequence[int], scores: Sequence[float]) -> LearningCurve | None:
    """The curve of least squares; None for fewer than `LEAST_SIZES` numbers of stimuli.

    A system that does not get better with more stimuli has a flat one.
    """
    if len(set(stimuli)) < LEAST_SIZES:
        return None
    sizes, values = np.array(stimuli, float), np.array(scores, float)
    ends = int(sizes.min()), int(sizes.max())
    best = LearningCurve(float(values.mean()), 0.0, float(RATES[0]), *ends)
    least = float(((values - values.mean()) ** 2).sum())
    for rate in RATES:
        columns = np.stack([np.ones_like(sizes), -(sizes**-rate)], axis=1)
        (most, loss), *_ = np.linalg.lstsq(columns, values, rcond=None)
        error = float(((columns @ (most, loss) - values) ** 2).sum())
        if loss > 0 and error < least:
            best, least = LearningCurve(float(most), float(loss), float(rate), *ends), error
    return best
