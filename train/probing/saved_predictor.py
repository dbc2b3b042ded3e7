"""Saves a probe's chosen layer as a predictor of any images: RUN/predictor.safetensors (`train/models/saved_probe.py`).

The weights of the features are computed from the activations on disk, some sites at a time, so that they take a part of
`--memory` whatever their number.
"""

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import torch

from train.distributed.runtime import Runtime
from train.models.features import LayerFeatures
from train.models.joined_layers import modules_of
from train.models.probe_network import network_digest
from train.models.saved_probe import LARGEST_BYTES, SavedProbe, SavedProbeWriter, weights_bytes
from train.models.windows import WHOLE_MAP, Window
from train.probing.dual_form import DualForm, DualTerm
from train.probing.layer_window import LayerWindow
from train.probing.preparation import ProbeJob
from train.probing.stored_layers import StoredLayers
from train.regression.feature_slices import StoredActivations
from train.regression.feature_weights import StimulusWeights, feature_weights
from train.regression.windowed_inner_products import position_weights
from train.run.monitor import Monitor

SITES_SHARE = 4  # the part of --memory that the weights of the sites at hand take


def save_predictor(
    job: ProbeJob, form: DualForm | None, stored: StoredLayers, runtime: Runtime, monitor: Monitor
) -> None:
    """Compute and write the weights of the features; every rank must take part.

    Args:
        job: the probe.
        form: of its chosen layer, on the leading rank; None for a probe that predicts each fold by another fit.
        stored: the activations.
        runtime: this process.
        monitor: for the log.
    """
    keys: list[LayerWindow] | None = runtime.gather_objects(form and form.layer_windows)[0]
    if keys is None:
        return
    layers = list(dict.fromkeys(key.layer for key in keys))
    modules = [module for layer in layers for module in modules_of(layer)]
    widths = [stored.width(module) for module in modules]
    size = weights_bytes(widths, job.rates.shape[1])
    if size > LARGEST_BYTES:
        monitor.log(
            f"note: no predictor is saved: its weights would take {size / 2**30:.0f} GiB; a lower --pool makes fewer"
        )
        return
    monitor.log("saving the predictor ...")
    work = _Saving(job, keys, stored, stored.compute(list(dict.fromkeys(modules))), runtime)
    with ExitStack() as stack:
        writer = None
        if runtime.is_main:
            has_curve = form is not None and form.curve is not None
            writer = stack.enter_context(SavedProbeWriter(job.folder.path, _facts(job, modules), widths, has_curve))
        offset, first = np.zeros(job.rates.shape[1]), 0
        for layer in layers:
            terms = None if form is None else [term for term in form.terms if term.layer_window.layer == layer]
            for module in modules_of(layer):
                offset += work.write_module(layer, module, first, terms, writer)
                first += 1
        if writer is not None and form is not None:
            writer.write_bias(form.intercept + offset)
            if form.curve is not None:
                writer.write_curve(form.curve)


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


class _Saving:
    """The work of all ranks on the weights of a probe.

    Args:
        job: the probe.
        keys: layers and windows that it reads.
        stored, activations: of all stimuli.
        runtime: this process.
    """

    def __init__(
        self,
        job: ProbeJob,
        keys: Sequence[LayerWindow],
        stored: StoredLayers,
        activations: StoredActivations,
        runtime: Runtime,
    ):
        self._keys, self._stored, self._activations, self._runtime = keys, stored, activations, runtime
        self._rates = job.rates[job.partitions[0].fit]
        self._fit = torch.from_numpy(job.partitions[0].fit).to(runtime.device)

    def write_module(
        self, layer: str, module: str, number: int, terms: Sequence[DualTerm] | None, writer: SavedProbeWriter | None
    ) -> np.ndarray:
        """Compute and write the weights of a module's features in a layer.

        Args:
            layer: a layer.
            module: one of its modules.
            number: of the module in the file.
            terms: of the layer, on the leading rank.
            writer: likewise.

        Returns:
            What it adds to the bias, float64 (sites,).
        """
        windows = self._windows(layer, module)
        offsets = []
        for sites in self._site_blocks(len(windows), windows.shape[1], self._stored.width(module)):
            weights = feature_weights(self._activations, module, windows, self._stimulus_weights(terms, windows, sites))
            if writer is not None:
                writer.write_weight(number, sites.start, np.ascontiguousarray(weights.weight.T))
                writer.write_centre(number, weights.centre)
            offsets.append(weights.offset)
        return np.concatenate(offsets)

    def _windows(self, layer: str, module: str) -> torch.Tensor:
        """How the layer's windows weigh the positions of a module's map, float64 (windows, positions)."""
        windows: list[Window] = [key.window for key in self._keys if key.layer == layer]
        map_size = (1, 1) if windows == [WHOLE_MAP] else self._stored.map_sizes[module]
        return position_weights(windows, module, map_size, self._activations, normalised=len(modules_of(layer)) > 1)

    def _site_blocks(self, windows: int, positions: int, width: int) -> list[slice]:
        sites, n = self._rates.shape[1], len(self._rates)
        bytes_of_site = 8 * n * (2 * windows + min(positions, windows) + 1) + 12 * width
        block = max(int(self._activations.memory_bytes / SITES_SHARE / bytes_of_site), 1)
        return [slice(start, min(start + block, sites)) for start in range(0, sites, block)]

    def _stimulus_weights(
        self, terms: Sequence[DualTerm] | None, windows: torch.Tensor, sites: slice
    ) -> StimulusWeights:
        recorded = ~np.isnan(self._rates[:, sites])
        means = torch.from_numpy(recorded / recorded.sum(axis=0).clip(min=1)).to(windows)
        dual = windows.new_zeros(len(windows), *means.shape)
        if terms is not None:
            for row, term in zip(dual, terms, strict=True):
                row.copy_(torch.from_numpy(term.weighted(sites)))
        return StimulusWeights(self._fit, self._runtime.broadcast(dual), means)
