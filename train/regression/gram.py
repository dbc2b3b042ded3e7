"""The features as a linear regression needs them: through a centred Gram matrix.

With centred features X (n x p) and K = X X' = U S^2 U', the principal component scores of the stimuli are U S, and
whatever is linear in the features is a weighting of the stimuli to fit: prediction = K_new,fit a + mean. `a` are the
dual weights.

`Predictors` are what a regression works on: `GramMatrix`, or `FeatureMatrix` where the features are fewer than the
stimuli; and where these are many, `StripedGram` and `StripedFeatures`, whose rows lie on disk or on several ranks.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, Self

import numpy as np

from train.regression.decomposition import Decomposition, eigh_on_cpu
from train.regression.rows import ON_CPU, Ranks
from train.regression.spectrum import Spectrum


class Predictors(Protocol):
    """Features of the stimuli to fit and of those held out, centred on the mean of those to fit.

    Where several `ranks` hold them between them, all ranks call the methods together, with the same arguments, and get
    the same results.
    """

    @property
    def copies(self) -> np.ndarray | None:
        """(n,), equal for stimuli that show the same image, which a leave-one-out estimate leaves out together.

        None if each counts by itself.
        """

    @property
    def ranks(self) -> Ranks:
        """The processes that take part."""

    @property
    def held_out_count(self) -> int:
        """Number of stimuli held out."""

    @property
    def trace(self) -> float:
        """Sum of the eigenvalues of the Gram matrix."""

    def leading(self, components: int | None) -> Spectrum:
        """The largest eigenvalues of the Gram matrix, at most `components`, with their eigenvectors."""

    def multiply(self, weights: np.ndarray) -> np.ndarray:
        """The Gram matrix times float64 (n, columns)."""

    def predict(self, dual: np.ndarray) -> np.ndarray:
        """Predictions (held out, sites) of dual weights (n, sites), without the mean."""

    def subset(self, recorded: np.ndarray) -> Self:
        """Only the stimuli to fit that are `recorded`, (n,) bool, centred on their mean."""


class _InMemory(ABC):
    """Predictors that one process has in its memory.

    Attributes:
        cross: of the stimuli held out, a row each.
    """

    cross: np.ndarray

    @property
    @abstractmethod
    def spectrum(self) -> Spectrum:
        """Of the Gram matrix."""

    @property
    def ranks(self) -> Ranks:
        """This process alone."""
        return ON_CPU

    @property
    def held_out_count(self) -> int:
        """See `Predictors`."""
        return len(self.cross)

    def leading(self, components: int | None) -> Spectrum:
        """See `Predictors`."""
        return self.spectrum.leading(components)


@dataclass(frozen=True)
class GramMatrix(_InMemory):
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

    def multiply(self, weights: np.ndarray) -> np.ndarray:
        """See `Predictors`."""
        return self.fit @ weights

    @cached_property
    def spectrum(self) -> Spectrum:
        """Of `fit`."""
        eigen = self.decompose(self.fit)
        return Spectrum.above_rounding(eigen.values[::-1], eigen.vectors[:, ::-1], self.rounding)

    @property
    def trace(self) -> float:
        """See `Predictors`."""
        return float(np.trace(self.fit))

    def predict(self, dual: np.ndarray) -> np.ndarray:
        """See `Predictors`."""
        return self.cross @ dual

    def subset(self, recorded: np.ndarray) -> "GramMatrix":
        """See `Predictors`."""
        stacked = np.vstack([self.fit, self.cross])
        square = np.zeros((len(stacked), len(stacked)))
        square[:, : len(recorded)] = stacked
        held_out = np.arange(len(recorded), len(stacked))
        gram = centred_gram(square, np.flatnonzero(recorded), held_out, self.rounding, self.decompose)
        return gram if self.copies is None else replace(gram, copies=self.copies[recorded])


@dataclass(frozen=True)
class FeatureMatrix(_InMemory):
    """Features where they are fewer than the stimuli, float64: takes the place of a `GramMatrix`.

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

    def multiply(self, weights: np.ndarray) -> np.ndarray:
        """See `Predictors`."""
        return self.fit @ (self.fit.T @ weights)

    @cached_property
    def spectrum(self) -> Spectrum:
        """Of the Gram matrix."""
        vectors, singular, _ = np.linalg.svd(self.fit, full_matrices=False)
        return Spectrum.above_rounding(singular**2, vectors)

    @property
    def trace(self) -> float:
        """See `Predictors`."""
        return float(np.square(self.fit).sum())

    def predict(self, dual: np.ndarray) -> np.ndarray:
        """See `Predictors`."""
        return self.cross @ (self.fit.T @ dual)

    def subset(self, recorded: np.ndarray) -> "FeatureMatrix":
        """See `Predictors`."""
        features = FeatureMatrix.centred(self.fit[recorded], self.cross)
        return features if self.copies is None else replace(features, copies=self.copies[recorded])


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
    column_mean = centre_in_place(among_fit)
    return GramMatrix(
        fit=among_fit,
        cross=cross - cross.mean(axis=1, keepdims=True) - column_mean + column_mean.mean(),
        rounding=rounding,
        decompose=decompose,
    )


def centre_in_place(products: np.ndarray) -> np.ndarray:
    """Centre the features behind float64 products (n, n) on their mean; returns the columns' means before, (n,)."""
    column_mean = products.mean(axis=0)
    products -= column_mean
    products -= column_mean[:, None]
    products += column_mean.mean()
    return column_mean
