"""The features as a linear regression needs them: a centred Gram matrix, or the features themselves if they are few.

With centred features X (n x p) and K = X X' = U S^2 U', the principal component scores of the stimuli are U S, and
whatever is linear in the features is a weighting of the stimuli to fit: prediction = K_new,fit a + mean. `a` are the
dual weights.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from train.regression.decomposition import Decomposition, eigh_on_cpu


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues and eigenvectors of a Gram matrix, without those that are rounding errors.

    Attributes:
        values: float64 (components,), descending.
        vectors: float64 (n, components).
    """

    values: np.ndarray
    vectors: np.ndarray

    @classmethod
    def above_rounding(cls, values: np.ndarray, vectors: np.ndarray, rounding: float = 0.0) -> "Spectrum":
        """Keep the eigenvalues, descending, that exceed `rounding` times the largest."""
        floor = max(len(vectors) * np.finfo(np.float64).eps, rounding)
        rank = int((values > max(values[0], 0) * floor).sum())
        return cls(values[:rank], vectors[:, :rank])

    def leading(self, components: int | None) -> "Spectrum":
        """The first `components`, all where None."""
        return Spectrum(self.values[:components], self.vectors[:, :components])


@dataclass(frozen=True)
class GramMatrix:
    """Inner products of features that are centred on the mean of the stimuli to fit, float64.

    Attributes:
        fit: (n, n).
        cross: (held out, n).
        rounding: of the products, relative to the largest eigenvalue. Components below it are rounding errors, and a
            leave-one-out estimate that used them would be wrong.
        decompose: computes the eigenvectors of `fit`.
        copies: (n,), equal for stimuli that show the same image, which a leave-one-out estimate leaves out together;
            None if each counts by itself.
    """

    fit: np.ndarray
    cross: np.ndarray
    rounding: float = 0.0
    decompose: Decomposition = eigh_on_cpu
    copies: np.ndarray | None = None

    @cached_property
    def spectrum(self) -> Spectrum:
        """Of `fit`."""
        eigen = self.decompose(self.fit)
        return Spectrum.above_rounding(eigen.values[::-1], eigen.vectors[:, ::-1], self.rounding)

    @property
    def trace(self) -> float:
        """Sum of the eigenvalues."""
        return float(np.trace(self.fit))

    def predict(self, dual: np.ndarray) -> np.ndarray:
        """Predictions (held out, sites) of dual weights (n, sites), without the mean."""
        return self.cross @ dual

    def subset(self, recorded: np.ndarray) -> "GramMatrix":
        """Only the stimuli to fit that are `recorded`, (n,) bool, centred on their mean."""
        stacked = np.vstack([self.fit, self.cross])
        square = np.zeros((len(stacked), len(stacked)))
        square[:, : len(recorded)] = stacked
        held_out = np.arange(len(recorded), len(stacked))
        gram = centred_gram(square, np.flatnonzero(recorded), held_out, self.rounding, self.decompose)
        return gram if self.copies is None else replace(gram, copies=self.copies[recorded])


@dataclass(frozen=True)
class FeatureMatrix:
    """Features where they are fewer than the stimuli, float64: replaces a `GramMatrix` without n x n numbers.

    Attributes:
        fit: (n, features), centred on their mean.
        cross: (held out, features), centred on the mean of those to fit.
        copies: see `GramMatrix`.
    """

    fit: np.ndarray
    cross: np.ndarray
    copies: np.ndarray | None = None

    @classmethod
    def centred(cls, fit: np.ndarray, held_out: np.ndarray) -> "FeatureMatrix":
        """Centre features (n, features) and (held out, features)."""
        mean = fit.mean(axis=0, dtype=np.float64)
        return cls(fit - mean, held_out - mean)

    @cached_property
    def spectrum(self) -> Spectrum:
        """Of the Gram matrix."""
        vectors, singular, _ = np.linalg.svd(self.fit, full_matrices=False)
        return Spectrum.above_rounding(singular**2, vectors)

    @property
    def trace(self) -> float:
        """Sum of the eigenvalues of the Gram matrix."""
        return float(np.square(self.fit).sum())

    def predict(self, dual: np.ndarray) -> np.ndarray:
        """Predictions (held out, sites) of dual weights (n, sites), without the mean."""
        return self.cross @ (self.fit.T @ dual)

    def subset(self, recorded: np.ndarray) -> "FeatureMatrix":
        """Only the stimuli to fit that are `recorded`, (n,) bool, centred on their mean."""
        features = FeatureMatrix.centred(self.fit[recorded], self.cross)
        return features if self.copies is None else replace(features, copies=self.copies[recorded])


Predictors = GramMatrix | FeatureMatrix


def centred_gram(
    products: np.ndarray,
    fit: np.ndarray,
    held_out: np.ndarray,
    rounding: float = 0.0,
    decompose: Decomposition = eigh_on_cpu,
) -> GramMatrix:
    """The Gram matrix of a subset of the stimuli, centred on those to fit.

    Args:
        products: float64 (N, N), inner products of all stimuli's features, centred on any point or none.
        fit, held_out: positions among the N.
        rounding: of the products, see `GramMatrix`.
        decompose: computes eigenvectors.
    """
    among_fit, cross = products[np.ix_(fit, fit)], products[np.ix_(held_out, fit)]
    column_mean = among_fit.mean(axis=0)
    overall_mean = column_mean.mean()
    return GramMatrix(
        fit=among_fit - column_mean - column_mean[:, None] + overall_mean,
        cross=cross - cross.mean(axis=1, keepdims=True) - column_mean + overall_mean,
        rounding=rounding,
        decompose=decompose,
    )
