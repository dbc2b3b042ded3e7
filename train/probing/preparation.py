"""A probe that is checked before its processes are joined: stimuli, layers, and what is fitted on what."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.common.errors import BadInput
from data_prep.shards.folder import ShardFolder
from data_prep.shards.manifest import Manifest
from data_prep.splits import folds
from train.data.bad_samples import BadSamples
from train.data.image_cache import ImageCaches
from train.data.loader import workers_per_rank
from train.data.order import nested_subset
from train.data.stimuli import RecordingStimuli
from train.distributed.launch_environment import ranks_on_machine, world_size
from train.evaluation.scoring import check_enough_stimuli
from train.models.backbone import Backbone
from train.models.features import PIXELS, LayerFeatures, PixelFeatures, choose_layers
from train.models.joined_layers import modules_of
from train.models.timm_networks import check_network_name
from train.probing.layers import Partition
from train.run.checkpoint import current, load_progress
from train.run.folder import RunFolder
from train.run.recipe import ProbeRecipe


@dataclass
class Job:
    """A probe that is checked as far as it can be before its processes are joined.

    Attributes:
        recipe: its settings.
        data: shard folder, or its URL.
        split: val, test or cv.
        resume: whether it goes on.
        manifest: of the shards.
        folder: where it is written.
        splits: the stimuli by split, those to fit first; positions count through all of them.
        partitions: what is fitted, and what it is tried on.
        look: from images to the layers' activations.
        layers: names, in order.
        workers: decoding processes per rank.
        screening: which stimuli are left out.
    """

    recipe: ProbeRecipe
    data: Path | str
    split: str
    resume: bool
    manifest: Manifest
    folder: RunFolder
    splits: dict[str, RecordingStimuli]
    partitions: list[Partition]
    look: LayerFeatures | PixelFeatures
    layers: list[str]
    workers: int
    screening: BadSamples

    def describe(self) -> str:
        """What is probed, for the log."""
        recipe, (first, *_) = self.recipe, self.splits.values()
        name = f"{self.manifest.name} (SIMULATED)" if self.manifest.simulated else self.manifest.name
        used = recipe.latent if recipe.readout == "pls" else recipe.components
        what = "latent dimensions" if recipe.readout == "pls" else "principal components"
        field = "" if recipe.field == "whole" else ", each site through windows of its own"
        return (
            f"{name}: {len(self.stimulus_ids):,} stimuli of {', '.join(self.splits)}, {len(self.scored):,} scored, "
            f"{len(self.manifest.sites)} sites, images of {first.size} px\n{self.look.describe()}\n"
            f"{recipe.readout} on {'all' if used is None else f'at most {used:,}'} {what}{field}"
        ) + "".join(f"\n{warning}" for warning in self.screening.warnings())

    @property
    def scored(self) -> np.ndarray:
        """Positions of the stimuli that are scored, ascending."""
        return np.sort(np.concatenate([partition.held_out for partition in self.partitions]))

    @property
    def stimulus_ids(self) -> list[str]:
        """Of all stimuli."""
        return [name for stimuli in self.splits.values() for name in stimuli.stimulus_ids]

    @property
    def rates(self) -> np.ndarray:
        """Of all stimuli, float32 (stimuli, sites)."""
        return np.concatenate([stimuli.rates for stimuli in self.splits.values()])

    @cached_property
    def noise(self) -> np.ndarray | None:
        """Noise variance of the responses that are scored, float64 (stimuli, sites); None without single trials."""
        parts = [stimuli.noise_of_rates() for stimuli in self.splits.values()]
        return None if any(part is None for part in parts) else np.concatenate(parts)[self.scored]


def prepare(recipe: ProbeRecipe, data: Path | str, out: Path, split: str, resume: bool) -> Job:
    """Open data and network and check that everything fits together.

    Raises:
        BadInput: it does not.
    """
    check_network_name(recipe.backbone.name)
    folder = RunFolder(out)
    if resume:
        folder.check_same(recipe)
    else:
        folder.check_free()
    shards = ShardFolder(data, recipe.loader.fetch)
    size = recipe.images.size or _trained_on(Path(recipe.backbone.weights)) or shards.manifest.image.side
    screening = BadSamples(recipe.loader)
    splits, partitions = _splits_and_partitions(shards, split, recipe, size, screening)
    for name, stimuli in splits.items():
        check_enough_stimuli(stimuli, world_size(), name)
    workers = workers_per_rank(recipe.loader.workers, ranks_on_machine(), os.cpu_count() or 1)
    look, layers = PixelFeatures(), [PIXELS]
    if recipe.layers != [PIXELS]:
        torch.manual_seed(recipe.seed)
        backbone = Backbone(recipe.backbone, size).eval()
        layers = choose_layers(backbone, recipe.layers, size)
        parts = dict.fromkeys(part for layer in layers for part in modules_of(layer))
        look = LayerFeatures(backbone, list(parts), recipe.pool)
    described = (shards.manifest, folder, splits, partitions, look, layers, workers, screening)
    return Job(recipe, data, split, resume, *described)


def _trained_on(weights: Path) -> int | None:
    """The side of the images that a run was trained on; None where the weights are not from a run of ours."""
    return load_progress(current(weights / "checkpoints", "best")).image_size if weights.is_dir() else None


def _splits_and_partitions(
    shards: ShardFolder, split: str, recipe: ProbeRecipe, size: int, screening: BadSamples
) -> tuple[dict[str, RecordingStimuli], list[Partition]]:
    if split == "cv" and (recipe.subset is not None or recipe.shuffle_responses):
        raise BadInput("subset and shuffle_responses change the training stimuli, and --split cv fits on all; use val")
    names = ["train", split] if split != "cv" else [name for name in shards.manifest.splits if _responds(shards, name)]
    caches = ImageCaches(recipe.loader, single_pass=True)  # their activations are kept instead
    usable = {
        name: screening.usable_positions(shards.split(name), size, responses=True, classes=False) for name in names
    }
    if recipe.subset is not None:
        drawn = nested_subset(len(shards.split("train")), recipe.subset, recipe.seed)
        usable["train"] = np.intersect1d(usable["train"], drawn)
    splits = {name: RecordingStimuli(shards.split(name), size, usable[name], caches=caches) for name in names}
    if recipe.shuffle_responses:
        splits["train"].shuffle_responses(recipe.seed)
    count = [len(stimuli) for stimuli in splits.values()]
    everyone = np.arange(sum(count))
    key = recipe.cross_validation.key if split == "cv" else shards.manifest.group_by
    tables = [shards.split(name).meta(i) for name in names for i in usable[name].tolist()]
    held_out = _outer_folds(tables, recipe) if split == "cv" else [everyone[count[0] :]]
    together = recipe.cross_validation.by == "grouped" if split == "cv" else key is not None
    groups = np.array([str(table.get(key)) for table in tables]) if together else everyone
    partitions = []
    for held in held_out:
        fit = np.setdiff1d(everyone, held)
        partitions.append(Partition(fit, held, folds(groups[fit], recipe.inner_folds, recipe.seed)))
    return splits, partitions


def _responds(shards: ShardFolder, name: str) -> bool:
    return shards.split(name).has_responses


def _outer_folds(tables: list[dict[str, Any]], recipe: ProbeRecipe) -> list[np.ndarray]:
    settings = recipe.cross_validation
    labels = np.arange(len(tables))
    if settings.by != "random":
        if any(settings.key not in table for table in tables):
            raise BadInput(f"cross_validation.key: not every stimulus has a {settings.key!r}; use by: random")
        labels = np.array([str(table[settings.key]) for table in tables])
    if settings.by != "stratified" and len(np.unique(labels)) < settings.folds:
        raise BadInput(f"cross_validation.folds: {len(np.unique(labels))} groups cannot fill {settings.folds} folds")
    return folds(labels, settings.folds, recipe.seed, stratified=settings.by == "stratified")
