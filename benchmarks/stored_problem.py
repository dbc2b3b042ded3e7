"""The features of benchmarks/probe.py as a probe's activations."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from train.data.order import share
from train.distributed.runtime import Runtime
from train.probing.stored_layers import StoredLayers
from train.regression.feature_slices import StoredActivations
from train.regression.feature_store import FeatureStore
from train.run.recipe import ProbeRecipe

SPLITS = ("fit", "held_out")


class StoredProblem(StoredLayers):
    """The features as a probe has them on disk, each process's share in a folder of its own; no network computes them.

    Args:
        problem: folder of the features.
        counts: stimuli to fit and held out.
        layers: names; all have the same features.
        recipe: of the probe.
        runtime: this process.
    """

    def __init__(
        self, problem: Path, counts: tuple[int, int], layers: Sequence[str], recipe: ProbeRecipe, runtime: Runtime
    ):
        # Not the base class's, which wants images and a network.
        self._recipe, self._runtime, self._scratch = recipe, runtime, problem / f"stores_{runtime.ranks}"
        self._counts, self._names, self._source = counts, list(layers), problem / "features.f32"
        width = self._source.stat().st_size // (4 * sum(counts))
        self.widths = dict.fromkeys(layers, width)
        self.map_sizes = dict.fromkeys(layers, (1, 1))
        self.folder = self._folder_of(runtime.rank)
        self.folder.mkdir(parents=True)

    @property
    def stimuli(self) -> int:
        """Number of stimuli to fit and held out."""
        return sum(self._counts)

    def store(self) -> None:
        """Copy this process's share from the file of all."""
        first_layer, *others = self._names
        width, first = self.widths[first_layer], 0
        for stores, count in zip(self._stores(self._runtime.rank), self._counts, strict=True):
            stores.truncate(0)
            for position in share(np.arange(first, first + count), self._runtime.rank, self._runtime.ranks):
                # Not through a map: its pages would count as this process's memory.
                row = np.fromfile(self._source, np.float32, width, offset=int(position) * width * 4)
                stores.append({first_layer: torch.from_numpy(row[None])})
            first += count
        for split in SPLITS:
            for other in others:
                (self.folder / split / f"{other}.f32").unlink(missing_ok=True)
                os.link(self.folder / split / f"{first_layer}.f32", self.folder / split / f"{other}.f32")

    def compute(self, modules: Sequence[str]) -> StoredActivations:
        """The activations, which are stored already."""
        self._runtime.barrier()
        stores = [self._stores(rank) for rank in range(self._runtime.ranks)]
        return StoredActivations(stores, self._counts, self._runtime, self._recipe.memory, self._recipe.products)

    def _stores(self, rank: int) -> list[FeatureStore]:
        return [FeatureStore(self._folder_of(rank) / split, self.widths) for split in SPLITS]
