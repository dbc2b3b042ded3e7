"""Regression on fewer features than stimuli, without a matrix of all stimuli.

The covariance C = X' X of the centred features X (n x p) has the eigenvalues S^2 of the Gram matrix X X', and from its
eigenvectors W follow those of the Gram matrix, U = X W S^-1. The features are read in blocks of rows, and each rank
reads those of its own stimuli.

Accuracy: sums are float64, so an eigenvalue is wrong by about 2e-16 of the largest, as in a Gram matrix of float64
products, and components below that are left out (`rank_above_rounding`). U is made orthonormal to rounding.

Memory of a process: 8 p^2 bytes for C, and four times that on the main rank while C is decomposed (or what
`train/regression/krylov.py` states, where only some of many components are searched for); n x components numbers of 8
bytes for U, and four times that while it is made; and blocks of rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from train.regression.decomposition import eigh_on
from train.regression.krylov import leading_eigen, worth_it
from train.regression.precision import SymmetricSum
from train.regression.rows import Ranks, Rows, block_rows, stripe
from train.regression.spectrum import Spectrum, SpectrumFacts, rank_above_rounding
from train.regression.symmetric_rows import SymmetricRows


@dataclass(frozen=True)
class _Block:
    """Features of some of this rank's stimuli.

    Attributes:
        where: their positions among those asked for.
        features: float64 (stimuli, features), on the device.
    """

    where: np.ndarray
    features: torch.Tensor


@dataclass(frozen=True)
class _Components:
    """Eigenvectors of the covariance.

    Attributes:
        values: float64 (components,), descending.
        weights: float64 (features, components).
        error: see `SpectrumFacts`.
        multiplied: see `SpectrumFacts`.
    """

    values: np.ndarray
    weights: torch.Tensor
    error: float = 0.0
    multiplied: int = 0


@dataclass(frozen=True)
class StripedFeatures:
    """`Predictors` from features that are shared out among ranks.

    Attributes:
        rows: the features of this rank's stimuli, (stimuli of this rank, features), float32 or float64, centred on any
            point or none.
        positions: of these among all stimuli; each of all stimuli is on one rank.
        fit, held_out: positions among all stimuli, ascending.
        ranks: that share the stimuli.
        copies: see `Predictors`.
        memory_bytes: that a search for components may take, and the rows read at a time.
    """

    rows: Rows
    positions: np.ndarray
    fit: np.ndarray
    held_out: np.ndarray
    ranks: Ranks
    copies: np.ndarray | None = field(default=None, kw_only=True)
    memory_bytes: float = field(default=2**30, kw_only=True)
    _found: dict[int, Spectrum] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if (np.diff(self.fit) <= 0).any() or (np.diff(self.held_out) <= 0).any():
            raise ValueError("the positions of the stimuli must ascend")

    @property
    def held_out_count(self) -> int:
        """See `Predictors`."""
        return len(self.held_out)

    @property
    def trace(self) -> float:
        """See `Predictors`."""
        return float(self._covariance.diagonal().sum())

    def leading(self, components: int | None) -> Spectrum:
        """See `Predictors`."""
        largest = min(len(self.fit), self.rows.shape[1])
        wanted = min(components or largest, largest)
        if wanted not in self._found:
            self._found[wanted] = self._spectrum(wanted)
        return self._found[wanted]

    def multiply(self, weights: np.ndarray) -> np.ndarray:
        """See `Predictors`."""
        in_features = self._feature_weights(weights)
        return self._of_stimuli(self.fit, lambda features: features @ in_features)

    def predict(self, dual: np.ndarray) -> np.ndarray:
        """See `Predictors`."""
        in_features = self._feature_weights(dual)
        return self._of_stimuli(self.held_out, lambda features: features @ in_features)

    def subset(self, recorded: np.ndarray) -> "StripedFeatures":
        """See `Predictors`."""
        copies = None if self.copies is None else self.copies[recorded]
        return replace(self, fit=self.fit[recorded], copies=copies)

    # ------------------------------------------------------------------------------------------------- the components

    @cached_property
    def _mean(self) -> torch.Tensor:
        """Of the features over the stimuli to fit, float64 (features,)."""
        total = torch.zeros(self.rows.shape[1], dtype=torch.float64, device=self.ranks.device)
        for block in self._blocks(self.fit):
            total += block.features.sum(0)
        return self.ranks.sum(total) / len(self.fit)

    @cached_property
    def _covariance(self) -> torch.Tensor:
        """C, float64 (features, features), on every rank."""
        products = SymmetricSum(self.rows.shape[1], "float64", self.ranks.device)
        for block in self._blocks(self.fit):
            products.add((block.features - self._mean).T)
        total = products.total()
        for part in total.split(block_rows(self.rows)):  # a sum has those of all ranks in memory
            part.copy_(self.ranks.sum(part))
        return total

    def _spectrum(self, wanted: int) -> Spectrum:
        found = self._search(wanted) or self._decompose(wanted)
        # Of a site with few responses, the covariance has more rounding errors than the stimuli have components.
        rank = rank_above_rounding(found.values, max(len(self.fit), self.rows.shape[1]), 0.0)
        values, scale = found.values[:rank], torch.from_numpy(np.sqrt(found.values[:rank])).to(self.ranks.device)
        weights = found.weights[:, :rank] / scale
        vectors = self._of_stimuli(self.fit, lambda features: features @ weights)
        facts = SpectrumFacts("features", len(self.fit), rank, found.error, found.multiplied)
        return Spectrum(values, _orthonormal(vectors), facts)

    def _search(self, wanted: int) -> _Components | None:
        """The leading eigenvectors alone; None where all are cheaper, or these are not found."""
        features, ranks = self.rows.shape[1], self.ranks
        if not worth_it(features, wanted):
            return None
        own = stripe(features, ranks.rank, ranks.ranks)
        rows = self._covariance[own].cpu().numpy()
        everything = np.arange(features)
        matrix = SymmetricRows(rows, own.start, everything, ranks, False, self.memory_bytes)
        found = leading_eigen(matrix, wanted, self.memory_bytes, decompose=eigh_on(ranks.device))
        if found is None:
            return None
        weights = torch.from_numpy(ranks.gather_rows(found.vectors)).to(ranks.device)
        return _Components(found.values, weights, found.error, found.multiplied)

    def _decompose(self, wanted: int) -> _Components:
        """All eigenvectors, on the main rank."""
        features, device = self.rows.shape[1], self.ranks.device
        found = torch.zeros(features + 1, wanted, dtype=torch.float64, device=device)
        covariance = self._covariance
        if self.ranks.rank == 0:
            eigen = eigh_on(device)(covariance.cpu().numpy())
            found[0] = torch.from_numpy(eigen.values[::-1][:wanted].copy())
            found[1:] = torch.from_numpy(eigen.vectors[:, ::-1][:, :wanted].copy())
        found = self.ranks.broadcast(found)
        return _Components(found[0].cpu().numpy(), found[1:])

    # ------------------------------------------------------------------------------------------------ reading features

    def _feature_weights(self, dual: np.ndarray) -> torch.Tensor:
        """X' dual, of dual weights (n, columns): float64 (features, columns)."""
        weights = torch.from_numpy(dual).to(self.ranks.device)
        total = weights.new_zeros(self.rows.shape[1], dual.shape[1])
        for block in self._blocks(self.fit):
            total.addmm_((block.features - self._mean).T, weights[torch.from_numpy(block.where).to(weights.device)])
        return self.ranks.sum(total)

    def _of_stimuli(self, stimuli: np.ndarray, compute: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
        """Compute rows from the centred features of stimuli: float64 (stimuli, columns), on every rank."""
        where, parts = [], []
        for block in self._blocks(stimuli):
            where.append(block.where)
            parts.append(compute(block.features - self._mean))
        gathered = self.ranks.gather_rows(torch.cat(parts))
        order = self.ranks.gather_rows(torch.from_numpy(np.concatenate(where)).to(self.ranks.device))
        if (order == np.arange(len(order))).all():
            return gathered
        sorted_rows = np.empty_like(gathered)
        sorted_rows[order] = gathered
        return sorted_rows

    def _blocks(self, stimuli: np.ndarray) -> Iterator[_Block]:
        """The features of those of the stimuli that are on this rank, at least one block."""
        where = np.searchsorted(stimuli, self.positions)
        is_among = stimuli[np.minimum(where, len(stimuli) - 1)] == self.positions if len(stimuli) else where < 0
        height = block_rows(self.rows, self.memory_bytes)
        for start in range(0, max(len(where), 1), height):
            chosen = is_among[start : start + height]
            features = torch.from_numpy(self.rows[start : start + height][chosen]).to(self.ranks.device)
            yield _Block(where[start : start + height][chosen], features.double())


def _orthonormal(vectors: np.ndarray) -> np.ndarray:
    """Remove what rounding has left of earlier columns in later ones, (n, columns)."""
    columns = torch.from_numpy(vectors)
    for _ in range(2):
        triangle = torch.linalg.cholesky(columns.T @ columns)
        columns = torch.linalg.solve_triangular(triangle.T, columns, upper=True, left=False)
    return columns.numpy()
