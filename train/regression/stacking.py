"""Several predictions of the same stimuli joined into one: their mean, or a sum whose weights are learned per site.

The weights are learned on predictions that each member made of training stimuli it was not fitted on (left out one at
a time, or fold by fold); otherwise the member that fits its own training stimuli best would get all the weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.splits import folds

PENALTY = 0.002  # on the squared weights, in units of the site's variance: members that are alike share their weight
SWEEPS = 300
FOLDS, SEED = 5, 0  # of the stimuli, for `Stacked.left_out`
LEAST_STIMULI = 10  # to learn weights from


@dataclass(frozen=True)
class Stacked:
    """What stacking found.

    Attributes:
        weights: float64 (members, sites), none negative; 0 for a site with too few responses.
        prediction: float32 (stimuli, sites), of the stimuli to predict.
        left_out: float32 (n, sites), of the stimuli to learn from, each with weights learned on other folds.
    """

    weights: np.ndarray
    prediction: np.ndarray
    left_out: np.ndarray


def stack(left_out: Sequence[np.ndarray], rates: np.ndarray, predictions: Sequence[np.ndarray]) -> Stacked:
    """Learn how much of each member a site's prediction takes.

    Per site, the squared error of mean + sum_m w_m (prediction_m - mean) is minimised over weights w >= 0 (Breiman
    1996), with a small penalty on their squares; mean is that of the site's responses. Weights that are small in sum
    pull predictions towards the mean.

    Args:
        left_out: of each member, (n, sites): predictions of stimuli that it was not fitted on.
        rates: (n, sites), the responses to these; NaN = not recorded.
        predictions: of each member, (stimuli, sites): what is to be joined.
    """
    members, rows = np.stack(left_out).astype(np.float64), rates.astype(np.float64)
    weights, mean = _weights(members, rows)
    crossed = np.empty(rows.shape)
    everyone = np.arange(len(rows))
    for fold in folds(everyone, min(FOLDS, len(rows)), SEED):
        others = np.setdiff1d(everyone, fold)
        crossed[fold] = _joined(members[:, fold], *_weights(members[:, others], rows[others]))
    joined = _joined(np.stack(predictions).astype(np.float64), weights, mean)
    return Stacked(weights, joined.astype(np.float32), crossed.astype(np.float32))


def _joined(predictions: np.ndarray, weights: np.ndarray, mean: np.ndarray) -> np.ndarray:
    return np.einsum("ms,mns->ns", weights, np.nan_to_num(predictions - mean)) + mean


def _weights(members: np.ndarray, rates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights (members, sites) and the mean response of each site, from its stimuli that all members predicted."""
    there = ~np.isnan(rates) & ~np.isnan(members).any(axis=0)
    count = there.sum(axis=0)
    with np.errstate(invalid="ignore"):
        mean = np.where(there, rates, 0).sum(axis=0) / count
    y = np.where(there, rates - mean, 0)
    x = np.where(there, members - mean, 0)
    products = np.einsum("kns,mns->skm", x, x)
    variance = np.square(y).sum(axis=0)
    products[:, range(len(x)), range(len(x))] += PENALTY * variance[:, None] + np.finfo(float).tiny
    weights = _non_negative(products, np.einsum("mns,ns->sm", x, y))
    return np.where(count >= LEAST_STIMULI, weights.T, 0), mean


def _non_negative(products: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Minimise w' P w / 2 - t' w over w >= 0 for every site, by coordinate descent: (sites, members).

    Args:
        products: P, (sites, members, members), positive definite.
        target: t, (sites, members).
    """
    weights = np.zeros(target.shape)
    for _ in range(SWEEPS):
        before = weights.copy()
        for member in range(target.shape[1]):
            own = products[:, member, member]
            others = np.einsum("sm,sm->s", products[:, member], weights) - own * weights[:, member]
            weights[:, member] = np.maximum(0, (target[:, member] - others) / own)
        if np.abs(weights - before).max(initial=0) < 1e-6:
            break
    return weights
