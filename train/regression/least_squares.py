"""Ordinary least squares on principal components, and partial least squares, of sites recorded for all stimuli."""

import numpy as np

from train.regression.fit import Fit
from train.regression.gram import GramMatrix, Predictors


def least_squares(predictors: Predictors, rates: np.ndarray, components: int | None) -> Fit:
    """Ordinary least squares on principal component scores: a = U S^-2 U' y.

    Args:
        predictors: of the stimuli to fit and those held out.
        rates: float64 (n, sites), without NaN.
        components: number of principal components; all where None.
    """
    spectrum = predictors.spectrum.leading(components)
    mean = rates.mean(axis=0)
    dual = spectrum.vectors @ ((spectrum.vectors.T @ (rates - mean)) / spectrum.values[:, None])
    return Fit(prediction=(predictors.predict(dual) + mean).astype(np.float32), dual=dual, mean=mean)


def partial_least_squares(predictors: Predictors, rates: np.ndarray, components: int | None) -> Fit:
    """Partial least squares of all sites together, through the Gram matrix (Rosipal and Trejo 2001).

    Each latent dimension is the one with the largest covariance with the residual responses, found exactly as the
    leading eigenvector of Y' K Y rather than by NIPALS' iteration. Features and responses are centred, not scaled.

    Args:
        predictors: of the stimuli to fit and those held out, as a Gram matrix.
        rates: float64 (n, sites), without NaN.
        components: maximum number of latent dimensions; no limit where None.
    """
    if not isinstance(predictors, GramMatrix):
        raise TypeError("partial least squares needs a Gram matrix")
    mean = rates.mean(axis=0)
    kernel, residual = predictors.fit.copy(), rates - mean
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
        loading = kernel @ score
        kernel += (score @ loading) * np.outer(score, score) - np.outer(score, loading) - np.outer(loading, score)
        residual = residual - np.outer(score, score @ residual)
        directions.append(direction / length)
        scores.append(score)
    if scores:
        u, t = np.stack(directions, axis=1), np.stack(scores, axis=1)
        dual = u @ np.linalg.solve(t.T @ predictors.fit @ u, t.T @ (rates - mean))
    else:
        dual = np.zeros(rates.shape)
    return Fit(prediction=(predictors.predict(dual) + mean).astype(np.float32), dual=dual, mean=mean)
