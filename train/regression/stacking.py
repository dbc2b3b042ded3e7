"""Stacking: several predictions of the same stimuli combined with weights that are learned per site.

The weights are learned on predictions that each member made of training stimuli it was not fitted on (left out one at
a time, or fold by fold); otherwise the member that fits its own training stimuli best would get all the weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.splits import folds

PENALTY = 0.002  # on the squared weights, in units of the site's variance: members that are alike share their weight
MAX_ITERATIONS = 300  # of coordinate descent
TOLERANCE = 1e-6  # on the change of weights
FOLDS, FOLD_SEED = 5, 0  # of the stimuli, for `Stacked.left_out`
MIN_STIMULI = 10  # to learn weights from


@dataclass(frozen=True)
class Stacked:
    """The result of stacking.

    Attributes:
        weights: float64 (members, sites), none negative; 0 for a site with too few responses.
        mean: float64 (sites,); what is combined are the deviations of predictions from it. NaN for a site without
            responses that all members predicted.
        prediction: float32 (stimuli, sites), of the stimuli to predict.
        left_out: float32 (n, sites), of the stimuli to learn from, each with weights learned on other folds.
    """

    weights: np.ndarray
    mean: np.ndarray
    prediction: np.ndarray
    left_out: np.ndarray


@dataclass(frozen=True)
class _Combination:
    """mean + sum_m w_m (prediction_m - mean) for each site.

    Attributes:
        weights: w, float64 (members, sites).
        mean: float64 (sites,).
    """

    weights: np.ndarray
    mean: np.ndarray

    def apply(self, predictions: np.ndarray) -> np.ndarray:
        """Predictions (members, n, sites) -> (n, sites)."""
        return np.einsum("ms,mns->ns", self.weights, np.nan_to_num(predictions - self.mean)) + self.mean


def stack(
    left_out: Sequence[np.ndarray],
    rates: np.ndarray,
    predictions: Sequence[np.ndarray],
    copies: np.ndarray | None = None,
) -> Stacked:
    """Learn how much each member contributes to a site's prediction.

    Per site, the squared error of mean + sum_m w_m (prediction_m - mean) is minimised over weights w >= 0 (Breiman
    1996), with a small penalty on their squares; mean is that of the site's responses. Weights that sum to less than 1
    pull predictions towards the mean.

    Args:
        left_out: for each member, (n, sites): predictions of stimuli that it was not fitted on.
        rates: (n, sites), the responses to these; NaN = not recorded.
        predictions: for each member, (stimuli, sites): what is to be combined.
        copies: (n,), equal for stimuli that show the same image, which are in one fold; None if all differ.
    """
    members, rates = np.stack(left_out).astype(np.float64), rates.astype(np.float64)
    combination = _learn(members, rates)
    crossed = np.empty(rates.shape)
    all_stimuli = np.arange(len(rates))
    images = all_stimuli if copies is None else copies
    for fold in folds(images, min(FOLDS, len(np.unique(images))), FOLD_SEED):
        others = np.setdiff1d(all_stimuli, fold)
        crossed[fold] = _learn(members[:, others], rates[others]).apply(members[:, fold])
    prediction = combination.apply(np.stack(predictions).astype(np.float64))
    return Stacked(combination.weights, combination.mean, prediction.astype(np.float32), crossed.astype(np.float32))


def _learn(members: np.ndarray, rates: np.ndarray) -> _Combination:
    """Weights from the stimuli of a site that all members (members, n, sites) predicted."""
    usable = ~np.isnan(rates) & ~np.isnan(members).any(axis=0)
    count = usable.sum(axis=0)
    with np.errstate(invalid="ignore"):
        mean = np.where(usable, rates, 0).sum(axis=0) / count
    y = np.where(usable, rates - mean, 0)
    x = np.where(usable, members - mean, 0)
    products = np.einsum("kns,mns->skm", x, x)
    variance = np.square(y).sum(axis=0)
    products[:, range(len(x)), range(len(x))] += PENALTY * variance[:, None] + np.finfo(float).tiny
    weights = _non_negative_least_squares(products, np.einsum("mns,ns->sm", x, y))
    return _Combination(np.where(count >= MIN_STIMULI, weights.T, 0), mean)


def _non_negative_least_squares(products: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Minimise w' P w / 2 - t' w over w >= 0 for every site, by coordinate descent: (sites, members).

    Args:
        products: P, (sites, members, members), positive definite.
        target: t, (sites, members).
    """
    weights = np.zeros(target.shape)
    for _ in range(MAX_ITERATIONS):
        before = weights.copy()
        for member in range(target.shape[1]):
            diagonal = products[:, member, member]
            others = np.einsum("sm,sm->s", products[:, member], weights) - diagonal * weights[:, member]
            weights[:, member] = np.maximum(0, (target[:, member] - others) / diagonal)
        if np.abs(weights - before).max(initial=0) < TOLERANCE:
            break
    return weights
