"""Refuses recipes that the data, the strategy or the machine cannot satisfy, before anything is computed."""

from collections.abc import Sequence

import numpy as np
import torch

from data_prep.common.errors import BadInput
from data_prep.shards.folder import ShardFolder
from train.data.loader import TrainLoader
from train.data.stimuli import RecordingStimuli, StimulusSet
from train.distributed.launch_environment import uses_gpu
from train.models.batch_norm import single_value_norms
from train.models.losses import RESPONSE_LOSSES
from train.models.network import Network
from train.run.recipe import Loader, Recipe


def check_engine(folders: Sequence[ShardFolder], loader: Loader) -> None:
    """Refuse to stream remote shards.

    Raises:
        BadInput: remote shards, and another engine than `indexed`.
    """
    for folder in folders:
        if folder.is_remote and loader.engine != "indexed":
            raise BadInput(
                f"loader.engine: {loader.engine} reads only tars on this machine, and {folder.folder} is remote; leave "
                "it at indexed, which reads shard by shard under loader.order blocks"
            )


def check_loss(recipe: Recipe, fit: StimulusSet, accumulation_steps: int) -> None:
    """Refuse responses and batches for which the loss is undefined.

    Args:
        recipe: with the loss.
        fit: stimuli that are trained on, with the responses that are learned.
        accumulation_steps: micro-batches of a process in a global batch.

    Raises:
        BadInput: negative rates under the Poisson likelihood, or a correlation over parts of a batch.
    """
    if RESPONSE_LOSSES[recipe.loss.responses].needs_whole_batch and accumulation_steps > 1:
        raise BadInput(
            f"loss.responses: {recipe.loss.responses} needs each process's share of a batch in one pass; leave out "
            "batch.per_device, or lower batch.global_size"
        )
    if recipe.loss.responses == "poisson":
        for stimuli in fit.recordings:
            _check_not_negative(stimuli)


def _check_not_negative(stimuli: RecordingStimuli) -> None:
    assert stimuli.rates is not None  # the loss is one of responses
    for stimulus, site in np.argwhere(stimuli.rates < 0)[:1]:
        raise BadInput(
            f"loss.responses: poisson needs raw, non-negative rates, but site "
            f"{stimuli.split.manifest.site_ids[site]} of {stimuli.name} has {stimuli.rates[stimulus, site]:.4g} for "
            f"stimulus {stimuli.stimulus_ids[stimulus]}: these responses were z-scored or had a baseline subtracted; "
            "use mse, or pack the raw rates"
        )


def check_selection(stimuli: RecordingStimuli, metric: str, split: str) -> None:
    """Refuse stimuli on which the metric that selects the epoch has no value, whatever the network predicts.

    Args:
        stimuli: of one recording that select.
        metric: of the recipe.
        split: theirs, for the message.

    Raises:
        BadInput: no site has two responses to them that differ, or no response at all for the mean squared error.
    """
    if stimuli.rates is None or metric == "top1":
        return
    recorded = ~np.isnan(stimuli.rates)
    if metric == "mse":
        defined = recorded
    else:
        highest = np.where(recorded, stimuli.rates, -np.inf).max(0)
        lowest = np.where(recorded, stimuli.rates, np.inf).min(0)
        defined = highest > lowest
    if not defined.any():
        raise BadInput(
            f"early_stopping: {metric} has no value on the {len(stimuli)} stimuli of {split} of {stimuli.name}: no "
            "site has two responses to them that differ; raise early_stopping.inner_fraction, take another split, or "
            "choose early_stopping.metric mse"
        )


def check_batch_norm(network: Network, image_size: int, loader: TrainLoader) -> None:
    """Refuse micro-batches of one stimulus where BatchNorm gets a map of one position: there is nothing to average.

    Args:
        network: to be trained, on its device.
        image_size: side in pixels.
        loader: of the run; its smallest micro-batch is the same on every rank.

    Raises:
        BadInput: naming the layer.
    """
    if loader.smallest_micro_batch > 1 or not network.backbone.has_batch_norm:
        return
    device = next(network.parameters()).device
    names = single_value_norms(network, torch.zeros(1, 3, image_size, image_size, device=device))
    if names:
        raise BadInput(
            f"backbone.batch_norm: a global batch of {loader.global_size} over {loader.ranks} processes, in "
            f"{loader.accumulation_steps} micro-batches each, leaves some of a single stimulus, whose map at "
            f"{names[0]} is 1 x 1, so there is nothing to normalise by; raise batch.global_size, batch.per_device or "
            "images.size, start fewer processes, or set backbone.batch_norm: frozen"
        )


def check_hardware(recipe: Recipe, stage: int | None, ranks: int) -> None:
    """Refuse what this strategy or this machine cannot do.

    Args:
        recipe: of the run.
        stage: of ZeRO, None for DDP.
        ranks: processes.

    Raises:
        BadInput: naming the setting.
    """
    if recipe.precision == "fp16" and stage is not None:
        raise BadInput("precision: fp16 scales its loss, which works only with strategy ddp; use bf16 or fp32")
    if recipe.precision == "fp16" and not uses_gpu():
        raise BadInput("precision: fp16 needs a GPU; use bf16 or fp32 on a CPU")
    if recipe.backbone.batch_norm == "synced" and ranks > 1 and not uses_gpu():
        raise BadInput("backbone.batch_norm: synced works only on GPUs; use live or frozen")
    if recipe.compile and stage == 3:
        raise BadInput("compile: ZeRO-3 gathers weights between modules, which cannot be compiled; use zero2 or ddp")
