"""Makes a regression's predictors, and compares a layer with the brain, from what is on disk of the layer."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from train.distributed.runtime import Runtime
from train.evaluation.similarity import cka, rsa
from train.probing.layer_results import Similarity
from train.probing.product_store import Source
from train.regression.decomposition import eigh_on
from train.regression.feature_rows import FeatureRows
from train.regression.gram import Predictors, centred_gram
from train.regression.precision import ROUNDING
from train.regression.rows import RowFile, Rows, block_rows
from train.regression.striped_features import StripedFeatures
from train.regression.striped_gram import StripedGram
from train.run.recipe import ProbeRecipe

MOST_COMPARED = 4096  # stimuli that similarity is computed over; all pairs of more take too much memory
COLUMN_COPIES = 8  # of columns in memory at a time while similarity is computed


@dataclass(frozen=True)
class OpenSource:
    """What a regression needs of a layer.

    Attributes:
        predictors: (positions to fit, positions held out, copies of those to fit) -> predictors.
        similarity: () -> similarity of layer and responses; on the leading rank, or the owner. NaN on the others.
    """

    predictors: Callable[[np.ndarray, np.ndarray, np.ndarray | None], Predictors]
    similarity: Callable[[], Similarity]


class SourceReading:
    """Opens sources.

    Args:
        recipe: of the probe.
        rates: responses to all stimuli, float32 (stimuli, sites).
        held_out: positions of the stimuli that are scored.
        runtime: this process.
    """

    def __init__(self, recipe: ProbeRecipe, rates: np.ndarray, held_out: np.ndarray, runtime: Runtime):
        self._runtime, self._memory_bytes = runtime, recipe.memory * 2**30
        self._decompose, self._rounding = eigh_on(runtime.device), ROUNDING[recipe.products]
        self._compared = held_out
        if len(held_out) > MOST_COMPARED:
            self._compared = held_out[np.arange(MOST_COMPARED) * len(held_out) // MOST_COMPARED]
        self._rates = rates[self._compared]

    def open(self, source: Source) -> OpenSource:
        """Open a source; every rank must take part unless one owns it."""
        match source.rows:
            case FeatureRows():
                return self._open_features(source.rows)
            case None:
                raise ValueError("another rank has this matrix")
            case rows if source.owner is None:
                return self._open_shared(rows, source.first)
            case rows:
                return self._open_owned(rows[:].astype(np.float64, copy=False))

    def _open_owned(self, products: np.ndarray) -> OpenSource:
        def predictors(fit: np.ndarray, held_out: np.ndarray, copies: np.ndarray | None) -> Predictors:
            gram = centred_gram(products, fit, held_out, self._rounding, self._decompose)
            return replace(gram, copies=copies)

        return OpenSource(predictors, lambda: self._similarity(products[np.ix_(self._compared, self._compared)]))

    def _open_shared(self, rows: RowFile, first: int) -> OpenSource:
        def predictors(fit: np.ndarray, held_out: np.ndarray, copies: np.ndarray | None) -> Predictors:
            return StripedGram(
                rows,
                first,
                fit,
                held_out,
                self._runtime,
                rounding=self._rounding,
                decompose=self._decompose,
                copies=copies,
                memory_bytes=self._memory_bytes,
            )

        def similarity() -> Similarity:
            products = self._gathered(rows, np.arange(rows.shape[0]) + first, self._compared)
            return self._similarity(products) if self._runtime.is_main else Similarity()

        return OpenSource(predictors, similarity)

    def _open_features(self, rows: FeatureRows) -> OpenSource:
        def predictors(fit: np.ndarray, held_out: np.ndarray, copies: np.ndarray | None) -> Predictors:
            return StripedFeatures(
                rows,
                rows.positions,
                fit,
                held_out,
                self._runtime,
                copies=copies,
                memory_bytes=self._memory_bytes,
            )

        def similarity() -> Similarity:
            products = np.zeros((len(self._compared), len(self._compared)))
            width = max(int(self._memory_bytes / COLUMN_COPIES / (8 * len(self._compared))), 1)
            for start in range(0, rows.shape[1], width):
                columns = np.arange(start, min(start + width, rows.shape[1]))
                features = self._gathered(rows, rows.positions, columns).astype(np.float64)
                if self._runtime.is_main:
                    features -= features.mean(axis=0)
                    products += features @ features.T
            return self._similarity(products) if self._runtime.is_main else Similarity()

        return OpenSource(predictors, similarity)

    def _gathered(self, rows: Rows, positions: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Some columns of the stimuli that are compared, whose rows lie on several ranks.

        Args:
            rows: of this rank.
            positions: of these among all stimuli.
            columns: to take.
        """
        wanted = np.isin(positions, self._compared)
        parts, height = [np.empty((0, len(columns)), rows.dtype)], block_rows(rows)
        for start in range(0, rows.shape[0], height):
            chosen = wanted[start : start + height]
            if chosen.any():
                parts.append(rows[start : start + height][chosen][:, columns])
        device = self._runtime.device
        gathered = self._runtime.gather_rows(torch.from_numpy(np.concatenate(parts)).to(device))
        order = self._runtime.gather_rows(torch.from_numpy(positions[wanted]).to(device))
        return gathered[np.argsort(order)[np.searchsorted(np.sort(order), self._compared)]]

    def _similarity(self, layer: np.ndarray) -> Similarity:
        """Of the inner products of the stimuli that are compared, on the rank that has them all."""
        rates = self._rates.astype(np.float64)
        complete = rates[:, ~np.isnan(rates).any(axis=0)]
        if not complete.shape[1]:
            return Similarity()
        centred = complete - complete.mean(0)
        # A copy, because numpy multiplies an array by its own transpose in a routine that rounds differently.
        brain = centred @ centred.copy().T
        return Similarity(rsa(layer, brain), cka(layer, brain))
