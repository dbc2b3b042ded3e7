"""Saves a probe as a predictor of any images: RUN/predictor.safetensors (`train/models/saved_probe.py`).

It is the layer that was chosen; of a cross-validated probe the mean over the folds' fits, each of the layer that its
fold chose. The weights of the features are computed from the activations on disk, some sites at a time, so that they
take a part of `--memory` whatever their number.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch

from train.distributed.runtime import Runtime
from train.models.features import LayerFeatures
from train.models.joined_layers import GRID
from train.models.population import POPULATION, SiteMaps
from train.models.probe_network import network_digest
from train.models.saved_probe import LARGEST_BYTES, SavedProbe, SavedProbeWriter, weights_bytes
from train.models.windows import WHOLE_MAP, Window
from train.probing.dual_form import DualForm
from train.probing.layer_window import LayerWindow
from train.probing.preparation import ProbeJob
from train.probing.stored_layers import StoredLayers
from train.regression.feature_slices import StoredActivations
from train.regression.feature_weights import StimulusWeights, feature_weights
from train.regression.fit import SiteGroups
from train.regression.row_writer import RowWriter
from train.regression.rows import RowFile, Rows
from train.regression.windowed_inner_products import position_weights
from train.run.layer_names import modules_of
from train.run.monitor import Monitor

SITE_MAPS_FILE = "site_maps.npy"
SITES_SHARE = 4  # the part of --memory that the weights of the sites at hand take


def save_predictor(
    job: ProbeJob, forms: Sequence[DualForm], stored: StoredLayers, runtime: Runtime, monitor: Monitor
) -> None:
    """Compute and write the weights of the features; every rank must take part.

    Args:
        job: the probe.
        forms: of each partition, the layer that it chose; on the leading rank.
        stored: the activations.
        runtime: this process.
        monitor: for the log.
    """
    keys: list[list[LayerWindow]] = runtime.gather_objects([form.layer_windows for form in forms])[0]
    has_curve: bool = runtime.gather_objects(any(form.curve is not None for form in forms))[0]
    if has_curve and len(keys) > 1:
        monitor.log("note: no predictor is saved: each fold bends its predictions by a curve of its own")
        return
    layers = list(dict.fromkeys(key.layer for of_partition in keys for key in of_partition))
    modules = [module for layer in layers for module in _modules_of_network(layer)]
    widths = [stored.width(module) for module in modules]
    size = weights_bytes(widths, job.rates.shape[1])
    if size > LARGEST_BYTES:
        monitor.log(
            f"note: no predictor is saved: its weights would take {size / 2**30:.0f} GiB; a lower --pool makes fewer"
        )
        return
    monitor.log("saving the predictor ...")
    read = dict.fromkeys(module for layer in layers for module in modules_of(layer))
    work = _Saving(job, forms, keys, stored, stored.compute(list(read)), runtime)
    with ExitStack() as stack:
        writer = None
        if runtime.is_main:
            writer = stack.enter_context(SavedProbeWriter(job.folder.path, _facts(job, modules), widths, has_curve))
        offset, number = np.zeros(job.rates.shape[1]), 0
        for layer in layers:
            site_maps = None
            if POPULATION in modules_of(layer):
                site_maps = work.site_map_weights(layer)
                offset += site_maps.offset
            for module in _modules_of_network(layer):
                offset += work.write_module(layer, module, number, writer, site_maps)
                number += 1
        if writer is not None:
            writer.write_bias(np.mean([form.intercept for form in forms], axis=0) + offset)
            if forms[0].curve is not None:
                writer.write_curve(forms[0].curve)


def _modules_of_network(layer: str) -> list[str]:
    """The modules of a layer but a population's maps, whose weights become weights of the others."""
    return [module for module in modules_of(layer) if module != POPULATION]


def _facts(job: ProbeJob, modules: list[str]) -> SavedProbe:
    backbone = job.extractor.backbone if isinstance(job.extractor, LayerFeatures) else None
    return SavedProbe(
        modules=modules,
        site_ids=job.manifest.site_ids,
        units=job.manifest.rates.units,
        rate_mean=job.manifest.rates.mean,
        rate_std=job.manifest.rates.std,
        recording=job.manifest.name,
        simulated=job.manifest.simulated,
        image_size=next(iter(job.splits.values())).size,
        network=network_digest(backbone),
    )


@dataclass(frozen=True)
class _SiteMapWeights:
    """The weights of a population's maps in a layer.

    Attributes:
        maps: what makes the maps.
        rows: float32 (sites, features of the maps), on the leading rank's disk; None on the others.
        offset: what they add to the bias, float64 (sites,).
    """

    maps: SiteMaps
    rows: Rows | None
    offset: np.ndarray

    def of_module(self, module: str, sites: slice) -> np.ndarray | None:
        """As weights of a module's features, float32 (sites, features); None where there are none."""
        if self.rows is None:
            return None
        weights = torch.from_numpy(self.rows[sites]).view(-1, self.maps.sites, GRID, GRID)
        return self.maps.of_module(module, weights).flatten(1).cpu().numpy()


@dataclass(frozen=True)
class _Block:
    """The weights of a module's features for some sites, the mean over partitions.

    Attributes:
        sites: which.
        weight: float32 (sites, features).
        centre: float32 (features,).
        offset: what they add to the bias, float64 (sites,).
    """

    sites: slice
    weight: np.ndarray
    centre: np.ndarray
    offset: np.ndarray


class _Saving:
    """The work of all ranks on the weights of a probe.

    Args:
        job: the probe.
        forms: of each partition, on the leading rank.
        keys: layers and windows that each partition reads.
        stored, activations: of all stimuli.
        runtime: this process.
    """

    def __init__(
        self,
        job: ProbeJob,
        forms: Sequence[DualForm],
        keys: Sequence[Sequence[LayerWindow]],
        stored: StoredLayers,
        activations: StoredActivations,
        runtime: Runtime,
    ):
        self._job, self._forms, self._keys, self._stored = job, forms, keys, stored
        self._activations, self._runtime = activations, runtime

    def site_map_weights(self, layer: str) -> _SiteMapWeights:
        """Compute the weights of a population's maps in a layer; they wait on the disk of the leading rank."""
        features = self._job.extractor
        assert isinstance(features, LayerFeatures)
        assert features.site_maps is not None
        path, shape = self._stored.folder / SITE_MAPS_FILE, (self._job.rates.shape[1], self._stored.width(POPULATION))
        offsets = []
        with ExitStack() as stack:
            writer = None
            if self._runtime.is_main:
                writer = stack.enter_context(RowWriter(path, shape, np.dtype(np.float32)))
            for block in self._blocks(layer, POPULATION):
                if writer is not None:
                    writer.write(block.sites.start, 0, block.weight)
                offsets.append(block.offset - block.weight @ block.centre.astype(np.float64))
        rows = RowFile(path) if self._runtime.is_main else None
        return _SiteMapWeights(features.site_maps, rows, np.concatenate(offsets))

    def write_module(
        self,
        layer: str,
        module: str,
        number: int,
        writer: SavedProbeWriter | None,
        site_maps: _SiteMapWeights | None = None,
    ) -> np.ndarray:
        """Compute and write the weights of a module's features in a layer, the mean over partitions.

        Args:
            layer: a layer.
            module: one of its modules.
            number: of the module in the file.
            writer: of the leading rank.
            site_maps: weights of maps that are made of the module, which are added.

        Returns:
            What it adds to the bias, float64 (sites,).
        """
        offsets = []
        for block in self._blocks(layer, module):
            weight, offset = block.weight, block.offset
            added = None if site_maps is None else site_maps.of_module(module, block.sites)
            if added is not None:
                # The maps are centred on their own mean (`site_map_weights`), the module's features on theirs.
                offset = offset + added @ block.centre.astype(np.float64)
                weight = weight + added
            if writer is not None:
                writer.write_weight(number, block.sites.start, weight)
                writer.write_centre(number, block.centre)
            offsets.append(offset)
        return np.concatenate(offsets)

    def _blocks(self, layer: str, module: str) -> Iterator[_Block]:
        """The weights of a module's features in a layer, some sites at a time; every rank must take part."""
        windows = {
            partition: self._windows(layer, module, partition)
            for partition, keys in enumerate(self._keys)
            if any(key.layer == layer for key in keys)
        }
        width = self._stored.width(module)
        in_memory = 3 * width + (5 * self._stored.width(POPULATION) if POPULATION in modules_of(layer) else 0)
        centre = np.zeros(width, np.float32)
        most_windows, positions = max(map(len, windows.values())), next(iter(windows.values())).shape[1]
        for sites in self._site_blocks(most_windows, positions, 4 * in_memory):
            weight, offset = np.zeros((width, sites.stop - sites.start), np.float32), np.zeros(sites.stop - sites.start)
            for partition, of_partition in windows.items():
                stimuli = self._stimulus_weights(layer, of_partition, partition, sites)
                part = feature_weights(self._activations, module, of_partition, stimuli)
                weight += part.weight
                offset += part.offset
                centre = part.centre
            yield _Block(sites, np.ascontiguousarray(weight.T), centre, offset)

    def _windows(self, layer: str, module: str, partition: int) -> torch.Tensor:
        """How a layer's windows weigh the positions of a module's map, float64 (windows, positions)."""
        windows: list[Window] = [key.window for key in self._keys[partition] if key.layer == layer]
        map_size = (1, 1) if windows == [WHOLE_MAP] else self._stored.map_sizes[module]
        mean_squares = self._stored.mean_squares(layer)
        mean_square = mean_squares[module] if len(mean_squares) > 1 else None
        return position_weights(windows, module, map_size, self._activations, mean_square)

    def _site_blocks(self, windows: int, positions: int, weight_bytes: int) -> list[slice]:
        n, sites = self._job.rates.shape
        bytes_of_site = 8 * n * (2 * windows + min(positions, windows) + 1) + weight_bytes
        block = max(int(self._activations.memory_bytes / SITES_SHARE / bytes_of_site), 1)
        return [slice(start, min(start + block, sites)) for start in range(0, sites, block)]

    def _stimulus_weights(self, layer: str, windows: torch.Tensor, partition: int, sites: slice) -> StimulusWeights:
        """The dual weights of a partition's fit, divided by the number of partitions; the same on every rank."""
        fit = self._job.partitions[partition].fit
        # Nearly always all sites were recorded for the same stimuli, whose mean features are then computed once.
        groups = SiteGroups.of(self._job.rates[fit, sites])
        means = torch.from_numpy(groups.recorded / groups.recorded.sum(axis=0).clip(min=1)).to(windows)
        dual = windows.new_zeros(len(windows), len(fit), len(groups.group))
        if self._runtime.is_main:
            terms = [term for term in self._forms[partition].terms if term.layer_window.layer == layer]
            for row, term in zip(dual, terms, strict=True):
                row.copy_(torch.from_numpy(term.weighted(sites) / len(self._keys)))
        fit_on_device = torch.from_numpy(fit).to(windows.device)
        group_on_device = torch.from_numpy(groups.group).to(windows.device)
        return StimulusWeights(fit_on_device, self._runtime.broadcast(dual), means, group_on_device)
