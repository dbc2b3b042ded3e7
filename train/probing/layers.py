"""What a probe does with the inner products of its layers (`products.py`): regressions, likeness of layer and brain.

A layer may be several modules whose features are read together, and be looked at through several windows
(`train/models/windows.py`); each of these views has inner products and a regression of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from train.distributed.runtime import Runtime
from train.evaluation.metrics import mean_score
from train.evaluation.similarity import cka, rsa
from train.models.windows import WHOLE_MAP, Window, probe_windows
from train.probing.products import Products, View
from train.regression.gram import centred_gram
from train.regression.methods import Method, folded_r2, r2_per_site, regress
from train.regression.precision import ROUNDING
from train.regression.ridge import RidgeFit
from train.regression.stacking import stack
from train.run.recipe import ProbeRecipe


@dataclass(frozen=True)
class Partition:
    """A fit and what it is tried on: positions among all stimuli, and folds of the fit's positions that select."""

    fit: np.ndarray
    held_out: np.ndarray
    inner_folds: list[np.ndarray]


@dataclass
class Layer:
    """What was found for a layer.

    Attributes:
        features: of an image.
        prediction: float32 (stimuli, sites); NaN for stimuli that no partition held out.
        inner_r2: of each partition: mean over sites, on stimuli left out of the fit.
        rsa, cka: likeness to the responses, over the stimuli that were held out and the sites recorded for all of them.
        penalty: of each partition, float64 (sites,); empty but for ridge on the whole map.
        left_out: of each partition, float32 (stimuli to fit, sites), predictions from the others; empty but for ridge.
        centre: of each partition, float64 (2, sites): where the windows lie that a site reads from, right and down from
            the image's middle, in half sides; NaN for a site that reads from the whole map. Empty without windows.
    """

    features: int
    prediction: np.ndarray
    inner_r2: list[float]
    rsa: float
    cka: float
    penalty: list[np.ndarray] = field(default_factory=list)
    left_out: list[np.ndarray] = field(default_factory=list)
    centre: list[np.ndarray] = field(default_factory=list)


class Probing:
    """The regressions of a probe, shared by all processes.

    Args:
        recipe: its settings.
        layers: names, in order.
        partitions: what is fitted, and what it is tried on.
        rates: float32 (stimuli, sites), of all stimuli.
        products: of these.
        runtime: this process.
    """

    def __init__(
        self,
        recipe: ProbeRecipe,
        layers: list[str],
        partitions: Sequence[Partition],
        rates: np.ndarray,
        products: Products,
        runtime: Runtime,
    ):
        self._recipe, self._layers, self._partitions, self._rates = recipe, layers, partitions, rates
        self._products, self._runtime = products, runtime
        self._held_out = np.concatenate([partition.held_out for partition in partitions])

    def run(self) -> dict[str, Layer]:
        """All layers, on every rank."""
        tried = probe_windows() if self._recipe.field == "gaussian" else [WHOLE_MAP]
        owners = self._products.make([View(layer, window) for layer in self._layers for window in tried])
        solved = {view: self._solve(view) for view, owner in owners.items() if owner == self._runtime.rank}
        everyones = {view: found for part in self._runtime.gather_objects(solved) for view, found in part.items()}
        return {
            layer: self._joined({window: everyones[View(layer, window)] for window in tried}) for layer in self._layers
        }

    def _solve(self, view: View) -> Layer:
        """All partitions of a layer, through one window."""
        products = self._products.load(view)
        recipe = self._recipe
        method = Method(recipe.readout, recipe.latent if recipe.readout == "pls" else recipe.components)
        prediction = np.full(self._rates.shape, np.nan, np.float32)
        likeness = self._likeness(products) if view.window == WHOLE_MAP else (float("nan"), float("nan"))
        layer = Layer(self._products.width(view.layer), prediction, [], *likeness)
        rounding = ROUNDING[recipe.products]
        for partition in self._partitions:
            rates = self._rates[partition.fit]
            found = regress(centred_gram(products, partition.fit, partition.held_out, rounding), rates, method)
            prediction[partition.held_out] = found.prediction
            if isinstance(found, RidgeFit):
                layer.inner_r2.append(mean_score(found.inner_r2))
                layer.penalty.append(found.penalty)
                layer.left_out.append(found.left_out)
            else:
                folded = folded_r2(products, partition.fit, rates, method, partition.inner_folds, rounding)
                layer.inner_r2.append(mean_score(folded))
        return layer

    def _joined(self, found: Mapping[Window, Layer]) -> Layer:
        """A layer through all windows that were tried: each site's weights are learned on the stimuli left out."""
        whole = found[WHOLE_MAP]
        if len(found) == 1:
            return whole
        joined = Layer(whole.features, np.full_like(whole.prediction, np.nan), [], whole.rsa, whole.cka)
        places = np.array([(window.x, window.y) for window in found]).T
        bounded = np.array([window != WHOLE_MAP for window in found])
        for index, partition in enumerate(self._partitions):
            rates, held_out = self._rates[partition.fit], partition.held_out
            left_out = [layer.left_out[index] for layer in found.values()]
            stacked = stack(left_out, rates, [layer.prediction[held_out] for layer in found.values()])
            joined.prediction[held_out] = stacked.prediction
            joined.left_out.append(stacked.left_out)
            joined.inner_r2.append(mean_score(r2_per_site(stacked.left_out, rates)))
            weights = stacked.weights * bounded[:, None]
            with np.errstate(invalid="ignore"):
                joined.centre.append(places @ weights / weights.sum(axis=0))
        return joined

    def _likeness(self, products: np.ndarray) -> tuple[float, float]:
        """RSA and CKA with the sites that were recorded for all held-out stimuli."""
        rates = self._rates[self._held_out].astype(np.float64)
        whole = rates[:, ~np.isnan(rates).any(axis=0)]
        if not whole.shape[1]:
            return float("nan"), float("nan")
        ours = products[np.ix_(self._held_out, self._held_out)]
        brains = (whole - whole.mean(0)) @ (whole - whole.mean(0)).T
        return rsa(ours, brains), cka(ours, brains)
