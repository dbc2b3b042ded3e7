"""What a probe does: activations to disk, inner products layer by layer, regressions, likeness of layer and brain.

A layer may be several modules whose features are read together, and be looked at through several windows
(`train/models/fields.py`); each of these views has inner products and a regression of its own.
"""

import contextlib
import hashlib
import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train.data.loader import Stimuli
from train.metrics.exact import mean_score
from train.metrics.similarity import cka, rsa
from train.models.fields import WHOLE, Window, windows
from train.models.joined_layers import parts_of
from train.models.stacking import stack
from train.parallel.runtime import Runtime
from train.probing.feature_store import FeatureStore
from train.probing.features import LayerFeatures, PixelFeatures, activations
from train.probing.gram import ROUNDING, inner_products
from train.probing.kernel_regression import Method, centred, folded_r2, regress, squared_error_r2
from train.run.monitor import Monitor
from train.run.recipe import ProbeRecipe

LONGEST_NAME = 120  # letters of a layer in the name of a file


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
        features: of a picture.
        prediction: float32 (stimuli, sites); NaN for stimuli that no partition held out.
        inner_r2: of each partition: mean over sites, on stimuli left out of the fit.
        rsa, cka: likeness to the responses, over the stimuli that were held out and the sites recorded for all of them.
        penalty: of each partition, float64 (sites,); empty but for ridge on the whole map.
        left_out: of each partition, float32 (stimuli to fit, sites), predictions from the others; empty but for ridge.
        centre: of each partition, float64 (2, sites): where the windows lie that a site reads from, right and down from
            the picture's middle, in half sides; NaN for a site that reads from the whole map. Empty without windows.
    """

    features: int
    prediction: np.ndarray
    inner_r2: list[float]
    rsa: float
    cka: float
    penalty: list[np.ndarray] = field(default_factory=list)
    left_out: list[np.ndarray] = field(default_factory=list)
    centre: list[np.ndarray] = field(default_factory=list)


@dataclass(frozen=True)
class _View:
    """A layer through a window: what one matrix of inner products is of."""

    layer: str
    window: Window

    @property
    def name(self) -> str:
        """Of its file."""
        shape = "" if self.window == WHOLE else "@{x:+.2f}{y:+.2f}~{width:.2f}".format(**asdict(self.window))
        layer = self.layer  # of many modules its name is longer than file systems allow
        return (layer if len(layer) <= LONGEST_NAME else hashlib.sha256(layer.encode()).hexdigest()) + shape


class Probing:
    """A probe under way; what it has done already is found again after a kill.

    Args:
        recipe: its settings.
        splits: the stimuli by split; positions count through all of them.
        layers: names, in order.
        look: from pictures to the activations of these layers.
        partitions: what is fitted, and what it is tried on.
        scratch: folder for activations and inner products.
        runtime: this process.
        workers: decoding processes.
        monitor: log.
    """

    def __init__(
        self,
        recipe: ProbeRecipe,
        splits: Mapping[str, Stimuli],
        layers: list[str],
        look: LayerFeatures | PixelFeatures,
        partitions: Sequence[Partition],
        scratch: Path,
        runtime: Runtime,
        workers: int,
        monitor: Monitor,
    ):
        self._recipe, self._splits, self._layers, self._look = recipe, splits, layers, look
        self._partitions, self._runtime, self._workers, self._monitor = partitions, runtime, workers, monitor
        self._scratch = scratch / f"{runtime.rank}_of_{runtime.ranks}"
        rates = [stimuli.rates for stimuli in splits.values()]
        self._rates = np.concatenate(rates)
        self._held_out = np.concatenate([partition.held_out for partition in partitions])

    def run(self) -> dict[str, Layer]:
        """All layers, on every rank."""
        size = next(iter(self._splits.values())).size
        picture = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=self._runtime.device)
        with torch.no_grad():
            widths = {part: found.shape[1] for part, found in self._look(picture).items()}
            maps = self._look.map_sizes(picture)
        self._begin_anew_unless(self._described(widths))
        tried = windows() if self._recipe.field == "gaussian" else [WHOLE]
        views = [_View(layer, window) for layer in self._layers for window in tried]
        owners = self._products(views, widths, maps)
        solved = {view: self._solve(view, widths) for view in views if owners[view] == self._runtime.rank}
        everyones = {view: found for part in self._runtime.gather_objects(solved) for view, found in part.items()}
        return {
            layer: self._joined({view.window: everyones[view] for view in of_layer})
            for layer, of_layer in itertools.groupby(views, lambda view: view.layer)
        }

    def clear(self) -> None:
        """Free the scratch space."""
        shutil.rmtree(self._scratch, ignore_errors=True)
        with contextlib.suppress(OSError):  # other ranks may not have cleared theirs
            self._scratch.parent.rmdir()

    # --- what is there already

    def _described(self, widths: Mapping[str, int]) -> dict[str, Any]:
        """What activations and inner products depend on."""
        return {
            "backbone": self._recipe.backbone.model_dump(),
            "pool": self._recipe.pool,
            "seed": self._recipe.seed,
            "batch_size": self._recipe.batch_size,
            "products": self._recipe.products,
            "field": self._recipe.field,
            "splits": {name: [stimuli.size, stimuli.fingerprint()] for name, stimuli in self._splits.items()},
            "widths": dict(widths),
        }

    def _begin_anew_unless(self, described: Mapping[str, Any]) -> None:
        note, text = self._scratch / "of.json", json.dumps(described, sort_keys=True)
        if not note.is_file() or note.read_text() != text:
            self.clear()
            self._scratch.mkdir(parents=True)
            note.write_text(text)

    def _path(self, view: _View) -> Path:
        return self._scratch / f"{view.name}.products.npy"

    def _found(self, views: Sequence[_View]) -> dict[_View, int]:
        """The views whose products are there, and the rank that has them."""
        own = [view for view in views if self._path(view).exists()]
        lists = self._runtime.gather_objects(own)
        return {view: rank for rank, found in enumerate(lists) for view in found}

    # --- the work

    def _products(
        self, views: Sequence[_View], widths: Mapping[str, int], maps: Mapping[str, tuple[int, int]]
    ) -> dict[_View, int]:
        """Inner products of every view on disk; returns the rank that has them."""
        owners = self._found(views)
        missing = [view for view in views if view not in owners]
        if owners:
            self._monitor.say(f"{len(owners)} of {len(views)} layers and windows are there already")
        last_view = {part: view for view in missing for part in parts_of(view.layer)}
        stores = [
            self._store(name, stimuli, {part: widths[part] for part in last_view})
            for name, stimuli in self._splits.items()
            if missing
        ]
        for number, view in enumerate(missing):
            owner = number % self._runtime.ranks
            products = self._products_of(view, stores, maps, owner)
            if products is not None:
                temporary = self._path(view).with_suffix(".tmp")
                with temporary.open("wb") as file:
                    np.save(file, products)
                temporary.replace(self._path(view))
            self._runtime.barrier()
            for part in parts_of(view.layer):
                if last_view[part] == view:
                    for store in stores:
                        store.discard(part)
            owners[view] = owner
            if view.window == WHOLE:
                self._monitor.say(f"{view.layer}: {sum(widths[part] for part in parts_of(view.layer)):,} features")
        return owners

    def _products_of(
        self, view: _View, stores: Sequence[FeatureStore], maps: Mapping[str, tuple[int, int]], owner: int
    ) -> np.ndarray | None:
        """Inner products of a view as they are kept, (stimuli, stimuli); None on other ranks than `owner`.

        Where several modules are read together, each is brought to the same mean square, or the loudest would be read
        alone.
        """
        parts, found = parts_of(view.layer), []
        for part in parts:
            weights, factors = view.window.weights(*maps[part]), None
            if view.window != WHOLE:
                factors = np.tile(np.sqrt(weights), stores[0].width(part) // len(weights))
            products = inner_products(
                stores,
                part,
                [len(stimuli) for stimuli in self._splits.values()],
                self._runtime,
                memory=self._recipe.memory,
                precision=self._recipe.products,
                owner=owner,
                factors=factors,
            )
            if products is not None:
                size = np.trace(products) / len(products) if len(parts) > 1 else 1.0
                found.append(products / (size or 1.0))
        if not found:
            return None
        # There are many windows, and most products are rounded to float32 already.
        halved = view.window != WHOLE and self._recipe.products != "float64"
        return sum(found).astype(np.float32 if halved else np.float64)

    def _store(self, name: str, stimuli: Stimuli, widths: Mapping[str, int]) -> FeatureStore:
        """The activations of this rank's stimuli of a split."""
        store, size = FeatureStore(self._scratch / name, widths), self._recipe.batch_size
        there = store.rows() // size  # whole batches: predictions may depend on a batch's shape in the last digit
        store.keep(there * size)
        look = self._look.of(list(widths))
        for found in activations(
            look,
            stimuli,
            self._runtime,
            batch_size=size,
            workers=self._workers,
            label=f"activations of {name}",
            skip=there,
        ):
            store.append(found)
        return store

    def _solve(self, view: _View, widths: Mapping[str, int]) -> Layer:
        """All partitions of a layer, through one window."""
        products = np.load(self._path(view), allow_pickle=False).astype(np.float64)
        recipe = self._recipe
        method = Method(recipe.readout, recipe.latent if recipe.readout == "pls" else recipe.components)
        prediction = np.full(self._rates.shape, np.nan, np.float32)
        likeness = self._likeness(products) if view.window == WHOLE else (float("nan"), float("nan"))
        layer = Layer(sum(widths[part] for part in parts_of(view.layer)), prediction, [], *likeness)
        rounding = ROUNDING[recipe.products]
        for partition in self._partitions:
            rates = self._rates[partition.fit]
            found = regress(centred(products, partition.fit, partition.held_out, rounding), rates, method)
            prediction[partition.held_out] = found.prediction
            if found.inner_r2 is not None:
                layer.inner_r2.append(mean_score(found.inner_r2))
                layer.penalty.append(found.penalty)
                layer.left_out.append(found.left_out)
            else:
                folded = folded_r2(products, partition.fit, rates, method, partition.inner_folds, rounding)
                layer.inner_r2.append(mean_score(folded))
        return layer

    def _joined(self, found: Mapping[Window, Layer]) -> Layer:
        """A layer through all windows that were tried: each site's weights are learned on the stimuli left out."""
        whole = found[WHOLE]
        if len(found) == 1:
            return whole
        joined = Layer(whole.features, np.full_like(whole.prediction, np.nan), [], whole.rsa, whole.cka)
        places = np.array([(window.x, window.y) for window in found]).T
        bounded = np.array([window != WHOLE for window in found])
        for index, partition in enumerate(self._partitions):
            rates, held_out = self._rates[partition.fit], partition.held_out
            left_out = [layer.left_out[index] for layer in found.values()]
            stacked = stack(left_out, rates, [layer.prediction[held_out] for layer in found.values()])
            joined.prediction[held_out] = stacked.prediction
            joined.left_out.append(stacked.left_out)
            joined.inner_r2.append(mean_score(squared_error_r2(stacked.left_out, rates)))
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
