"""Regression through a Gram matrix that is too large to copy: its rows lie on disk, or on several ranks.

Memory of a process, for n stimuli to fit: blocks of rows; n x components numbers of 8 bytes for the eigenvectors; and
while these are computed, what `train/regression/krylov.py` states, or where all eigenvectors are computed, four
matrices of 8 n^2 bytes on the main rank.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from train.regression.decomposition import Decomposition, eigh_on_cpu
from train.regression.gram import centre_in_place
from train.regression.krylov import leading_eigen, worth_it
from train.regression.rows import Ranks, Rows
from train.regression.spectrum import Spectrum, SpectrumFacts
from train.regression.symmetric_rows import SymmetricRows


@dataclass(frozen=True)
class StripedGram:
    """`Predictors` from inner products of all stimuli, whose rows are shared out among ranks.

    Attributes:
        rows: this rank's rows, (rows, stimuli), float32 or float64; the features are centred on any point or none.
        first: position of its first row among all stimuli; the ranks have all rows, one rank after the other.
        fit, held_out: positions among all stimuli; `fit` ascending.
        ranks: that share the rows.
        rounding: of the products, see `GramMatrix`.
        decompose: computes all eigenvectors, where that is cheaper.
        copies: see `Predictors`.
        memory_bytes: that a search for eigenvectors may take, and the rows read at a time.
    """

    rows: Rows
    first: int
    fit: np.ndarray
    held_out: np.ndarray
    ranks: Ranks
    rounding: float = field(default=0.0, kw_only=True)
    decompose: Decomposition = field(default=eigh_on_cpu, kw_only=True)
    copies: np.ndarray | None = field(default=None, kw_only=True)
    memory_bytes: float = field(default=2**30, kw_only=True)
    _found: dict[int, Spectrum] = field(default_factory=dict, init=False, repr=False)

    @property
    def held_out_count(self) -> int:
        """See `Predictors`."""
        return len(self.held_out)

    @property
    def trace(self) -> float:
        """See `Predictors`."""
        return float(self._matrix.diagonal.sum())

    @cached_property
    def _matrix(self) -> SymmetricRows:
        return SymmetricRows(self.rows, self.first, self.fit, self.ranks, True, self.memory_bytes)

    def leading(self, components: int | None) -> Spectrum:
        """See `Predictors`."""
        wanted = min(components or len(self.fit), len(self.fit))
        if wanted not in self._found:
            self._found[wanted] = self._search(wanted) or self._decompose(wanted)
        return self._found[wanted]

    def multiply(self, weights: np.ndarray) -> np.ndarray:
        """See `Predictors`."""
        product = self._matrix.multiply_whole(torch.from_numpy(weights).to(self.ranks.device))
        return self.ranks.gather_rows(product)

    def predict(self, dual: np.ndarray) -> np.ndarray:
        """See `Predictors`."""
        order = np.argsort(self.held_out)
        product = self._matrix.other_rows(self.held_out[order], torch.from_numpy(dual).to(self.ranks.device))
        prediction = np.empty((len(order), dual.shape[1]))
        prediction[order] = self.ranks.gather_rows(product)
        return prediction

    def subset(self, recorded: np.ndarray) -> "StripedGram":
        """See `Predictors`."""
        copies = None if self.copies is None else self.copies[recorded]
        return replace(self, fit=self.fit[recorded], copies=copies)

    def _search(self, wanted: int) -> Spectrum | None:
        """The leading eigenvectors alone; None where all are cheaper, or these are not found."""
        if not worth_it(len(self.fit), wanted):
            return None
        found = leading_eigen(self._matrix, wanted, self.memory_bytes, self.rounding, self.decompose)
        if found is None:
            return None
        facts = SpectrumFacts("krylov", len(self.fit), len(found.values), found.error, found.multiplied)
        return Spectrum(found.values, self.ranks.gather_rows(found.vectors), facts)

    def _decompose(self, wanted: int) -> Spectrum:
        """All eigenvectors, on the main rank."""
        dense, device = self._matrix.dense(), self.ranks.device
        found = torch.zeros(len(self.fit) + 1, wanted, dtype=torch.float64, device=device)
        if dense is not None:
            centre_in_place(dense)
            eigen = self.decompose(dense)
            del dense
            found[0] = torch.from_numpy(eigen.values[::-1][:wanted].copy())
            found[1:] = torch.from_numpy(eigen.vectors[:, ::-1][:, :wanted].copy())
        values_and_vectors = self.ranks.broadcast(found).cpu().numpy()
        return Spectrum.above_rounding(values_and_vectors[0], values_and_vectors[1:], self.rounding)
