"""Averages over some of the trials: how what is measured depends on the number of repetitions.

With fixed moments, the influence of a stimulus is quadratic in its response, so its variance over stimuli is a
polynomial in 1 / n, n being the number of repetitions: q0 + q1 / n + q2 / n^2 + ... Averages over random parts of the
trials show it at fewer repetitions than were recorded, with the correlations of the noise between sites and whatever
its distribution; the polynomial that is fitted to these leads to more repetitions than were recorded.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data_prep.ceiling import TrialStatistics

PARTS = (2, 3, 6)  # averages over a half, a third, a sixth of the trials
DRAWS, SEED = 8, 0  # random parts of each size
MOST_VALUES = 2**19  # stimuli x sites of an average; of more stimuli, every second, third ... is taken


@dataclass(frozen=True)
class PartialAverage:
    """Averages over random trials of each stimulus.

    Attributes:
        inverse_count: the mean over stimuli of one over the number of trials.
        responses: float32 (stimuli, sites), one for each random choice of trials; NaN = none recorded.
    """

    inverse_count: float
    responses: list[np.ndarray]


@dataclass(frozen=True)
class Trials:
    """What single trials tell about other numbers of repetitions.

    Attributes:
        inverse_count: the mean over stimuli of 1 / n; its inverse is the number of repetitions that counts.
        noise: variance of single trials about their average, mean over stimuli, float64 (sites,).
        noise_of_average: the mean over stimuli of v / n, (sites,).
        rows: the stimuli that the averages are of.
        averages: over ever fewer trials, the first over all of them.
    """

    inverse_count: float
    noise: np.ndarray
    noise_of_average: np.ndarray
    rows: slice
    averages: list[PartialAverage]

    @classmethod
    def of(cls, trials: np.ndarray, seed: int = SEED) -> "Trials | None":
        """From float (stimuli, repetitions, sites), NaN = missing; None where hardly any stimulus has two trials."""
        statistics = TrialStatistics.from_trials(trials)
        counts = statistics.count.max(axis=1)
        if not counts.all() or np.median(counts) < 2:
            return None
        with np.errstate(invalid="ignore"):
            noise_of_average = np.nan_to_num(np.nanmean(statistics.noise_of_average(), axis=0))
            noise = np.nan_to_num(np.nanmean(statistics.variance, axis=0))
        step = -(-statistics.average.size // MOST_VALUES)
        rows = slice(None, None, step)
        generator = np.random.default_rng(seed)
        whole = PartialAverage(float((1 / counts[rows]).mean()), [statistics.average[rows].astype(np.float32)])
        averages = [whole]
        for part in PARTS:
            kept = np.maximum(np.rint(counts[rows] / part), 1)
            inverse_count = float((1 / kept).mean())
            if inverse_count > averages[-1].inverse_count:
                responses = [_average_over_some(trials[rows], kept, generator) for _ in range(DRAWS)]
                averages.append(PartialAverage(inverse_count, responses))
        return cls(float((1 / counts).mean()), noise, noise_of_average, rows, averages)

    @property
    def repetitions(self) -> float:
        """The number of repetitions that were recorded: the harmonic mean over stimuli."""
        return 1 / self.inverse_count

    def added_noise(self, repetitions: float) -> np.ndarray:
        """The noise variance that a trial average gains with another number of repetitions, (sites,)."""
        return self.noise / repetitions - self.noise_of_average

    def ratios(self, variances: Callable[[np.ndarray], np.ndarray], repetitions: float) -> np.ndarray:
        """By what factors variances over stimuli change from the recorded number of repetitions to another.

        Args:
            variances: of responses, (stimuli, sites) of `rows`: one or more, of what is quadratic in them.
            repetitions: the other number.
        """
        inverse_counts = np.array([average.inverse_count for average in self.averages])
        measured = [np.mean([variances(values) for values in part.responses], axis=0) for part in self.averages]
        return np.array([_ratio(inverse_counts, of_one, 1 / repetitions) for of_one in np.transpose(measured)])


def _average_over_some(trials: np.ndarray, kept: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Averages over `kept` random ones of each stimulus's trials: float32 (stimuli, sites)."""
    present = ~np.isnan(trials).all(axis=2)
    order = np.argsort(np.where(present, generator.random(present.shape), 2), axis=1)
    ranks = np.argsort(order, axis=1)
    chosen = (ranks < kept[:, None]) & present
    recorded = chosen[:, :, None] & ~np.isnan(trials)
    with np.errstate(invalid="ignore"):
        sums = np.where(recorded, trials, 0).sum(axis=1, dtype=np.float64)
        return (sums / recorded.sum(axis=1)).astype(np.float32)


def _ratio(x: np.ndarray, variances: np.ndarray, wanted: float) -> float:
    """The value at `wanted` over that at x[0] of the polynomial that fits the variances best, relative to each.

    Its coefficients are at least 0, its degree is at most 2.
    """
    from scipy.optimize import nnls  # here, because command lines are parsed without scipy

    if not (variances > 0).all():
        return 1.0
    powers = np.arange(min(len(x), 3))
    coefficients, _ = nnls(x[:, None] ** powers / variances[:, None], np.ones(len(x)))
    return float((coefficients * wanted**powers).sum() / (coefficients * x[0] ** powers).sum())
