"""A run that is checked as far as it can be before its processes are joined: data, recipe and folder fit together."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import BadInput
from data_prep.manifest import Manifest
from data_prep.shard_cache import GIB
from data_prep.shards import ShardFolder, ShardSplit
from data_prep.splits import folds
from train.augment import KINDS
from train.loader import Stimuli, TrainLoader, workers_per_rank
from train.objectives import RESPONSE_LOSSES
from train.order import inner_split, nested_subset
from train.picture_cache import PictureCaches
from train.processes import rank, ranks_on_machine, uses_gpu, world_size
from train.recipe import Loader, Recipe
from train.run_folder import RunFolder
from train.scoring import check_not_empty
from train.strategy import chosen_strategy, fill_deepspeed, zero_stage
from train.streaming import StreamLoader
from train.targets import learn_from_teacher, site_weights, with_rates_of

SEED_OF_FOLDS = 0  # of early_stopping.folds: runs of several seeds leave out the same stimuli


def training_stimuli(shards: ShardFolder, recipe: Recipe) -> tuple[Stimuli, Stimuli]:
    """The stimuli to fit and the stimuli that select, as `early_stopping.split` says.

    The few that select are opened first, so that their pictures are kept before all others; under order blocks, where
    the split need not fit into memory, apart from them: or all shards would be read again for the inner part.
    """
    size = recipe.images.size or shards.manifest.image.side
    wanted = {
        "responses": recipe.task.predicts_responses,
        "classes": recipe.task.predicts_classes,
        "caches": PictureCaches(recipe.loader),
    }
    to_fit = wanted | ({"caches": None} if recipe.loader.engine == "webdataset" else {})  # it reads them each time
    train = shards.split("train")
    if recipe.early_stopping.split == "val":
        selection = Stimuli(shards.split("val"), size, **wanted)
        return Stimuli(train, size, used_of(train, recipe), **to_fit), selection
    fit, inner = fit_and_inner(train, recipe)
    selection = Stimuli(train, size, inner, **wanted, apart=recipe.loader.order == "blocks")
    return Stimuli(train, size, fit, **to_fit), selection


def used_of(train: ShardSplit, recipe: Recipe) -> np.ndarray:
    """Positions of the training stimuli that a recipe uses, to fit and to select; ascending."""
    return np.arange(len(train)) if recipe.subset is None else nested_subset(len(train), recipe.subset, recipe.seed)


def fit_and_inner(train: ShardSplit, recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the training stimuli to fit, and of the inner split; ascending.

    Raises:
        BadInput: there are fewer groups than folds.
    """
    used, key, settings = used_of(train, recipe), train.manifest.group_by, recipe.early_stopping
    groups = [str(train.meta(int(i)).get(key)) if key else train.stimulus_ids[i] for i in used]
    if settings.folds is None:
        fit, inner = inner_split(groups, settings.inner_fraction, recipe.seed)
        return used[fit], used[inner]
    if len(set(groups)) < settings.folds:
        raise BadInput(f"early_stopping.folds: {len(set(groups))} groups of train cannot fill {settings.folds} folds")
    inner = folds(np.array(groups), settings.folds, SEED_OF_FOLDS)[settings.fold - 1]
    return np.delete(used, inner), used[inner]


def check_loss(recipe: Recipe, fit: Stimuli, pieces: int, site_ids: list[str]) -> None:
    """Refuse responses and batches that the loss has no meaning for.

    Args:
        recipe: with the loss.
        fit: stimuli to fit, with their own responses.
        pieces: micro-batches of a process in a global batch.
        site_ids: for the message.

    Raises:
        BadInput: negative rates under the Poisson likelihood, or a correlation over parts of a batch.
    """
    if RESPONSE_LOSSES[recipe.loss.responses].needs_whole_batch and pieces > 1:
        raise BadInput(
            f"loss.responses: {recipe.loss.responses} needs each process's share of a batch in one pass; leave out "
            "batch.per_device, or lower batch.global_size"
        )
    if recipe.loss.responses == "poisson" and (fit.rates < 0).any():
        stimulus, site = np.argwhere(fit.rates < 0)[0]
        raise BadInput(
            f"loss.responses: poisson needs raw, non-negative rates, but site {site_ids[site]} has "
            f"{fit.rates[stimulus, site]:.4g} for stimulus {fit.stimulus_ids[stimulus]}: these responses were "
            "z-scored or had a baseline subtracted; use mse, or pack the raw rates"
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
        data: shard folder, or its URL.
        manifest: of the shards.
        folder: where it is going to be written.
        resume: whether it goes on.
        loader: this rank's training batches.
        selection: the stimuli that choose the best epoch.
        workers: decoding processes per rank.
        deepspeed: configuration with all its numbers; None for DDP.
        remarks: what to say of the data at the start.
        site_weights: of each site in the loss, float64 (sites,); None where all count alike.
    """

    recipe: Recipe
    data: Path | str
    manifest: Manifest
    folder: RunFolder
    resume: bool
    loader: TrainLoader
    selection: Stimuli
    workers: int
    deepspeed: dict[str, Any] | None
    remarks: list[str]
    site_weights: np.ndarray | None


def remarks_on(shards: ShardFolder, loader: Loader) -> list[str]:
    """What to say of remote data that is slow to read as it is."""
    if not shards.is_remote:
        return []
    found, train = [], shards.split("train")
    if not shards.has_targets:
        found.append(
            f"note: {shards.folder} has no targets.npz, so all shards were read for their responses; pack again"
        )
    budget, sizes = train.files.cache.budget, sorted((shard.bytes for shard in train.shards), reverse=True)
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


def check_engine(shards: ShardFolder, loader: Loader) -> None:
    """Refuse to stream what has to be fetched.

    Raises:
        BadInput: remote shards, and another engine than `indexed`.
    """
    if shards.is_remote and loader.engine != "indexed":
        raise BadInput(
            f"loader.engine: {loader.engine} reads tars of this machine only, and {shards.folder} is remote; leave it "
            "at indexed, which reads shard by shard under loader.order blocks"
        )


def prepare(recipe: Recipe, data: Path | str, out: Path, resume: bool) -> Job:
    """Open the data and check that recipe, data, folder and processes fit together.

    Raises:
        BadInput: they do not.
    """
    ranks, folder = world_size(), RunFolder(out)
    if resume:
        folder.check_same(recipe)
    else:
        folder.check_free()
    shards = ShardFolder(data, recipe.loader.fetch)
    check_engine(shards, recipe.loader)
    fit, selection = training_stimuli(shards, recipe)
    check_not_empty(selection, ranks, recipe.early_stopping.split)
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
    manifest, remarks = shards.manifest, remarks_on(shards, recipe.loader)
    if recipe.subset is not None and recipe.task.predicts_responses:
        manifest = with_rates_of(manifest, fit)
    weights = site_weights(fit) if recipe.loss.site_weights == "reliability" else None
    if recipe.task.shuffle_responses:
        for stimuli in (fit, selection):
            stimuli.shuffle_responses(recipe.seed)
    if recipe.distill.teacher is not None:
        remarks.append(learn_from_teacher(fit, recipe.distill))
    check_loss(recipe, fit, loader.pieces, shards.manifest.site_ids)
    deepspeed = chosen_strategy(recipe.strategy)
    check_hardware(recipe, zero_stage(deepspeed), ranks)
    if deepspeed is not None:
        deepspeed = fill_deepspeed(
            deepspeed,
            share=loader.largest_piece,
            pieces=loader.pieces,
            ranks=ranks,
            clip_norm=recipe.optimizer.clip_norm,
        )
    return Job(recipe, data, manifest, folder, resume, loader, selection, workers, deepspeed, remarks, weights)
