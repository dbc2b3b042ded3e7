"""Ordinary least squares on principal components, and partial least squares, of sites recorded for all stimuli."""

import numpy as np
import torch

from train.regression.fit import Fit
from train.regression.gram import Predictors


def least_squares(predictors: Predictors, rates: np.ndarray, components: int | None) -> Fit:
    """Ordinary least squares on principal component scores: a = U S^-2 U' y.

    Args:
        predictors: of the stimuli to fit and those held out.
        rates: float64 (n, sites), without NaN.
        components: number of principal components; all where None.
    """
    spectrum = predictors.leading(components)
    mean = rates.mean(axis=0)
    dual = spectrum.vectors @ ((spectrum.vectors.T @ (rates - mean)) / spectrum.values[:, None])
    prediction = (predictors.predict(dual) + mean).astype(np.float32)
    return Fit(prediction=prediction, dual=dual, mean=mean, spectra=[spectrum.facts])


def partial_least_squares(predictors: Predictors, rates: np.ndarray, components: int | None) -> Fit:
    """Partial least squares of all sites together, through the Gram matrix K (Rosipal and Trejo 2001).

    Each latent dimension is the one with the largest covariance with the residual responses, found exactly as the
    leading eigenvector of Y' K Y rather than by NIPALS' iteration. Features and responses are centred, not scaled.

    K is not deflated: with the scores T so far, orthonormal, the deflated matrix is (I - T T') K (I - T T'), and the
    residual Y = (I - T T') Y is orthogonal to T. So K is multiplied once with the responses and then, for each
    dimension, with its score; K Y follows from these products. Memory beside K: three times n x sites numbers, and
    three times n x dimensions.

    Args:
        predictors: of the stimuli to fit and those held out.
        rates: float64 (n, sites), without NaN.
        components: maximum number of latent dimensions; no limit where None.
    """
    mean = rates.mean(axis=0)
    residual = rates - mean
    product = predictors.multiply(residual)  # K Y
    floor = predictors.trace * len(rates) * np.finfo(np.float64).eps
    directions: list[np.ndarray] = []
    scores: list[np.ndarray] = []
    score_products: list[np.ndarray] = []
    for _ in range(min(components or len(rates), len(rates) - 1)):
        direction = _agreed(predictors, np.linalg.eigh(residual.T @ product)[1][:, -1])
        weights = residual @ direction
        length = np.linalg.norm(weights)
        score = product @ direction / length if length > 0 else np.zeros(len(rates))
        for before in [*scores, *scores]:
            score -= before * (before @ score)
        score = _agreed(predictors, score)
        if np.linalg.norm(score) <= floor:
            break
        score /= np.linalg.norm(score)
        score_product = predictors.multiply(score[:, None])[:, 0]
        loading = score @ residual
        residual -= np.outer(score, loading)
        product -= np.outer(score_product, loading)
        directions.append(weights / length)
        scores.append(score)
        score_products.append(score_product)
    if scores:
        u, t, k_t = (np.stack(vectors, axis=1) for vectors in (directions, scores, score_products))
        dual = u @ np.linalg.solve(k_t.T @ u, t.T @ (rates - mean))
    else:
        dual = np.zeros(rates.shape)
    return Fit(prediction=(predictors.predict(dual) + mean).astype(np.float32), dual=dual, mean=mean)


def _agreed(predictors: Predictors, vector: np.ndarray) -> np.ndarray:
    """That of the main rank: the sign of an eigenvector is arbitrary, and all ranks must end at the same dimension."""
    ranks = predictors.ranks
    return ranks.broadcast(torch.from_numpy(vector.copy()).to(ranks.device)).cpu().numpy()
