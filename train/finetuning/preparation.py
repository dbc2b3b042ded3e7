"""A run that is checked as far as it can be before its processes are joined: data, recipe and folder fit together."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common.errors import BadInput
from data_prep.remote.cache import GIB
from data_prep.shards.folder import ShardFolder
from data_prep.shards.manifest import Manifest
from train.data.augment import KINDS
from train.data.bad_samples import BadSamples
from train.data.combined_stimuli import combine_recordings
from train.data.image_cache import ImageCaches
from train.data.loader import TrainLoader, workers_per_rank
from train.data.recordings import FitAndSelection, Recordings
from train.data.stimuli import RecordingStimuli, StimulusSet
from train.data.streaming import StreamLoader
from train.distributed.launch_environment import rank, ranks_on_machine, uses_gpu, world_size
from train.distributed.strategy import complete_deepspeed_config, resolve_strategy, zero_stage
from train.evaluation.scoring import check_enough_stimuli
from train.finetuning.training_targets import learn_from_teacher, site_weights, with_rates_of
from train.models.losses import RESPONSE_LOSSES
from train.models.timm_networks import check_network_name
from train.run.folder import RunFolder
from train.run.recipe import Loader, Recipe


def training_stimuli(
    recordings: Recordings, divided: Sequence[FitAndSelection], recipe: Recipe
) -> tuple[StimulusSet, StimulusSet]:
    """The stimuli to fit and the stimuli that select, as they were divided.

    The few that select are opened first, so that their images are kept before all others; under order blocks, where
    the split need not fit into memory, apart from them: or all shards would be read again for the inner part.
    """
    size = recordings.image_size(recipe)
    wanted = {
        "responses": recipe.task.predicts_responses,
        "classes": recipe.task.predicts_classes,
        "caches": ImageCaches(recipe.loader),
    }
    to_fit = wanted | ({"caches": None} if recipe.loader.engine == "webdataset" else {})  # it reads them each time
    apart = recipe.loader.order == "blocks" and recipe.early_stopping.split == "inner"
    parts = list(zip(divided, recordings.columns, strict=True))
    selection = [
        RecordingStimuli(part.selection_split, size, part.selection, **wanted, separate_cache=apart, columns=columns)
        for part, columns in parts
    ]
    fit = [RecordingStimuli(part.train, size, part.fit, **to_fit, columns=columns) for part, columns in parts]
    return combine_recordings(fit, recipe.mix), combine_recordings(selection, recipe.mix)


def check_loss(recipe: Recipe, fit: StimulusSet, pieces: int) -> None:
    """Refuse responses and batches that the loss has no meaning for.

    Args:
        recipe: with the loss.
        fit: stimuli to fit, with their own responses.
        pieces: micro-batches of a process in a global batch.

    Raises:
        BadInput: negative rates under the Poisson likelihood, or a correlation over parts of a batch.
    """
    if RESPONSE_LOSSES[recipe.loss.responses].needs_whole_batch and pieces > 1:
        raise BadInput(
            f"loss.responses: {recipe.loss.responses} needs each process's share of a batch in one pass; leave out "
            "batch.per_device, or lower batch.global_size"
        )
    for part in fit.recordings if recipe.loss.responses == "poisson" else ():
        for stimulus, site in np.argwhere(part.rates < 0)[:1]:
            raise BadInput(
                f"loss.responses: poisson needs raw, non-negative rates, but site "
                f"{part.split.manifest.site_ids[site]} of {part.name} has {part.rates[stimulus, site]:.4g} for "
                f"stimulus {part.stimulus_ids[stimulus]}: these responses were z-scored or had a baseline subtracted; "
                "use mse, or pack the raw rates"
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
        raise BadInput("precision: fp16 scales its loss, which works with strategy ddp only; take bf16 or fp32")
    if recipe.precision == "fp16" and not uses_gpu():
        raise BadInput("precision: fp16 needs a GPU; on a CPU take bf16 or fp32")
    if recipe.backbone.batch_norm == "synced" and ranks > 1 and not uses_gpu():
        raise BadInput("backbone.batch_norm: synced needs GPUs, torch has it for no CPU; take live or frozen")
    if recipe.compile and stage == 3:
        raise BadInput("compile: ZeRO-3 gathers weights between modules, which cannot be compiled; take zero2 or ddp")


@dataclass
class Job:
    """A checked run.

    Attributes:
        recipe: its settings.
        data: shard folders, or their URLs.
        recordings: what is in them.
        manifest: of all recordings as one; of a subset with its sites' mean and standard deviation.
        folder: where it is going to be written.
        resume: whether it goes on.
        loader: this rank's training batches.
        selection: the stimuli that choose the best epoch, by each recording's own.
        workers: decoding processes per rank.
        deepspeed: configuration with all its numbers; None for DDP.
        remarks: what to say of the data at the start.
        facts: what env.json says of the stimuli that are left out.
        site_weights: of each site in the loss, float64 (sites,); None where all count alike.
    """

    recipe: Recipe
    data: Sequence[Path | str]
    recordings: Recordings
    manifest: Manifest
    folder: RunFolder
    resume: bool
    loader: TrainLoader
    selection: StimulusSet
    workers: int
    deepspeed: dict[str, Any] | None
    remarks: list[str]
    facts: dict[str, Any]
    site_weights: np.ndarray | None


def remarks_on_division(recordings: Recordings, divided: Sequence[FitAndSelection]) -> list[str]:
    """What several recordings keep from each other."""
    return [
        f"note: {part.left_out:,} of the {len(part.train):,} train stimuli of {name} are left out, because another "
        "recording holds them out (the same id and size of file)"
        for name, part in zip(recordings.names, divided, strict=True)
        if part.left_out
    ]


def remarks_on(folders: Sequence[ShardFolder], loader: Loader) -> list[str]:
    """What to say of remote data that is slow to read as it is."""
    remote = [folder for folder in folders if folder.is_remote]
    if not remote:
        return []
    trains = [folder.split("train") for folder in remote]
    found = [
        f"note: {folder.folder} has no targets.npz, so all shards were read for their responses; pack again"
        for folder in remote
        if not folder.has_response_table
    ]
    budget = trains[0].files.cache.budget
    sizes = sorted((shard.bytes for train in trains for shard in train.shards), reverse=True)
    needed = sum(sizes[: loader.block_shards + 1] if loader.order == "blocks" else sizes)
    if needed > budget:
        advice = (
            "lower loader.block_shards" if loader.order == "blocks" else "loader.order blocks fetches each about once"
        )
        found.append(
            f"note: loader.order {loader.order} needs {needed / GIB:.3g} GiB of shards at a time and "
            f"loader.shard_cache_gib keeps {budget / GIB:.3g}, so shards are fetched several times an epoch; {advice}"
        )
    return found


def check_engine(folders: Sequence[ShardFolder], loader: Loader) -> None:
    """Refuse to stream what has to be fetched.

    Raises:
        BadInput: remote shards, and another engine than `indexed`.
    """
    for shards in folders:
        if shards.is_remote and loader.engine != "indexed":
            raise BadInput(
                f"loader.engine: {loader.engine} reads tars of this machine only, and {shards.folder} is remote; leave "
                "it at indexed, which reads shard by shard under loader.order blocks"
            )


def prepare(recipe: Recipe, data: Sequence[Path | str], out: Path, resume: bool) -> Job:
    """Open the data and check that recipe, data, folder and processes fit together.

    Args:
        recipe: of the run.
        data: shard folders, or their URLs: a recording each.
        out: run folder.
        resume: whether the run in it goes on.

    Raises:
        BadInput: they do not.
    """
    check_network_name(recipe.backbone.name)
    ranks, folder = world_size(), RunFolder(out)
    if resume:
        folder.check_same(recipe)
    else:
        folder.check_free()
    folders = [ShardFolder(place, recipe.loader.fetch) for place in data]
    check_engine(folders, recipe.loader)
    recordings, screening = Recordings(folders), BadSamples(recipe.loader, name_recordings=len(folders) > 1)
    recordings.check(recipe)
    divided = recordings.divide(recipe, screening)
    fit, selection = training_stimuli(recordings, divided, recipe)
    for part in selection.recordings:
        check_enough_stimuli(part, ranks, recipe.early_stopping.split)
    remarks = [*screening.warnings(), *remarks_on(folders, recipe.loader), *remarks_on_division(recordings, divided)]
    workers = workers_per_rank(recipe.loader.workers, ranks_on_machine(), os.cpu_count() or 1)
    loader_type = StreamLoader if recipe.loader.engine == "webdataset" else TrainLoader
    loader = loader_type(
        fit,
        seed=recipe.seed,
        global_size=recipe.batch.global_size,
        per_device=recipe.batch.per_device,
        rank=rank(),
        ranks=ranks,
        workers=workers,
        pin=uses_gpu(),
        draws=KINDS if recipe.augment.is_on else 0,
        block_shards=recipe.loader.block_shards if recipe.loader.order == "blocks" else None,
    )
    manifest = recordings.manifest
    if recipe.subset is not None and recipe.task.predicts_responses:
        manifest = with_rates_of(manifest, fit)
    weights = site_weights(fit) if recipe.loss.site_weights == "reliability" else None
    if recipe.task.shuffle_responses:
        for stimuli in (fit, selection):
            stimuli.shuffle_responses(recipe.seed)
    if recipe.distill.teacher is not None:
        remarks += [learn_from_teacher(part, recipe.distill) for part in fit.recordings]
    check_loss(recipe, fit, loader.accumulation_steps)
    deepspeed = resolve_strategy(recipe.strategy)
    check_hardware(recipe, zero_stage(deepspeed), ranks)
    if deepspeed is not None:
        deepspeed = complete_deepspeed_config(
            deepspeed,
            micro_batch=loader.largest_micro_batch,
            accumulation_steps=loader.accumulation_steps,
            ranks=ranks,
            clip_norm=recipe.optimizer.clip_norm,
        )
    described = (recordings, manifest, folder, resume, loader, selection, workers, deepspeed, remarks)
    return Job(recipe, data, *described, screening.facts(), weights)
