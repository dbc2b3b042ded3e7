"""The leading eigenvalues and eigenvectors of a Gram matrix, and how they were found."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class SpectrumFacts:
    """How components were found.

    Attributes:
        method: `full`, from all eigenvectors of the Gram matrix; `features`, from those of the features' covariance; or
            `krylov`, from a subspace that holds the leading ones (`train/regression/krylov.py`).
        stimuli: that are fitted.
        components: found, which may be fewer than were asked for.
        error: bound on the sine of the angle between the span of the components and that of the exact ones, over all
            directions together (Frobenius norm); 0 where nothing but rounding separates them.
        multiplied: vectors that the Gram matrix was multiplied with.
    """

    method: Literal["full", "features", "krylov"]
    stimuli: int
    components: int
    error: float = 0.0
    multiplied: int = 0


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues and eigenvectors of a Gram matrix, without those that are rounding errors.

    Attributes:
        values: float64 (components,), descending.
        vectors: float64 (n, components).
        facts: how they were found.
    """

    values: np.ndarray
    vectors: np.ndarray
    facts: SpectrumFacts

    @classmethod
    def above_rounding(cls, values: np.ndarray, vectors: np.ndarray, rounding: float = 0.0) -> "Spectrum":
        """All eigenvalues, descending, that exceed `rounding` times the largest."""
        rank = rank_above_rounding(values, len(vectors), rounding)
        return cls(values[:rank], vectors[:, :rank], SpectrumFacts("full", len(vectors), rank))

    def leading(self, components: int | None) -> "Spectrum":
        """The first `components`, all where None."""
        values = self.values[:components]
        facts = replace(self.facts, components=len(values))
        return Spectrum(values, self.vectors[:, :components], facts)


def rank_above_rounding(values: np.ndarray, stimuli: int, rounding: float) -> int:
    """How many eigenvalues, descending, exceed `rounding` times the largest, and the rounding of float64."""
    floor = max(stimuli * np.finfo(np.float64).eps, rounding)
    return int((values > max(values[0], 0) * floor).sum())
