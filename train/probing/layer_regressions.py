"""Regresses the responses on each layer of a network, and compares layers with the brain.

A layer may consist of several modules whose features are read together, and may be read through several windows over
its map (`train/models/windows.py`); each window has a regression of its own, and these are stacked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from train.distributed.runtime import Runtime
from train.evaluation.metrics import mean_score
from train.models.windows import WHOLE_MAP, Window, probe_windows
from train.probing.dual_form import DualForm, DualTerm
from train.probing.layer_results import LayerResult, ResultFiles, Similarity
from train.probing.layer_window import LayerWindow
from train.probing.product_store import ProductStore, Source
from train.probing.source_reading import OpenSource, SourceReading
from train.regression.gram import Predictors
from train.regression.methods import Method, folded_r2, r2_per_site, regress
from train.regression.response_curve import crossed_curves, learn_curves
from train.regression.ridge import RidgeFit
from train.regression.stacking import Combination, LeftOutErrors, SiteTargets, stack
from train.run.monitor import Monitor
from train.run.recipe import ProbeRecipe

STACK_COPIES = 4  # of the predictions of all windows, in float64, that stacking takes


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


class LayerRegressions:
    """The regressions of a probe, by all ranks.

    Args:
        recipe: of the probe.
        layers: names, in order.
        partitions: of the stimuli.
        rates: responses to all stimuli, float32 (stimuli, sites).
        products: what the regressions read.
        files: for the results, of the leading rank.
        runtime: this process.
        monitor: for the log.
    """

    def __init__(
        self,
        recipe: ProbeRecipe,
        layers: list[str],
        partitions: Sequence[Partition],
        rates: np.ndarray,
        products: ProductStore,
        files: ResultFiles,
        runtime: Runtime,
        monitor: Monitor,
    ):
        self._recipe, self._layers, self._partitions, self._rates = recipe, layers, partitions, rates
        self._products, self._files, self._runtime, self._monitor = products, files, runtime, monitor
        held_out = np.concatenate([partition.held_out for partition in partitions])
        self._scored = np.sort(held_out)
        self._reading = SourceReading(recipe, rates, held_out, runtime)
        self._windows = probe_windows() if recipe.field == "gaussian" else [WHOLE_MAP]
        self._dual_forms: dict[str, list[DualForm]] = {}

    def run(self) -> dict[str, LayerResult]:
        """The results of all layers, on the leading rank; every rank must take part."""
        keys = [LayerWindow(layer, window) for layer in self._layers for window in self._windows]
        done = self._runtime.gather_objects(self._files.existing(keys) if self._runtime.is_main else [])[0]
        for group in self._products.groups([key for key in keys if key not in done]):
            layers = dict.fromkeys(source.layer_window.layer for source in group)
            self._monitor.log(f"{', '.join(layers)}: regression ...")
            shared = [source for source in group if source.owner is None]
            owned = [source for source in group if source.owner is not None]
            for source in shared:
                result = self._regress(source)
                if self._runtime.is_main:
                    self._files.save(source.layer_window, result)
            for start in range(0, len(owned), self._runtime.ranks):
                self._regress_owned(owned[start : start + self._runtime.ranks])
        if not self._runtime.is_main:
            return {}
        results = {layer: self._stacked(layer) for layer in self._layers}
        if self._recipe.response == "curved":
            for layer, result in results.items():
                self._bend(layer, result)
        return results

    def _regress_owned(self, sources: Sequence[Source]) -> None:
        """Regress on the matrices that this rank owns; the leading rank keeps the results of all."""
        results = {
            source.layer_window: self._regress(source) for source in sources if source.owner == self._runtime.rank
        }
        for results_of_rank in self._runtime.gather_objects(results):
            for key, result in results_of_rank.items():
                if self._runtime.is_main:
                    self._files.save(key, result)

    def _regress(self, source: Source) -> LayerResult:
        """Regress on a layer through one window, in all partitions."""
        recipe = self._recipe
        count = recipe.latent if recipe.readout == "pls" else recipe.components
        method = Method(recipe.readout, count, recipe.sites_learn == "together")
        opened = self._reading.open(source)
        whole = source.layer_window.window == WHOLE_MAP
        result = LayerResult(
            features=source.features,
            prediction=np.full((len(self._scored), self._rates.shape[1]), np.nan, np.float32),
            similarity=opened.similarity() if whole else Similarity(),
        )
        keeps_left_out = len(self._partitions) == 1 or recipe.field != "whole" or recipe.response != "linear"
        for partition in self._partitions:
            rates = self._rates[partition.fit]
            fit = regress(opened.predictors(partition.fit, partition.held_out, partition.copies), rates, method)
            result.prediction[np.searchsorted(self._scored, partition.held_out)] = fit.prediction
            result.dual.append(np.ascontiguousarray(fit.dual.T))
            result.mean.append(fit.mean)
            if isinstance(fit, RidgeFit):
                inner_r2 = fit.inner_r2
                if recipe.field == "whole":
                    result.penalty.append(fit.penalty)
                if keeps_left_out:
                    result.left_out.append(np.ascontiguousarray(fit.left_out.T))
            else:
                of_folds = partial(_fold_predictors, opened, partition.fit)
                inner_r2 = folded_r2(of_folds, rates, method, partition.inner_folds)
            result.inner_r2.append(mean_score(inner_r2))
            known = [result.components] if result.components else []
            result.components = max([*known, *fit.spectra], key=lambda facts: facts.error, default=None)
        return result

    def _stacked(self, layer: str) -> LayerResult:
        """Combine the windows of a layer: each site's weights are learned on the stimuli left out."""
        by_window = {window: self._files.load(LayerWindow(layer, window)) for window in self._windows}
        whole = by_window[WHOLE_MAP]
        if len(by_window) == 1:
            key = LayerWindow(layer, WHOLE_MAP)
            self._dual_forms[layer] = [
                DualForm(mean, [DualTerm(key, dual, np.ones_like(mean))])
                for dual, mean in zip(whole.dual, whole.mean, strict=True)
            ]
            return whole
        stacked = LayerResult(
            whole.features, np.full_like(whole.prediction, np.nan), whole.similarity, components=whole.components
        )
        for index, partition in enumerate(self._partitions):
            combination = self._stack_partition(stacked, by_window, index, partition)
            self._dual_forms.setdefault(layer, []).append(_dual_form(layer, by_window, combination, index))
        return stacked

    def dual_form(self, layer: str, partition: int) -> DualForm:
        """How a layer predicts other stimuli by the fit of a partition; on the leading rank, after `run`."""
        return self._dual_forms[layer][partition]

    def _stack_partition(
        self, stacked: LayerResult, by_window: Mapping[Window, LayerResult], index: int, partition: Partition
    ) -> Combination:
        rates, rows = self._rates[partition.fit], np.searchsorted(self._scored, partition.held_out)
        centres = np.array([(window.x, window.y) for window in by_window]).T
        is_bounded = np.array([window != WHOLE_MAP for window in by_window])
        bytes_of_site = STACK_COPIES * 8 * len(by_window) * (len(rates) + len(rows))
        sites = max(int(self._recipe.memory * 2**30 / bytes_of_site), 1)
        parts = [slice(start, start + sites) for start in range(0, rates.shape[1], sites)]
        left_out, centre = np.empty(rates.shape, np.float32), np.empty((2, rates.shape[1]))
        combination = Combination(np.empty((len(by_window), rates.shape[1])), np.empty(rates.shape[1]))

        def of_windows(part: slice) -> list[np.ndarray]:
            return [np.ascontiguousarray(result.left_out[index][part].T) for result in by_window.values()]

        targets = None
        if self._recipe.sites_learn == "together":
            errors = [LeftOutErrors.of(of_windows(part), rates[:, part], partition.copies) for part in parts]
            targets = SiteTargets.learned(LeftOutErrors.side_by_side(errors))
        for part in parts:
            combined = stack(
                of_windows(part),
                rates[:, part],
                [result.prediction[rows, part] for result in by_window.values()],
                partition.copies,
                None if targets is None else targets.of_sites(part),
            )
            stacked.prediction[rows, part] = combined.prediction
            left_out[:, part] = combined.left_out
            combination.weights[:, part], combination.mean[part] = combined.weights, combined.mean
            weights = combined.weights * is_bounded[:, None]
            with np.errstate(invalid="ignore"):
                centre[:, part] = centres @ weights / weights.sum(axis=0)
        stacked.left_out.append(left_out.T)
        stacked.inner_r2.append(mean_score(r2_per_site(left_out, rates)))
        stacked.window_centre.append(centre)
        return combination

    def _bend(self, layer: str, result: LayerResult) -> None:
        """Pass the predictions of a layer through a curve of each site."""
        for index, partition in enumerate(self._partitions):
            rates, rows = self._rates[partition.fit], np.searchsorted(self._scored, partition.held_out)
            left_out = np.ascontiguousarray(result.left_out[index][:].T)
            curves = learn_curves(left_out, rates)
            result.prediction[rows] = curves.apply(result.prediction[rows])
            form = self._dual_forms[layer][index]
            self._dual_forms[layer][index] = replace(form, curve=curves.rows)
            curved = crossed_curves(left_out, rates, partition.copies)
            result.left_out[index] = curved.T
            result.inner_r2[index] = mean_score(r2_per_site(curved, rates))


def _fold_predictors(opened: OpenSource, stimuli: np.ndarray, fit: np.ndarray, held_out: np.ndarray) -> Predictors:
    """The predictors of a fold, from positions among some of the stimuli."""
    return opened.predictors(stimuli[fit], stimuli[held_out], None)


def _dual_form(
    layer: str, by_window: Mapping[Window, LayerResult], combination: Combination, partition: int
) -> DualForm:
    """The windows' regressions of a partition, weighted per site."""
    terms, intercept = [], combination.mean * (1 - combination.weights.sum(axis=0))
    for (window, result), weights in zip(by_window.items(), combination.weights, strict=True):
        terms.append(DualTerm(LayerWindow(layer, window), result.dual[partition], weights))
        intercept += weights * result.mean[partition]
    return DualForm(intercept, terms)
