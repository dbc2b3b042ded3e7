"""Stacking: several predictions of the same stimuli combined with weights that are learned per site.

The weights are learned on predictions that each member made of training stimuli it was not fitted on (left out one at
a time, or fold by fold); otherwise the member that fits its own training stimuli best would get all the weight.

With few stimuli, weights that are learned for a site alone are mostly noise. `SiteTargets` are what they are pulled
towards: a member's probability for the site, given which members suit the other sites.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.splits import folds
from train.regression.shared_prior import SharedPrior, shared_prior

PENALTY = 0.002  # on the squared weights, in units of the site's variance: members that are alike share their weight
MAX_ITERATIONS = 300  # of coordinate descent
TOLERANCE = 1e-6  # on the change of weights
FOLDS, FOLD_SEED = 5, 0  # of the stimuli, for `Stacked.left_out`
MIN_STIMULI = 10  # to learn weights from
TARGET_STIMULI = 200  # that the pull towards targets is worth, as a penalty, in units of the site's variance


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
class Combination:
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


@dataclass(frozen=True)
class LeftOutErrors:
    """How well members predict what they were not fitted on.

    Attributes:
        squares: float64 (folds, members, sites), sums of squared errors for the stimuli of each of `stacking_folds`.
        counts: (folds, sites), number of stimuli that these are of.
    """

    squares: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, left_out: Sequence[np.ndarray], rates: np.ndarray, copies: np.ndarray | None) -> "LeftOutErrors":
        """Of some sites; arguments as of `stack`."""
        parts = stacking_folds(len(rates), copies)
        usable = _usable(np.stack(left_out), rates)
        squares = np.empty((len(parts), len(left_out), rates.shape[1]))
        for member, prediction in enumerate(left_out):
            errors = np.where(usable, rates.astype(np.float64) - prediction, 0)
            squares[:, member] = [np.square(errors[fold]).sum(axis=0) for fold in parts]
        return cls(squares, np.stack([usable[fold].sum(axis=0) for fold in parts]))

    @classmethod
    def side_by_side(cls, parts: "Sequence[LeftOutErrors]") -> "LeftOutErrors":
        """Those of some sites after those of others."""
        squares = np.concatenate([part.squares for part in parts], axis=-1)
        return cls(squares, np.concatenate([part.counts for part in parts], axis=-1))


@dataclass(frozen=True)
class SiteTargets:
    """What the weights of members are pulled towards.

    Attributes:
        whole: float64 (members, sites), given all stimuli.
        without_fold: float64 (folds, members, sites), given those outside each fold.
    """

    whole: np.ndarray
    without_fold: np.ndarray

    @classmethod
    def learned(cls, errors: LeftOutErrors) -> "SiteTargets":
        """The posterior probability of each member, with what suits all sites as the prior.

        Args:
            errors: of the members.
        """

        def given(parts: list[int]) -> SharedPrior:
            return shared_prior(errors.squares[parts].sum(axis=0), errors.counts[parts].sum(axis=0))

        every = range(len(errors.counts))
        of_all = given(list(every))
        without_fold = [given([other for other in every if other != fold]).posterior for fold in every]
        return cls(of_all.posterior, np.stack(without_fold))

    def of_sites(self, sites: slice) -> "SiteTargets":
        """Those of some sites."""
        return SiteTargets(self.whole[:, sites], self.without_fold[..., sites])


def stacking_folds(stimuli: int, copies: np.ndarray | None) -> list[np.ndarray]:
    """The folds of the stimuli to learn from, each of which is predicted with weights learned on the others."""
    images = np.arange(stimuli) if copies is None else copies
    return folds(images, min(FOLDS, len(np.unique(images))), FOLD_SEED)


def stack(
    left_out: Sequence[np.ndarray],
    rates: np.ndarray,
    predictions: Sequence[np.ndarray],
    copies: np.ndarray | None = None,
    targets: SiteTargets | None = None,
) -> Stacked:
    """Learn how much each member contributes to a site's prediction.

    Per site, the squared error of mean + sum_m w_m (prediction_m - mean) is minimised over weights w >= 0 (Breiman
    1996), with a small penalty on their squares; mean is that of the site's responses. Weights that sum to less than 1
    pull predictions towards the mean. With `targets` the penalty is on the squared distance from these, and falls with
    the number of stimuli.

    Args:
        left_out: for each member, (n, sites): predictions of stimuli that it was not fitted on.
        rates: (n, sites), the responses to these; NaN = not recorded.
        predictions: for each member, (stimuli, sites): what is to be combined.
        copies: (n,), equal for stimuli that show the same image, which are in one fold; None if all differ.
        targets: of these sites; None for weights that are learned for each site alone.
    """
    members, rates = np.stack(left_out).astype(np.float64), rates.astype(np.float64)
    combination = _learn(members, rates, None if targets is None else targets.whole)
    crossed = np.empty(rates.shape)
    all_stimuli = np.arange(len(rates))
    for number, fold in enumerate(stacking_folds(len(rates), copies)):
        others = np.setdiff1d(all_stimuli, fold)
        target = None if targets is None else targets.without_fold[number]
        crossed[fold] = _learn(members[:, others], rates[others], target).apply(members[:, fold])
    prediction = combination.apply(np.stack(predictions).astype(np.float64))
    return Stacked(combination.weights, combination.mean, prediction.astype(np.float32), crossed.astype(np.float32))


def _usable(members: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """The stimuli of a site that were recorded and that all members (members, n, sites) predicted: bool (n, sites)."""
    return ~np.isnan(rates) & ~np.isnan(members).any(axis=0)


def _learn(members: np.ndarray, rates: np.ndarray, target: np.ndarray | None) -> Combination:
    """Weights from members (members, n, sites), pulled towards `target` (members, sites) if there is one."""
    usable = _usable(members, rates)
    count = usable.sum(axis=0)
    with np.errstate(invalid="ignore"):
        mean = np.where(usable, rates, 0).sum(axis=0) / count
    y = np.where(usable, rates - mean, 0)
    x = np.where(usable, members - mean, 0)
    products = np.einsum("kns,mns->skm", x, x)
    variance = np.square(y).sum(axis=0)
    penalty = PENALTY * variance if target is None else TARGET_STIMULI / count.clip(1) * variance
    products[:, range(len(x)), range(len(x))] += penalty[:, None] + np.finfo(float).tiny
    correlation = np.einsum("mns,ns->sm", x, y)
    if target is not None:
        correlation += penalty[:, None] * target.T
    weights = _non_negative_least_squares(products, correlation)
    return Combination(np.where(count >= MIN_STIMULI, weights.T, 0), mean)


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
