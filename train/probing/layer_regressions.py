"""Regresses the responses on each layer of a network, from inner products, and compares layers with the brain.

A layer may consist of several modules whose features are read together, and may be read through several windows over
its map (`train/models/windows.py`); each window has inner products and a regression of its own, and these are stacked.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from train.distributed.runtime import Runtime
from train.evaluation.metrics import mean_score
from train.evaluation.similarity import cka, rsa
from train.models.windows import WHOLE_MAP, Window, probe_windows
from train.probing.product_store import LayerWindow, ProductStore
from train.regression.decomposition import eigh_on
from train.regression.gram import GramMatrix, centred_gram
from train.regression.methods import Method, folded_r2, r2_per_site, regress
from train.regression.precision import ROUNDING
from train.regression.ridge import RidgeFit
from train.regression.stacking import stack
from train.run.recipe import ProbeRecipe


@dataclass(frozen=True)
class Partition:
    """A division of the stimuli into those to fit and those held out, which are scored.

    Attributes:
        fit, held_out: positions among all stimuli.
        inner_folds: of the stimuli to fit, positions among these; they choose the layer.
        copies: of the stimuli to fit, equal for those that show the same image; None if all differ.
    """

    fit: np.ndarray
    held_out: np.ndarray
    inner_folds: list[np.ndarray]
    copies: np.ndarray | None = None


@dataclass(frozen=True)
class Similarity:
    """Similarity of a layer and the responses, over the held-out stimuli and the sites recorded for all of them.

    Attributes:
        rsa, cka: see `train/evaluation/similarity.py`; NaN where there is no such site.
    """

    rsa: float = math.nan
    cka: float = math.nan


@dataclass
class LayerResult:
    """The regressions on a layer.

    Attributes:
        features: number of features of an image.
        prediction: float32 (stimuli, sites); NaN for stimuli that no partition holds out.
        similarity: of layer and responses.
        inner_r2: of each partition, the mean over sites on stimuli left out of the fit.
        penalty: of each partition, float64 (sites,); only for ridge on the whole map.
        left_out: of each partition, float32 (stimuli to fit, sites), each predicted from the others; only for ridge.
        window_centre: of each partition, float64 (2, sites), the mean centre of the windows that a site reads through:
            right and down from the image's middle, in half sides; NaN for a site that reads the whole map. Only with
            windows.
    """

    features: int
    prediction: np.ndarray
    similarity: Similarity
    inner_r2: list[float] = field(default_factory=list)
    penalty: list[np.ndarray] = field(default_factory=list)
    left_out: list[np.ndarray] = field(default_factory=list)
    window_centre: list[np.ndarray] = field(default_factory=list)


class LayerRegressions:
    """The regressions of a probe, shared out among all ranks.

    Args:
        recipe: of the probe.
        layers: names, in order.
        partitions: of the stimuli.
        rates: responses to all stimuli, float32 (stimuli, sites).
        products: the inner products of all stimuli.
        runtime: this process.
    """

    def __init__(
        self,
        recipe: ProbeRecipe,
        layers: list[str],
        partitions: Sequence[Partition],
        rates: np.ndarray,
        products: ProductStore,
        runtime: Runtime,
    ):
        self._recipe, self._layers, self._partitions, self._rates = recipe, layers, partitions, rates
        self._products, self._runtime = products, runtime
        self._decompose = eigh_on(runtime.device)
        self._held_out = np.concatenate([partition.held_out for partition in partitions])

    def run(self) -> dict[str, LayerResult]:
        """The results of all layers, on every rank."""
        layer_windows = probe_windows() if self._recipe.field == "gaussian" else [WHOLE_MAP]
        owners = self._products.compute_missing(
            [LayerWindow(layer, window) for layer in self._layers for window in layer_windows]
        )
        owned = {key: self._regress(key) for key, owner in owners.items() if owner == self._runtime.rank}
        results: dict[LayerWindow, LayerResult] = {}
        for results_of_rank in self._runtime.gather_objects(owned):
            results |= results_of_rank
        return {
            layer: self._stack({window: results[LayerWindow(layer, window)] for window in layer_windows})
            for layer in self._layers
        }

    def _regress(self, layer_window: LayerWindow) -> LayerResult:
        """Regress on a layer through one window, in all partitions."""
        recipe = self._recipe
        method = Method(recipe.readout, recipe.latent if recipe.readout == "pls" else recipe.components)
        rounding = ROUNDING[recipe.products]
        products = self._products.load(layer_window)
        result = LayerResult(
            features=self._products.width(layer_window.layer),
            prediction=np.full(self._rates.shape, np.nan, np.float32),
            similarity=self._similarity(products) if layer_window.window == WHOLE_MAP else Similarity(),
        )
        for partition in self._partitions:
            rates = self._rates[partition.fit]
            gram = centred_gram(products, partition.fit, partition.held_out, rounding, self._decompose)
            fit = regress(replace(gram, copies=partition.copies), rates, method)
            result.prediction[partition.held_out] = fit.prediction
            if isinstance(fit, RidgeFit):
                inner_r2 = fit.inner_r2
                result.penalty.append(fit.penalty)
                result.left_out.append(fit.left_out)
            else:
                inner_r2 = folded_r2(
                    partial(self._fold_of, products, partition.fit), rates, method, partition.inner_folds
                )
            result.inner_r2.append(mean_score(inner_r2))
        return result

    def _fold_of(self, products: np.ndarray, stimuli: np.ndarray, fit: np.ndarray, held_out: np.ndarray) -> GramMatrix:
        """The predictors of a fold, from positions among some of the stimuli."""
        rounding = ROUNDING[self._recipe.products]
        return centred_gram(products, stimuli[fit], stimuli[held_out], rounding, self._decompose)

    def _stack(self, by_window: Mapping[Window, LayerResult]) -> LayerResult:
        """Combine the windows of a layer: each site's weights are learned on the stimuli left out."""
        whole = by_window[WHOLE_MAP]
        if len(by_window) == 1:
            return whole
        stacked = LayerResult(whole.features, np.full_like(whole.prediction, np.nan), whole.similarity)
        centres = np.array([(window.x, window.y) for window in by_window]).T
        is_bounded = np.array([window != WHOLE_MAP for window in by_window])
        for index, partition in enumerate(self._partitions):
            rates, held_out = self._rates[partition.fit], partition.held_out
            left_out = [result.left_out[index] for result in by_window.values()]
            combined = stack(left_out, rates, [result.prediction[held_out] for result in by_window.values()])
            stacked.prediction[held_out] = combined.prediction
            stacked.left_out.append(combined.left_out)
            stacked.inner_r2.append(mean_score(r2_per_site(combined.left_out, rates)))
            weights = combined.weights * is_bounded[:, None]
            with np.errstate(invalid="ignore"):
                stacked.window_centre.append(centres @ weights / weights.sum(axis=0))
        return stacked

    def _similarity(self, products: np.ndarray) -> Similarity:
        rates = self._rates[self._held_out].astype(np.float64)
        complete = rates[:, ~np.isnan(rates).any(axis=0)]
        if not complete.shape[1]:
            return Similarity()
        layer = products[np.ix_(self._held_out, self._held_out)]
        centred = complete - complete.mean(0)
        # A copy, because numpy multiplies an array by its own transpose in a routine that rounds differently.
        brain = centred @ centred.copy().T
        return Similarity(rsa(layer, brain), cka(layer, brain))
