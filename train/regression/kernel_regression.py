"""Regression from features to sites through the Gram matrix of the stimuli, exact however many features there are.

With centred features X (n x p), n << p, and K = X X' = U S^2 U', the principal component scores of the stimuli are U S,
and whatever is linear in the features is a weighting of the fit stimuli: prediction = K_new,fit a + mean. `a` is called
the dual weights. Each site is fitted on the stimuli it was recorded for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

PENALTIES = np.logspace(-6, 6, 49)  # of ridge, in units of the Gram matrix's mean eigenvalue
LEAST_STIMULI = 3


@dataclass(frozen=True)
class Gram:
    """Inner products of features that are centred on the mean of the stimuli to fit, float64.

    Attributes:
        fit: (n, n).
        cross: (held out, n).
        rounding: of the products, relative to the largest eigenvalue: components below it are rounding errors, and a
            leave-one-out estimate that used them would be wrong.
    """

    fit: np.ndarray
    cross: np.ndarray
    rounding: float = 0.0

    @cached_property
    def spectrum(self) -> tuple[np.ndarray, np.ndarray]:
        """The eigenvalues of `fit`, descending, and its eigenvectors, without those that are rounding errors."""
        values, vectors = np.linalg.eigh(self.fit)
        return _beyond_rounding(values[::-1], vectors[:, ::-1], self.rounding)

    @property
    def total(self) -> float:
        """The sum of the eigenvalues."""
        return float(np.trace(self.fit))

    def predicted(self, dual: np.ndarray) -> np.ndarray:
        """What dual weights (n, sites) make of those held out, but for the mean."""
        return self.cross @ dual

    def of(self, there: np.ndarray) -> "Gram":
        """Of some of the stimuli to fit, (n,) bool, centred on their mean."""
        rows = np.flatnonzero(there)
        stacked = np.vstack([self.fit, self.cross])
        square = np.zeros((len(stacked), len(stacked)))
        square[:, : len(there)] = stacked
        return centred(square, rows, np.arange(len(there), len(stacked)), self.rounding)


@dataclass(frozen=True)
class FewFeatures:
    """Features of more stimuli than there are features, float64: what `Gram` is, without a matrix of n x n.

    Attributes:
        fit: (n, p), centred on their mean.
        cross: (held out, p), centred on the mean of those to fit.
    """

    fit: np.ndarray
    cross: np.ndarray

    @classmethod
    def centred(cls, fit: np.ndarray, held_out: np.ndarray) -> "FewFeatures":
        """Of features as they are."""
        mean = fit.mean(axis=0, dtype=np.float64)
        return cls(fit - mean, held_out - mean)

    @cached_property
    def spectrum(self) -> tuple[np.ndarray, np.ndarray]:
        """As of the Gram matrix."""
        vectors, singular, _ = np.linalg.svd(self.fit, full_matrices=False)
        return _beyond_rounding(singular**2, vectors)

    @property
    def total(self) -> float:
        """The sum of the eigenvalues."""
        return float(np.square(self.fit).sum())

    def predicted(self, dual: np.ndarray) -> np.ndarray:
        """What dual weights (n, sites) make of those held out, but for the mean."""
        return self.cross @ (self.fit.T @ dual)

    def of(self, there: np.ndarray) -> "FewFeatures":
        """Of some of the stimuli to fit, (n,) bool, centred on their mean."""
        return FewFeatures.centred(self.fit[there], self.cross)


def _beyond_rounding(values: np.ndarray, vectors: np.ndarray, rounding: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, descending, and eigenvectors, without those that are rounding errors."""
    floor = max(len(vectors) * np.finfo(np.float64).eps, rounding)
    rank = int((values > max(values[0], 0) * floor).sum())
    return values[:rank], vectors[:, :rank]


def centred(products: np.ndarray, fit: np.ndarray, held_out: np.ndarray, rounding: float = 0.0) -> Gram:
    """The Gram matrices of some stimuli, centred on those to fit.

    Args:
        products: float64 (N, N), inner products of all stimuli's features, centred anyhow or not at all.
        fit, held_out: positions among the N.
        rounding: of the products, see `Gram`.
    """
    own, cross = products[np.ix_(fit, fit)], products[np.ix_(held_out, fit)]
    column = own.mean(axis=0)
    overall = column.mean()
    return Gram(
        fit=own - column - column[:, None] + overall,
        cross=cross - cross.mean(axis=1, keepdims=True) - column + overall,
        rounding=rounding,
    )


@dataclass(frozen=True)
class Method:
    """How the sites are read out.

    Attributes:
        kind: ridge with a penalty per site by leave-one-out; ordinary least squares on principal components; or partial
            least squares.
        components: principal components that are used (all where None), or latent dimensions of pls.
    """

    kind: Literal["ridge", "ols", "pls"]
    components: int | None = None


@dataclass
class Fit:
    """What a regression found, per site; NaN for a site with fewer than three responses.

    Attributes:
        prediction: float32 (held out, sites), in the units of the responses.
        dual: float64 (n, sites), the weights of the stimuli; those of the features are X' dual. 0 for stimuli that a
            site has no response to.
        mean: float64 (sites,), of the responses; the prediction at the mean features of a site's stimuli.
        penalty: float64 (sites,) of ridge, in units of the mean eigenvalue; None for the others.
        inner_r2: float64 (sites,) of ridge: R2 of `left_out`; None for the others, see `folded_r2`.
        left_out: float32 (n, sites) of ridge, the prediction for each stimulus from the others, with the principal
            components of all; NaN where a site has no response to it. None for the others.
    """

    prediction: np.ndarray
    dual: np.ndarray
    mean: np.ndarray
    penalty: np.ndarray | None = None
    inner_r2: np.ndarray | None = None
    left_out: np.ndarray | None = None


def regress(gram: Gram | FewFeatures, rates: np.ndarray, method: Method) -> Fit:
    """Fit every site.

    Sites that were recorded for the same stimuli share one decomposition; the features are centred anew on the stimuli
    of each such group.

    Args:
        gram: of the features; for pls the Gram matrix.
        rates: float32 or float64 (n, sites); NaN = not recorded.
        method: of regression.
    """
    fits = {"ridge": _ridge, "ols": _least_squares, "pls": _partial_least_squares}
    sites = rates.shape[1]
    found = Fit(
        prediction=np.full((len(gram.cross), sites), np.nan, np.float32),
        dual=np.zeros(rates.shape),
        mean=np.full(sites, np.nan),
    )
    if method.kind == "ridge":
        found.penalty, found.inner_r2 = np.full(sites, np.nan), np.full(sites, np.nan)
        found.left_out = np.full(rates.shape, np.nan, np.float32)
    patterns, group_of = np.unique(~np.isnan(rates), axis=1, return_inverse=True)
    for index, there in enumerate(patterns.T):
        if there.sum() < LEAST_STIMULI:
            continue
        group = np.flatnonzero(group_of == index)
        own = gram if there.all() else gram.of(there)
        part = fits[method.kind](own, rates[there][:, group].astype(np.float64), method.components)
        _put(found, part, np.ix_(there, group), group)
    return found


def _put(found: Fit, part: Fit, rows: tuple, group: np.ndarray) -> None:
    found.prediction[:, group], found.mean[group], found.dual[rows] = part.prediction, part.mean, part.dual
    if part.penalty is not None:
        found.penalty[group], found.inner_r2[group], found.left_out[rows] = part.penalty, part.inner_r2, part.left_out


def _leading(gram: Gram | FewFeatures, components: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The first `components` of the spectrum, all where None."""
    values, vectors = gram.spectrum
    return values[:components], vectors[:, :components]


def _least_squares(gram: Gram | FewFeatures, rates: np.ndarray, components: int | None) -> Fit:
    """Ordinary least squares on principal component scores: a = U S^-2 U' y."""
    values, vectors = _leading(gram, components)
    mean = rates.mean(axis=0)
    dual = vectors @ ((vectors.T @ (rates - mean)) / values[:, None])
    return Fit(prediction=(gram.predicted(dual) + mean).astype(np.float32), dual=dual, mean=mean)


def _ridge(gram: Gram | FewFeatures, rates: np.ndarray, components: int | None) -> Fit:
    """Ridge regression on principal component scores with a penalty per site: a = U (S^2 + penalty)^-1 U' y.

    The leave-one-out residual of stimulus i is e_i / (1 - H_ii), H the hat matrix (PRESS, Allen 1974), so every penalty
    of a wide grid costs one product.
    """
    values, vectors = _leading(gram, components)
    mean = rates.mean(axis=0)
    centred_rates = rates - mean
    unit = gram.total / len(rates) or 1.0
    rotated, squared = vectors.T @ centred_rates, vectors**2

    def left_out_errors(penalties: np.ndarray) -> np.ndarray:
        shrink = values[:, None] / (values[:, None] + penalties * unit)
        hat = 1 / len(rates) + squared @ shrink
        return (centred_rates - vectors @ (shrink * rotated)) / np.clip(1 - hat, 1e-9, None)

    variance = np.square(centred_rates).sum(axis=0)
    best = np.full(rates.shape[1], np.inf)
    penalty = np.full(rates.shape[1], PENALTIES[-1])
    for candidate in PENALTIES:
        press = np.square(left_out_errors(np.array([candidate]))).sum(axis=0)
        better = press < best
        best, penalty = np.where(better, press, best), np.where(better, candidate, penalty)
    dual = vectors @ (rotated / (values[:, None] + penalty * unit))
    with np.errstate(invalid="ignore", divide="ignore"):
        inner_r2 = np.where(variance > 0, 1 - best / variance, np.nan)
    return Fit(
        prediction=(gram.predicted(dual) + mean).astype(np.float32),
        dual=dual,
        mean=mean,
        penalty=penalty,
        inner_r2=inner_r2,
        left_out=(rates - left_out_errors(penalty)).astype(np.float32),
    )


def _partial_least_squares(gram: Gram, rates: np.ndarray, components: int | None) -> Fit:
    """Partial least squares of all sites together, through the Gram matrix (Rosipal and Trejo 2001).

    Each latent dimension is the one with the largest covariance with the residual responses, found exactly as the
    leading eigenvector of Y' K Y rather than by NIPALS' iteration. Features and responses are centred, not scaled.
    """
    mean = rates.mean(axis=0)
    kernel, residual = gram.fit.copy(), rates - mean
    floor = np.trace(kernel) * len(kernel) * np.finfo(np.float64).eps
    directions, scores = [], []
    for _ in range(min(components or len(rates), len(rates) - 1)):
        _, vectors = np.linalg.eigh(residual.T @ kernel @ residual)
        direction = residual @ vectors[:, -1]
        length = np.linalg.norm(direction)
        score = kernel @ (direction / length) if length > 0 else np.zeros(len(rates))
        if np.linalg.norm(score) <= floor:
            break
        score /= np.linalg.norm(score)
        image = kernel @ score
        kernel += (score @ image) * np.outer(score, score) - np.outer(score, image) - np.outer(image, score)
        residual = residual - np.outer(score, score @ residual)
        directions.append(direction / length)
        scores.append(score)
    if not scores:
        dual = np.zeros(rates.shape)
    else:
        u, t = np.stack(directions, axis=1), np.stack(scores, axis=1)
        dual = u @ np.linalg.solve(t.T @ gram.fit @ u, t.T @ (rates - mean))
    return Fit(prediction=(gram.cross @ dual + mean).astype(np.float32), dual=dual, mean=mean)


def folded_r2(
    products: np.ndarray,
    stimuli: np.ndarray,
    rates: np.ndarray,
    method: Method,
    folds: Sequence[np.ndarray],
    rounding: float = 0.0,
) -> np.ndarray:
    """R2 per site of predictions of stimuli from those of the other folds, float64 (sites,).

    Args:
        products: (N, N) inner products of features.
        stimuli: (n,) positions among the N.
        rates: (n, sites) of these stimuli.
        method: of regression.
        folds: positions among the n, which together hold each once.
        rounding: of the products, see `Gram`.
    """
    predicted = np.full(rates.shape, np.nan)
    everyone = np.arange(len(stimuli))
    for fold in folds:
        others = np.setdiff1d(everyone, fold)
        gram = centred(products, stimuli[others], stimuli[fold], rounding)
        predicted[fold] = regress(gram, rates[others], method).prediction
    return squared_error_r2(predicted, rates)


def squared_error_r2(predicted: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """R2 per site, float64 (sites,), of predictions (n, sites) of rates (n, sites), NaN = not recorded."""
    there = ~np.isnan(rates)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(there, rates, 0).sum(0) / there.sum(0)
        total = np.where(there, rates - mean, 0)
        error = np.where(there, rates - predicted, 0)
        variance = np.square(total).sum(0, dtype=np.float64)
        return np.where(variance > 0, 1 - np.square(error).sum(0, dtype=np.float64) / variance, np.nan)
