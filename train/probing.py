"""What a probe does: activations to disk, inner products layer by layer, regressions, likeness of layer and brain."""

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train.feature_store import FeatureStore
from train.features import LayerFeatures, PixelFeatures, activations
from train.gram import ROUNDING, inner_products
from train.kernel_regression import Method, centred, folded_r2, regress
from train.loader import Stimuli
from train.metrics import mean_score
from train.monitor import Monitor
from train.recipe import ProbeRecipe
from train.runtime import Runtime
from train.similarity import cka, rsa


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
        penalty: of each partition, float64 (sites,); empty but for ridge.
        rsa, cka: likeness to the responses, over the stimuli that were held out and the sites recorded for all of them.
    """

    features: int
    prediction: np.ndarray
    inner_r2: list[float]
    penalty: list[np.ndarray]
    rsa: float
    cka: float


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
            widths = {layer: found.shape[1] for layer, found in self._look(picture).items()}
        self._begin_anew_unless(self._described(widths))
        owners = self._products(widths)
        solved = {
            layer: self._solve(layer, widths[layer]) for layer, owner in owners.items() if owner == self._runtime.rank
        }
        everyones = {layer: found for part in self._runtime.gather_objects(solved) for layer, found in part.items()}
        return {layer: everyones[layer] for layer in self._layers}

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
            "splits": {name: [stimuli.size, stimuli.fingerprint()] for name, stimuli in self._splits.items()},
            "widths": dict(widths),
        }

    def _begin_anew_unless(self, described: Mapping[str, Any]) -> None:
        note, text = self._scratch / "of.json", json.dumps(described, sort_keys=True)
        if not note.is_file() or note.read_text() != text:
            self.clear()
            self._scratch.mkdir(parents=True)
            note.write_text(text)

    def _path(self, layer: str) -> Path:
        return self._scratch / f"{layer}.products.npy"

    def _found(self) -> dict[str, int]:
        """The layers whose products are there, and the rank that has them."""
        own = [layer for layer in self._layers if self._path(layer).exists()]
        lists = self._runtime.gather_objects(own)
        return {layer: rank for rank, layers in enumerate(lists) for layer in layers}

    # --- the work

    def _products(self, widths: Mapping[str, int]) -> dict[str, int]:
        """Inner products of every layer on disk; returns the rank that has them."""
        owners = self._found()
        missing = [layer for layer in self._layers if layer not in owners]
        if owners:
            self._monitor.say(f"{len(owners)} of {len(self._layers)} layers are there already")
        stores = [
            self._store(name, stimuli, {layer: widths[layer] for layer in missing})
            for name, stimuli in self._splits.items()
            if missing
        ]
        for number, layer in enumerate(missing):
            owner = number % self._runtime.ranks
            products = inner_products(
                stores,
                layer,
                [len(stimuli) for stimuli in self._splits.values()],
                self._runtime,
                memory=self._recipe.memory,
                precision=self._recipe.products,
                owner=owner,
            )
            if products is not None:
                temporary = self._path(layer).with_suffix(".tmp")
                with temporary.open("wb") as file:
                    np.save(file, products)
                temporary.replace(self._path(layer))
            self._runtime.barrier()
            for store in stores:
                store.discard(layer)
            owners[layer] = owner
            self._monitor.say(f"{layer}: {widths[layer]:,} features")
        return owners

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

    def _solve(self, layer: str, features: int) -> Layer:
        """All partitions of a layer."""
        products = np.load(self._path(layer), allow_pickle=False)
        recipe = self._recipe
        method = Method(recipe.readout, recipe.latent if recipe.readout == "pls" else recipe.components)
        prediction = np.full(self._rates.shape, np.nan, np.float32)
        inner_r2, penalty, rounding = [], [], ROUNDING[recipe.products]
        for partition in self._partitions:
            rates = self._rates[partition.fit]
            found = regress(centred(products, partition.fit, partition.held_out, rounding), rates, method)
            prediction[partition.held_out] = found.prediction
            if found.inner_r2 is not None:
                inner_r2.append(mean_score(found.inner_r2))
                penalty.append(found.penalty)
            else:
                folded = folded_r2(products, partition.fit, rates, method, partition.inner_folds, rounding)
                inner_r2.append(mean_score(folded))
        return Layer(features, prediction, inner_r2, penalty, *self._likeness(products))

    def _likeness(self, products: np.ndarray) -> tuple[float, float]:
        """RSA and CKA with the sites that were recorded for all held-out stimuli."""
        rates = self._rates[self._held_out].astype(np.float64)
        whole = rates[:, ~np.isnan(rates).any(axis=0)]
        if not whole.shape[1]:
            return float("nan"), float("nan")
        ours = products[np.ix_(self._held_out, self._held_out)]
        brains = (whole - whole.mean(0)) @ (whole - whole.mean(0)).T
        return rsa(ours, brains), cka(ours, brains)
