"""What a probe's regressions read: the features of layers that have few, and inner products of those that have many.

SCRATCH/<rank>_of_<ranks>/<name>.products.npy     the rows of (stimuli, stimuli) that a rank keeps, until it is done

A layer with fewer features than half the stimuli is regressed on its features as they lie on disk. Otherwise inner
products of all stimuli are computed. Of few stimuli, a rank owns a whole matrix, and the ranks regress on different
matrices at the same time. Of many, each rank keeps some of the rows, and the ranks work on one matrix together.
"""

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from train.distributed.runtime import Runtime
from train.models.windows import WHOLE_MAP
from train.probing.layer_window import LayerWindow
from train.probing.stored_layers import StoredLayers
from train.regression.feature_rows import FeatureRows, mean_squares, window_scale
from train.regression.feature_slices import StoredActivations
from train.regression.inner_products import hand_out_rows, rows_of_all, rows_of_owner, write_inner_products
from train.regression.krylov import LEAST_STIMULI
from train.regression.row_writer import RowWriter
from train.regression.rows import RowFile
from train.regression.windowed_inner_products import windowed_inner_products
from train.run.layer_names import modules_of
from train.run.monitor import Monitor
from train.run.recipe import ProbeRecipe

FEW_FEATURES = 0.5  # of the stimuli; a covariance of more features takes longer than products of the stimuli
DISK_SHARE = 0.5  # of the free space that the matrices of a group may take

Kind = Literal["features", "shared products", "owned products"]


def kind_of(features: int, stimuli: int) -> Kind:
    """What is regressed on for a layer with so many features."""
    if features <= FEW_FEATURES * stimuli:
        return "features"
    return "shared products" if stimuli >= LEAST_STIMULI else "owned products"


@dataclass(frozen=True)
class Source:
    """What a regression on a layer through a window reads.

    Attributes:
        layer_window: which.
        features: number of the layer's features.
        rows: this rank's rows of the features or of the inner products; None if another rank has them all.
        owner: the rank that has all rows of inner products; None if the ranks share them.
        first: position of the first of this rank's rows of inner products.
    """

    layer_window: LayerWindow
    features: int
    rows: RowFile | FeatureRows | None
    owner: int | None = None
    first: int = 0


class ProductStore:
    """Features or inner products of all stimuli, a few layers or windows at a time.

    Args:
        recipe: of the probe.
        layers: the activations.
        runtime: this process.
        monitor: for the log.
    """

    def __init__(self, recipe: ProbeRecipe, layers: StoredLayers, runtime: Runtime, monitor: Monitor):
        self._recipe, self._layers, self._runtime, self._monitor = recipe, layers, runtime, monitor

    def groups(self, layer_windows: Sequence[LayerWindow]) -> Iterator[list[Source]]:
        """What to regress on, group after group; a group is dropped as the next is asked for.

        Args:
            layer_windows: that have not been regressed on yet, layer after layer.
        """
        groups = self._grouped(layer_windows)
        existing = self._owners_of_existing(layer_windows)
        if existing:
            self._monitor.log(f"{len(existing)} of {len(layer_windows)} matrices of inner products exist already")
        missing = {key.layer for key in layer_windows if key not in existing}
        modules = list(
            dict.fromkeys(
                module for group in groups for key in group for module in modules_of(key.layer) if key.layer in missing
            )
        )
        activations = None
        if modules:
            self._monitor.log(f"activations of {', '.join(modules)} ...")
            activations = self._layers.compute(modules)
        for group in groups:
            yield self._sources(group, existing, activations)
            self._runtime.barrier()
            for key in group:
                self._path(key).unlink(missing_ok=True)

    # ----------------------------------------------------------------------------------------- what is read, and when

    def _kind(self, layer: str) -> Kind:
        return kind_of(self._layers.width(layer), self._layers.stimuli)

    def _grouped(self, layer_windows: Sequence[LayerWindow]) -> list[list[LayerWindow]]:
        """Neighbours that are computed, regressed on and dropped together.

        All windows of a layer, as far as their matrices fit on disk; as many layers as there are ranks, if one owns
        each.
        """
        groups: list[list[LayerWindow]] = []
        free = min(self._runtime.gather_objects(shutil.disk_usage(self._layers.folder).free))
        for key in layer_windows:
            group = groups[-1] if groups else []
            same_layer = bool(group) and group[-1].layer == key.layer
            fits = len(group) < self._most_matrices(key, free) if same_layer else self._fits_beside(key, group)
            if group and fits:
                group.append(key)
            else:
                groups.append([key])
        return groups

    def _fits_beside(self, key: LayerWindow, group: Sequence[LayerWindow]) -> bool:
        """Whether a layer is read with others: each is read through one window, and each has an owner of its own."""
        alone = all(self._kind(other.layer) == "owned products" for other in [*group, key])
        different = len({other.layer for other in group}) == len(group)
        return self._recipe.field == "whole" and alone and different and len(group) < self._runtime.ranks

    def _most_matrices(self, key: LayerWindow, free: int) -> int:
        """How many windows of a layer are read at a time, with `free` bytes on each rank's disk."""
        if self._kind(key.layer) == "features":
            return sys.maxsize  # they take no space
        size = self._layers.stimuli**2 * self._dtype(key).itemsize
        return max(int(free * DISK_SHARE / size), 1)

    def _path(self, key: LayerWindow) -> Path:
        return self._layers.folder / f"{key.file_name}.products.npy"

    def _owners_of_existing(self, layer_windows: Sequence[LayerWindow]) -> dict[LayerWindow, int | None]:
        """The matrices that exist, and the rank that owns each; None if the ranks share it."""
        on_this_rank = [key for key in layer_windows if self._path(key).exists()]
        per_rank = self._runtime.gather_objects(on_this_rank)
        existing: dict[LayerWindow, int | None] = {}
        for key in layer_windows:
            holders = [rank for rank, found in enumerate(per_rank) if key in found]
            if self._kind(key.layer) == "owned products" and holders:
                existing[key] = holders[0]
            elif self._kind(key.layer) == "shared products" and len(holders) == self._runtime.ranks:
                existing[key] = None
        return existing

    def _sources(
        self,
        group: Sequence[LayerWindow],
        existing: dict[LayerWindow, int | None],
        activations: StoredActivations | None,
    ) -> list[Source]:
        ranks, sources = self._runtime.ranks, []
        owners: dict[LayerWindow, int | None] = {}
        for number, key in enumerate(group):
            kind = self._kind(key.layer)
            owners[key] = existing.get(key, number % ranks if kind == "owned products" else None)
        for layer in dict.fromkeys(key.layer for key in group):
            of_layer = [key for key in group if key.layer == layer]
            features = self._kind(layer) == "features"
            work = "regressed on as they are" if features else "inner products ..."
            self._monitor.log(f"{layer}: {self._layers.width(layer):,} features, {work}")
            if features:
                assert activations is not None
                sources += self._feature_sources(of_layer, activations)
                continue
            missing = {key: owners[key] for key in of_layer if key not in existing}
            if missing:
                assert activations is not None
                self._compute(missing, activations)
            sources += [self._product_source(key, owners[key]) for key in of_layer]
        return sources

    # ---------------------------------------------------------------------------------------------------- features

    def _feature_sources(self, keys: Sequence[LayerWindow], activations: StoredActivations) -> list[Source]:
        squares = self._layers.mean_squares(keys[0].layer)
        modules = list(squares)
        rows = FeatureRows(activations, modules)
        variance = np.ones(rows.shape[1])
        if len(modules) > 1:
            variance = mean_squares(rows, self._runtime, activations.stimuli, activations.memory_bytes)
        widths = {module: activations.width(module) for module in modules}
        sources = []
        for key in keys:
            of_window = rows
            if key.window != WHOLE_MAP or len(modules) > 1:
                of_window = rows.scaled(window_scale(key.window, self._layers.map_sizes, widths, variance, squares))
            sources.append(Source(key, rows.shape[1], of_window))
        return sources

    # ---------------------------------------------------------------------------------------------- inner products

    def _product_source(self, key: LayerWindow, owner: int | None) -> Source:
        has_rows = owner in (None, self._runtime.rank)
        rows = RowFile(self._path(key)) if has_rows else None
        return Source(key, self._layers.width(key.layer), rows, owner, self._bounds(owner)[self._runtime.rank])

    def _bounds(self, owner: int | None) -> list[int]:
        """Where the rows of each rank begin and the last ones end."""
        stimuli, ranks = self._layers.stimuli, self._runtime.ranks
        return rows_of_all(stimuli, ranks) if owner is None else rows_of_owner(stimuli, owner, ranks)

    def _dtype(self, key: LayerWindow) -> np.dtype:
        """float32 for many or large matrices; most products are rounded to float32 anyway."""
        small = key.window == WHOLE_MAP and self._kind(key.layer) == "owned products"
        return np.dtype(np.float64 if small or self._recipe.products == "float64" else np.float32)

    def _compute(self, missing: dict[LayerWindow, int | None], activations: StoredActivations) -> None:
        """Compute and write matrices of one layer."""
        rank, stimuli, keys = self._runtime.rank, self._layers.stimuli, list(missing)
        bounds = {key: self._bounds(owner) for key, owner in missing.items()}
        modules = self._layers.mean_squares(keys[0].layer)
        with ExitStack() as stack:
            writers: dict[LayerWindow, RowWriter | None] = {}
            for key in keys:
                rows = bounds[key][rank + 1] - bounds[key][rank]
                writer = RowWriter(self._path(key), (rows, stimuli), self._dtype(key)) if rows else None
                writers[key] = writer if writer is None else stack.enter_context(writer)
            if self._recipe.field == "whole":
                write_inner_products(activations, modules, bounds[keys[0]], writers[keys[0]])
                return
            windows, first = [key.window for key in keys], 0
            for stripe in windowed_inner_products(windows, modules, self._layers.map_sizes, activations):
                for key, rows_of_window in zip(keys, stripe, strict=True):
                    hand_out_rows(rows_of_window, first, bounds[key], self._runtime, writers[key])
                first += stripe.shape[1]
