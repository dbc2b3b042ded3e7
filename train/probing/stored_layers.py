"""The activations of a probe's layers, computed once and kept on disk, from where a killed probe resumes.

SCRATCH/<rank>_of_<ranks>/settings.json           what they depend on; if that changes, all is computed again
SCRATCH/<rank>_of_<ranks>/<split>/                activations of the rank's stimuli, until they are used up
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from data_prep.shards.image_identity import ImageIdentities
from train.data.loader import rank_positions
from train.data.stimuli import RecordingStimuli
from train.distributed.runtime import Runtime
from train.models.features import ImageFeatures
from train.models.population import mean_squares_of
from train.regression.activations import activation_batches
from train.regression.feature_slices import StoredActivations
from train.regression.feature_store import FeatureStore
from train.run.layer_names import modules_of
from train.run.recipe import ProbeRecipe


class StoredLayers:
    """The activations of all stimuli, each rank's share of them on its own disk.

    Attributes:
        folder: of this rank.

    Args:
        recipe: of the probe.
        splits: the stimuli by split; rows run through one split after the other.
        images: of all stimuli.
        extractor: from images to activations.
        scratch: folder for all ranks.
        runtime: this process.
        workers: decoding processes.
    """

    def __init__(
        self,
        recipe: ProbeRecipe,
        splits: Mapping[str, RecordingStimuli],
        images: ImageIdentities,
        extractor: ImageFeatures,
        scratch: Path,
        runtime: Runtime,
        workers: int,
    ):
        self._recipe, self._splits, self._images, self._extractor = recipe, splits, images, extractor
        self._runtime, self._workers, self._scratch = runtime, workers, scratch
        self.folder = self._folder_of(runtime.rank)

    @property
    def stimuli(self) -> int:
        """Number of stimuli of all splits."""
        return sum(len(stimuli) for stimuli in self._splits.values())

    def width(self, layer: str) -> int:
        """Number of features of a layer, over all its modules."""
        return sum(self.widths[module] for module in modules_of(layer))

    @cached_property
    def widths(self) -> dict[str, int]:
        """Number of features of each module."""
        with torch.no_grad():
            return {module: features.shape[1] for module, features in self._extractor(self._example).items()}

    @cached_property
    def map_sizes(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of positions of each module."""
        with torch.no_grad():
            return self._extractor.map_sizes(self._example)

    def mean_squares(self, layer: str) -> dict[str, float]:
        """The mean square that the features of each module of a layer are scaled to."""
        channels = {module: self.widths[module] // math.prod(self.map_sizes[module]) for module in modules_of(layer)}
        return mean_squares_of(channels, self._recipe.joined)

    def clear_if_settings_changed(self) -> None:
        """Start over if what is on disk was computed with other settings, or by another number of processes."""
        for folder in self._scratch.glob("*_of_*"):
            if not folder.name.endswith(f"_of_{self._runtime.ranks}"):
                shutil.rmtree(folder, ignore_errors=True)
        path, text = self.folder / "settings.json", json.dumps(self._settings(), sort_keys=True)
        if not path.is_file() or path.read_text() != text:
            # The folder above stays: another rank may be about to make its own folder in it.
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            path.write_text(text)

    def compute(self, modules: Sequence[str]) -> StoredActivations:
        """Compute what is missing of the activations of some modules; every rank must take part."""
        widths = {module: self.widths[module] for module in modules}
        own = [self._compute_split(name, stimuli, widths) for name, stimuli in self._splits.items()]
        stores: list[list[FeatureStore] | None] = [None] * self._runtime.ranks
        if self._all_are_readable():
            stores = [
                [FeatureStore(self._folder_of(rank) / name, widths) for name in self._splits]
                for rank in range(self._runtime.ranks)
            ]
        stores[self._runtime.rank] = own
        counts = [len(stimuli) for stimuli in self._splits.values()]
        return StoredActivations(stores, counts, self._runtime, self._recipe.memory, self._recipe.products)

    def clear(self) -> None:
        """Free the scratch space of this rank."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # other ranks may not have cleared theirs yet
            self._scratch.rmdir()

    @cached_property
    def _example(self) -> torch.Tensor:
        size = next(iter(self._splits.values())).size
        return torch.zeros(1, 3, size, size, dtype=torch.uint8, device=self._runtime.device)

    def _folder_of(self, rank: int) -> Path:
        return self._scratch / f"{rank}_of_{self._runtime.ranks}"

    def _settings(self) -> dict[str, Any]:
        """What activations and inner products depend on."""
        return {
            "backbone": self._recipe.backbone.model_dump(),
            "pool": self._recipe.pool,
            "seed": self._recipe.seed,
            "batch_size": self._recipe.batch_size,
            "products": self._recipe.products,
            "field": self._recipe.field,
            "joined": self._recipe.joined,
            "splits": {name: [stimuli.size, stimuli.fingerprint()] for name, stimuli in self._splits.items()},
            "images": hashlib.sha256(self._images.pixels.tobytes()).hexdigest(),
            "widths": self.widths,
            "population": self._extractor.population,
        }

    def _compute_split(self, name: str, stimuli: RecordingStimuli, widths: Mapping[str, int]) -> FeatureStore:
        store, batch_size = FeatureStore(self.folder / name, widths), self._recipe.batch_size
        if store.complete_rows() == len(rank_positions(len(stimuli), self._runtime.rank, self._runtime.ranks)):
            return store
        # Only whole batches are kept: the last digits of an activation may depend on the size of its batch.
        complete_batches = store.complete_rows() // batch_size
        store.truncate(complete_batches * batch_size)
        batches = activation_batches(
            self._extractor.only(list(widths)),
            stimuli,
            self._runtime,
            batch_size=batch_size,
            workers=self._workers,
            label=f"activations of {name}",
            skip=complete_batches,
        )
        for features in batches:
            store.append(features)
        return store

    def _all_are_readable(self) -> bool:
        """Whether every rank can read the files of all: they are on one machine and see the same folders."""
        facts = self._runtime.gather_objects(_identity(self.folder))
        on_one_host = len(set(self._runtime.hosts)) == 1
        readable = on_one_host and all(
            _identity(self._folder_of(rank)) == identity for rank, identity in enumerate(facts)
        )
        return all(self._runtime.gather_objects(readable))


def _identity(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from others of the machine; None if it is not there."""
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino
