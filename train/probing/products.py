"""The inner products that a probe needs, made once and kept on disk: activations first, then layer after layer.

SCRATCH/<rank>_of_<ranks>/of.json               what they depend on; where that differs, all is made anew
SCRATCH/<rank>_of_<ranks>/<split>/              activations of the rank's stimuli, until they are used up
SCRATCH/<rank>_of_<ranks>/<view>.products.npy   (stimuli, stimuli), on the rank that owns the view
"""

import contextlib
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from train.data.stimuli import RecordingStimuli
from train.distributed.runtime import Runtime
from train.models.features import LayerFeatures, PixelFeatures
from train.models.joined_layers import modules_of
from train.models.windows import WHOLE_MAP, Window
from train.regression.activations import activation_batches
from train.regression.feature_slices import StoredActivations
from train.regression.feature_store import FeatureStore
from train.regression.inner_products import inner_products
from train.regression.windowed_inner_products import windowed_inner_products
from train.run.monitor import Monitor
from train.run.recipe import ProbeRecipe

LONGEST_NAME = 120  # letters of a layer in the name of a file


@dataclass(frozen=True)
class View:
    """A layer through a window: what one matrix of inner products is of."""

    layer: str
    window: Window

    @property
    def name(self) -> str:
        """Of its file."""
        shape = "" if self.window == WHOLE_MAP else "@{x:+.2f}{y:+.2f}~{width:.2f}".format(**asdict(self.window))
        layer = self.layer  # of many modules its name is longer than file systems allow
        return (layer if len(layer) <= LONGEST_NAME else hashlib.sha256(layer.encode()).hexdigest()) + shape


class Products:
    """The inner products of all stimuli; what was made before a kill is found again.

    Args:
        recipe: of the probe.
        splits: the stimuli by split; rows and columns count through all of them.
        look: from images to activations.
        scratch: folder for activations and inner products.
        runtime: this process.
        workers: decoding processes.
        monitor: log.
    """

    def __init__(
        self,
        recipe: ProbeRecipe,
        splits: Mapping[str, RecordingStimuli],
        look: LayerFeatures | PixelFeatures,
        scratch: Path,
        runtime: Runtime,
        workers: int,
        monitor: Monitor,
    ):
        self._recipe, self._splits, self._look = recipe, splits, look
        self._runtime, self._workers, self._monitor = runtime, workers, monitor
        self._scratch = scratch / f"{runtime.rank}_of_{runtime.ranks}"

    def make(self, views: Sequence[View]) -> dict[View, int]:
        """Make what is missing; returns the rank that has the products of each view.

        Args:
            views: layer after layer, all windows of each.
        """
        self._begin_anew_unless(self._described())
        found = self._found(views)
        owners = {view: found.get(view, number % self._runtime.ranks) for number, view in enumerate(views)}
        if found:
            self._monitor.say(f"{len(found)} of {len(views)} layers and windows are there already")
        every = {layer: list(own) for layer, own in itertools.groupby(views, lambda view: view.layer)}
        missing = {layer: own for layer, own in every.items() if not all(view in found for view in own)}
        last_use = {part: layer for layer in missing for part in modules_of(layer)}
        stores = self._stores({part: self._widths[part] for part in last_use}) if last_use else []
        for layer, own in missing.items():
            self._make_layer(layer, own, owners, stores)
            for part in modules_of(layer):
                if last_use[part] == layer:
                    for store in stores:
                        store.delete(part)
            self._monitor.say(f"{layer}: {self.width(layer):,} features")
        return owners

    def load(self, view: View) -> np.ndarray:
        """Float64 (stimuli, stimuli), on the rank that has it."""
        return np.load(self._path(view), allow_pickle=False).astype(np.float64)

    def width(self, layer: str) -> int:
        """Features of a layer, of all its modules."""
        return sum(self._widths[part] for part in modules_of(layer))

    def clear(self) -> None:
        """Free the scratch space."""
        shutil.rmtree(self._scratch, ignore_errors=True)
        with contextlib.suppress(OSError):  # other ranks may not have cleared theirs
            self._scratch.parent.rmdir()

    # --- what is there already

    @cached_property
    def _image(self) -> torch.Tensor:
        size = next(iter(self._splits.values())).size
        return torch.zeros(1, 3, size, size, dtype=torch.uint8, device=self._runtime.device)

    @cached_property
    def _widths(self) -> dict[str, int]:
        with torch.no_grad():
            return {part: found.shape[1] for part, found in self._look(self._image).items()}

    def _described(self) -> dict[str, Any]:
        """What activations and inner products depend on."""
        return {
            "backbone": self._recipe.backbone.model_dump(),
            "pool": self._recipe.pool,
            "seed": self._recipe.seed,
            "batch_size": self._recipe.batch_size,
            "products": self._recipe.products,
            "field": self._recipe.field,
            "splits": {name: [stimuli.size, stimuli.fingerprint()] for name, stimuli in self._splits.items()},
            "widths": self._widths,
        }

    def _begin_anew_unless(self, described: Mapping[str, Any]) -> None:
        note, text = self._scratch / "of.json", json.dumps(described, sort_keys=True)
        if not note.is_file() or note.read_text() != text:
            self.clear()
            self._scratch.mkdir(parents=True)
            note.write_text(text)

    def _path(self, view: View) -> Path:
        return self._scratch / f"{view.name}.products.npy"

    def _found(self, views: Sequence[View]) -> dict[View, int]:
        """The views whose products are there, and the rank that has them."""
        own = [view for view in views if self._path(view).exists()]
        lists = self._runtime.gather_objects(own)
        return {view: rank for rank, found in enumerate(lists) for view in found}

    # --- the work

    def _make_layer(
        self, layer: str, views: Sequence[View], owners: Mapping[View, int], stores: Sequence[FeatureStore]
    ) -> None:
        """The products of a layer, through all its windows."""
        counts = [len(stimuli) for stimuli in self._splits.values()]
        held = StoredActivations(stores, counts, self._runtime, self._recipe.memory, self._recipe.products)
        own = [view for view in views if owners[view] == self._runtime.rank]
        with self._being_written(own, sum(counts)) as files:
            if len(views) == 1:
                self._write_whole(views[0], owners[views[0]], held, files)
            else:
                self._write_windows(views, owners, held, files)
        self._runtime.barrier()

    @contextmanager
    def _being_written(self, views: Sequence[View], stimuli: int) -> Iterator[dict[View, BinaryIO]]:
        """Files that take row after row (`_append`), and get their names when all are done."""
        with contextlib.ExitStack() as stack:
            temporary = {view: self._path(view).with_suffix(".tmp") for view in views}
            files = {view: stack.enter_context(path.open("wb")) for view, path in temporary.items()}
            for view, file in files.items():
                header = {"descr": self._dtype(view).str, "fortran_order": False, "shape": (stimuli, stimuli)}
                np.lib.format.write_array_header_1_0(file, header)
            yield files
        for view, path in temporary.items():
            path.replace(self._path(view))

    def _dtype(self, view: View) -> np.dtype:
        """There are many windows, and most products are rounded to float32 already."""
        halved = view.window != WHOLE_MAP and self._recipe.products != "float64"
        return np.dtype(np.float32 if halved else np.float64)

    def _write_whole(self, view: View, owner: int, held: StoredActivations, files: Mapping[View, BinaryIO]) -> None:
        """The features of several modules are each brought to the same mean square, see `windowed_inner_products`."""
        parts, found = modules_of(view.layer), []
        for part in parts:
            products = inner_products(held, part, owner)
            if products is not None:
                size = np.trace(products) / len(products) if len(parts) > 1 else 1.0
                found.append(products / (size or 1.0))
        if found:
            self._append(files, view, sum(found))

    def _append(self, files: Mapping[View, BinaryIO], view: View, rows: np.ndarray) -> None:
        files[view].write(memoryview(np.ascontiguousarray(rows, self._dtype(view))).cast("B"))

    def _write_windows(
        self, views: Sequence[View], owners: Mapping[View, int], held: StoredActivations, files: Mapping[View, BinaryIO]
    ) -> None:
        with torch.no_grad():
            maps = self._look.map_sizes(self._image)
        stripes = windowed_inner_products([view.window for view in views], modules_of(views[0].layer), maps, held)
        for rows in stripes:
            for view, own in zip(views, rows, strict=True):
                summed = self._runtime.reduce_to(own, owners[view])
                if summed is not None:
                    self._append(files, view, summed.cpu().numpy())

    def _stores(self, widths: Mapping[str, int]) -> list[FeatureStore]:
        """The activations of this rank's stimuli, split by split."""
        return [self._store(name, stimuli, widths) for name, stimuli in self._splits.items()]

    def _store(self, name: str, stimuli: RecordingStimuli, widths: Mapping[str, int]) -> FeatureStore:
        store, size = FeatureStore(self._scratch / name, widths), self._recipe.batch_size
        there = (
            store.complete_rows() // size
        )  # whole batches: predictions may depend on a batch's shape in the last digit
        store.truncate(there * size)
        look = self._look.of(list(widths))
        for found in activation_batches(
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
