"""The inner products of a probe's layers, computed once and kept on disk, from where a killed probe resumes.

SCRATCH/<rank>_of_<ranks>/settings.json           what they depend on; if that changes, all are computed again
SCRATCH/<rank>_of_<ranks>/<split>/                activations of the rank's stimuli, until they are used up
SCRATCH/<rank>_of_<ranks>/<name>.products.npy     (stimuli, stimuli), on the rank that owns the matrix
"""

import contextlib
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import BufferedWriter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.common.safe_reading import map_npy
from data_prep.shards.image_identity import ImageIdentities
from train.data.stimuli import RecordingStimuli
from train.distributed.runtime import Runtime
from train.models.features import ImageFeatures
from train.models.joined_layers import modules_of
from train.models.windows import WHOLE_MAP, Window
from train.regression.activations import activation_batches
from train.regression.feature_slices import StoredActivations
from train.regression.feature_store import FeatureStore
from train.regression.inner_products import inner_products
from train.regression.windowed_inner_products import windowed_inner_products
from train.run.monitor import Monitor
from train.run.recipe import ProbeRecipe

LONGEST_NAME = 120  # characters of a layer's name in a file name


@dataclass(frozen=True)
class LayerWindow:
    """A layer through a window over its map, which has a matrix of inner products of its own.

    Attributes:
        layer: one module, or several joined by `+`.
        window: over the map.
    """

    layer: str
    window: Window

    @property
    def file_name(self) -> str:
        """Of the matrix; a hash replaces a layer's name that is too long for file systems."""
        layer, window = self.layer, self.window
        if len(layer) > LONGEST_NAME:
            layer = hashlib.sha256(layer.encode()).hexdigest()
        if window.width is not None:
            layer += f"@{window.x:+.2f}{window.y:+.2f}~{window.width:.2f}"
        return f"{layer}.products.npy"


class ProductStore:
    """The inner products of all stimuli, each matrix on the disk of one rank.

    Args:
        recipe: of the probe.
        splits: the stimuli by split; rows and columns run through one split after the other.
        images: of all stimuli.
        extractor: from images to activations.
        scratch: folder for activations and inner products.
        runtime: this process.
        workers: decoding processes.
        monitor: for the log.
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
        monitor: Monitor,
    ):
        self._recipe, self._splits, self._images, self._extractor = recipe, splits, images, extractor
        self._runtime, self._workers, self._monitor = runtime, workers, monitor
        self._scratch = scratch / f"{runtime.rank}_of_{runtime.ranks}"

    def compute_missing(self, layer_windows: Sequence[LayerWindow]) -> dict[LayerWindow, int]:
        """Compute the matrices that do not exist yet.

        Args:
            layer_windows: layer after layer, all windows of each.

        Returns:
            The rank that owns each matrix.
        """
        self._clear_if_settings_changed()
        existing = self._owners_of_existing(layer_windows)
        if existing:
            self._monitor.log(f"{len(existing)} of {len(layer_windows)} matrices of inner products exist already")
        owners = {key: existing.get(key, number % self._runtime.ranks) for number, key in enumerate(layer_windows)}
        missing: dict[str, list[LayerWindow]] = {}
        for layer, group in itertools.groupby(layer_windows, lambda key: key.layer):
            of_layer = list(group)
            if not all(key in existing for key in of_layer):
                missing[layer] = of_layer
        last_use = {module: layer for layer in missing for module in modules_of(layer)}
        stores = self._extract(list(last_use)) if last_use else []
        for layer, of_layer in missing.items():
            self._compute(of_layer, owners, stores)
            for module in modules_of(layer):
                if last_use[module] == layer:
                    for store in stores:
                        store.delete(module)
            self._monitor.log(f"{layer}: {self.width(layer):,} features")
        return owners

    def load(self, layer_window: LayerWindow) -> np.ndarray:
        """A matrix, float64 (stimuli, stimuli), on the rank that owns it."""
        return map_npy(self._path(layer_window)).astype(np.float64, copy=False)

    def width(self, layer: str) -> int:
        """Number of features of a layer, over all its modules."""
        return sum(self._widths[module] for module in modules_of(layer))

    def clear(self) -> None:
        """Free the scratch space of this rank."""
        shutil.rmtree(self._scratch, ignore_errors=True)
        with contextlib.suppress(OSError):  # other ranks may not have cleared theirs yet
            self._scratch.parent.rmdir()

    # --------------------------------------------------------------------------------------------- what already exists

    @cached_property
    def _example(self) -> torch.Tensor:
        size = next(iter(self._splits.values())).size
        return torch.zeros(1, 3, size, size, dtype=torch.uint8, device=self._runtime.device)

    @cached_property
    def _widths(self) -> dict[str, int]:
        """Number of features of each module."""
        with torch.no_grad():
            return {module: features.shape[1] for module, features in self._extractor(self._example).items()}

    def _settings(self) -> dict[str, Any]:
        """What activations and inner products depend on."""
        return {
            "backbone": self._recipe.backbone.model_dump(),
            "pool": self._recipe.pool,
            "seed": self._recipe.seed,
            "batch_size": self._recipe.batch_size,
            "products": self._recipe.products,
            "field": self._recipe.field,
            "splits": {name: [stimuli.size, stimuli.fingerprint()] for name, stimuli in self._splits.items()},
            "images": hashlib.sha256(self._images.pixels.tobytes()).hexdigest(),
            "widths": self._widths,
        }

    def _clear_if_settings_changed(self) -> None:
        path, text = self._scratch / "settings.json", json.dumps(self._settings(), sort_keys=True)
        if not path.is_file() or path.read_text() != text:
            # The folder above stays: another rank may be about to make its own folder in it.
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch.mkdir(parents=True)
            path.write_text(text)

    def _path(self, layer_window: LayerWindow) -> Path:
        return self._scratch / layer_window.file_name

    def _owners_of_existing(self, layer_windows: Sequence[LayerWindow]) -> dict[LayerWindow, int]:
        """The matrices that exist, and the rank that owns each."""
        on_this_rank = [key for key in layer_windows if self._path(key).exists()]
        per_rank = self._runtime.gather_objects(on_this_rank)
        return {key: rank for rank, existing in enumerate(per_rank) for key in existing}

    # --------------------------------------------------------------------------------------------------- activations

    def _extract(self, modules: Sequence[str]) -> list[FeatureStore]:
        """The activations of this rank's stimuli, split by split."""
        widths = {module: self._widths[module] for module in modules}
        return [self._extract_split(name, stimuli, widths) for name, stimuli in self._splits.items()]

    def _extract_split(self, name: str, stimuli: RecordingStimuli, widths: Mapping[str, int]) -> FeatureStore:
        store, batch_size = FeatureStore(self._scratch / name, widths), self._recipe.batch_size
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

    # ------------------------------------------------------------------------------------------------ inner products

    def _compute(
        self,
        layer_windows: Sequence[LayerWindow],
        owners: Mapping[LayerWindow, int],
        stores: Sequence[FeatureStore],
    ) -> None:
        """Compute and write the matrices of one layer, through all its windows."""
        counts = [len(stimuli) for stimuli in self._splits.values()]
        activations = StoredActivations(stores, counts, self._runtime, self._recipe.memory, self._recipe.products)
        owned = [key for key in layer_windows if owners[key] == self._runtime.rank]
        with self._matrix_files(owned, activations.stimuli) as files:
            if len(layer_windows) == 1:
                self._write_whole(layer_windows[0], owners, activations, files)
            else:
                self._write_windows(layer_windows, owners, activations, files)
        self._runtime.barrier()

    @contextmanager
    def _matrix_files(
        self, layer_windows: Sequence[LayerWindow], stimuli: int
    ) -> Iterator[dict[LayerWindow, BufferedWriter]]:
        """Files that take a matrix row after row (`_append`), and get their names when all are complete."""
        temporary = {key: self._path(key).with_suffix(".tmp") for key in layer_windows}
        with contextlib.ExitStack() as stack:
            files = {key: stack.enter_context(path.open("wb")) for key, path in temporary.items()}
            for key, file in files.items():
                header = {"descr": self._dtype(key).str, "fortran_order": False, "shape": (stimuli, stimuli)}
                np.lib.format.write_array_header_1_0(file, header)
            yield files
        for key, path in temporary.items():
            path.replace(self._path(key))

    def _dtype(self, layer_window: LayerWindow) -> np.dtype:
        """float32 through windows, of which there are many; most products are rounded to float32 anyway."""
        if layer_window.window == WHOLE_MAP or self._recipe.products == "float64":
            return np.dtype(np.float64)
        return np.dtype(np.float32)

    def _append(self, files: Mapping[LayerWindow, BufferedWriter], layer_window: LayerWindow, rows: np.ndarray) -> None:
        files[layer_window].write(np.ascontiguousarray(rows, self._dtype(layer_window)).data)

    def _write_whole(
        self,
        layer_window: LayerWindow,
        owners: Mapping[LayerWindow, int],
        activations: StoredActivations,
        files: Mapping[LayerWindow, BufferedWriter],
    ) -> None:
        """Write the matrix of the whole map.

        The features of several modules are each brought to the same mean square, as in `windowed_inner_products`.
        """
        modules, owner = modules_of(layer_window.layer), owners[layer_window]
        total: np.ndarray | None = None
        for module in modules:
            products = inner_products(activations, module, owner)
            if products is None:
                continue
            if len(modules) > 1:
                mean_square = np.trace(products) / len(products)
                products /= mean_square or 1.0
            if total is None:
                total = products
            else:
                total += products
        if total is not None:
            self._append(files, layer_window, total)

    def _write_windows(
        self,
        layer_windows: Sequence[LayerWindow],
        owners: Mapping[LayerWindow, int],
        activations: StoredActivations,
        files: Mapping[LayerWindow, BufferedWriter],
    ) -> None:
        with torch.no_grad():
            map_sizes = self._extractor.map_sizes(self._example)
        windows = [key.window for key in layer_windows]
        modules = modules_of(layer_windows[0].layer)
        for stripe in windowed_inner_products(windows, modules, map_sizes, activations):
            for key, rows in zip(layer_windows, stripe, strict=True):
                summed = self._runtime.reduce_to(rows, owners[key])
                if summed is not None:
                    self._append(files, key, summed.cpu().numpy())
