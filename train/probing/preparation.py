"""Opens what a probe needs and checks it, before the process group starts."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.common.errors import BadInput
from data_prep.shards.folder import ShardFolder
from data_prep.shards.image_identity import ImageIdentities, first_copies
from data_prep.shards.manifest import Manifest
from data_prep.splits import folds, with_copies
from train.data.bad_samples import BadSamples
from train.data.image_cache import ImageCaches
from train.data.loader import workers_per_rank
from train.data.order import nested_subset
from train.data.seen import SeenRecord, inherited_record
from train.data.stimuli import RecordingStimuli
from train.data.worker_limits import workers_within_limits
from train.distributed.launch_environment import cores_of_rank, this_process
from train.evaluation.options import SeenPolicy
from train.evaluation.scoring import check_enough_stimuli
from train.evaluation.seen_stimuli import UNSEEN, Seen, SeenRule
from train.models.backbone import Backbone
from train.models.features import PIXELS, ImageFeatures, LayerFeatures, PixelFeatures
from train.models.inherited_record import record_of_weights
from train.models.layer_selection import choose_layers
from train.models.population import Population, read_population, with_population
from train.models.probe_network import network_digest
from train.models.timm_networks import check_network_name, check_weights
from train.probing.layer_regressions import Partition
from train.probing.seen_check import PARTS, ProbeCheck, images_of
from train.run.checkpoint import load_progress, resolve_checkpoint
from train.run.folder import RunFolder
from train.run.layer_names import modules_of
from train.run.recipe import ProbeRecipe, flat_settings
from train.run.trackers import check_trackers


@dataclass(frozen=True)
class ProbeJob:
    """A probe that is checked as far as possible before the process group starts.

    Attributes:
        recipe: its settings.
        data: shard folder, or its URL.
        split: val, test or cv.
        resume: whether to resume an interrupted probe.
        manifest: of the shards.
        folder: to write to.
        splits: the stimuli by split; positions run through one split after the other.
        images: of all stimuli.
        partitions: of the stimuli, into those to fit and those held out.
        record: what the probe has seen once it is done.
        seen: which of the stimuli that are scored were fitted.
        network_fitted: which of all stimuli the network or the population was fitted on, bool (stimuli,).
        population_fitted: those that the population was.
        extractor: from images to activations.
        layers: names, in order.
        workers: decoding processes per rank.
        bad_samples: records which stimuli are left out.
    """

    recipe: ProbeRecipe
    data: Path | str
    split: str
    resume: bool
    manifest: Manifest
    folder: RunFolder
    splits: dict[str, RecordingStimuli]
    images: ImageIdentities
    partitions: list[Partition]
    record: SeenRecord
    seen: Seen
    network_fitted: np.ndarray
    population_fitted: np.ndarray
    extractor: ImageFeatures
    layers: list[str]
    workers: int
    bad_samples: BadSamples

    def describe(self) -> str:
        """What is probed, for the log."""
        recipe, size = self.recipe, next(iter(self.splits.values())).size
        name = f"{self.manifest.name} (SIMULATED)" if self.manifest.simulated else self.manifest.name
        count, dimensions = recipe.components, "principal components"
        if recipe.readout == "pls":
            count, dimensions = recipe.latent, "latent dimensions"
        amount = "all" if count is None else f"at most {count:,}"
        windows = "" if recipe.field == "whole" else ", each site through windows of its own"
        if recipe.sites_learn == "together":
            windows += "; sites learn from each other"
        if recipe.response == "curved":
            windows += "; responses are curves of that"
        lines = [
            f"{name}: {len(self.stimulus_ids):,} stimuli of {', '.join(self.splits)}, {len(self.scored):,} scored, "
            f"{len(self.manifest.sites)} sites, images of {size} px",
            self.extractor.describe(),
            f"{recipe.readout} on {amount} {dimensions}{windows}",
        ]
        known = self.population_fitted[np.unique(np.concatenate([partition.fit for partition in self.partitions]))]
        if known.any():
            lines.append(
                f"note: {known.sum():,} of the {len(known):,} stimuli to fit are among those that the population was "
                "fitted on; its maps look better there than on new images, so penalties may be too low"
            )
        if self.seen.mark != UNSEEN:
            lines.append(f"seen before, of the stimuli that are scored: {self.seen.mark}")
        return "\n".join([*lines, *self.bad_samples.warnings()])

    def plan(self) -> dict[str, str]:
        """What a rank is about to do, which all must agree on."""
        stimuli = {f"the stimuli of {name}": split.fingerprint()[:12] for name, split in self.splits.items()}
        layers = {"the layers": ", ".join(self.layers), "the population": str(self.extractor.population)}
        return {**flat_settings(self.recipe), **layers, **stimuli}

    @cached_property
    def scored(self) -> np.ndarray:
        """Positions of the stimuli that are scored, ascending."""
        return np.sort(np.concatenate([partition.held_out for partition in self.partitions]))

    @cached_property
    def stimulus_ids(self) -> list[str]:
        """Of all stimuli."""
        return _ids(self.splits)

    @cached_property
    def rates(self) -> np.ndarray:
        """Responses to all stimuli, float32 (stimuli, sites)."""
        return np.concatenate([stimuli.rates for stimuli in self.splits.values() if stimuli.rates is not None])

    @cached_property
    def noise(self) -> np.ndarray | None:
        """Noise variance of the responses that are scored, float64 (stimuli, sites); None without single trials."""
        noise = []
        for stimuli in self.splits.values():
            noise_of_split = stimuli.noise_of_rates()
            if noise_of_split is None:
                return None
            noise.append(noise_of_split)
        return np.concatenate(noise)[self.scored]


def prepare(recipe: ProbeRecipe, data: Path | str, out: Path, split: str, policy: SeenPolicy, resume: bool) -> ProbeJob:
    """Open data and network and check that everything fits together.

    Args:
        recipe: settings of the probe.
        data: shard folder, or its URL.
        out: run folder.
        split: val, test or cv.
        policy: what to do about stimuli that were fitted.
        resume: whether to resume an interrupted probe.

    Raises:
        BadInput: it does not fit, or stimuli to score were fitted.
    """
    process = this_process()
    check_network_name(recipe.backbone.name)
    if recipe.layers != [PIXELS]:
        check_weights(recipe.backbone.name, recipe.backbone.weights)
    check_trackers(recipe.trackers)
    folder = RunFolder(out)
    if resume:
        folder.check_resumable(recipe)
    else:
        folder.check_free(recipe)
    shards = ShardFolder(data, recipe.loader.fetch)
    size = recipe.images.size or _image_size_of_run(Path(recipe.backbone.weights)) or shards.manifest.image.side
    bad_samples = BadSamples(recipe.loader)
    splits = _open_splits(shards, split, recipe, size, bad_samples)
    images = images_of(shards, splits)
    ancestry = SeenRecord() if recipe.layers == [PIXELS] else record_of_weights(recipe.backbone)
    population = None if recipe.population is None else read_population(Path(recipe.population))
    of_population = SeenRecord() if population is None else inherited_record(population.folder)
    ancestry = ancestry.inheriting(of_population, f"population {recipe.population}")
    network_fitted = ancestry.overlap(images).fitted
    check = ProbeCheck(ancestry, images, _ids(splits), SeenRule(str(out), split, policy, PARTS.get(split)))
    partitions, seen = check.compare(_partition(shards, split, recipe, splits, images))
    for name, stimuli in splits.items():
        check_enough_stimuli(stimuli, process.world_size, name)
    wanted = workers_per_rank(recipe.loader.workers, cores_of_rank(process))
    workers = workers_within_limits(wanted, recipe.batch_size, size)
    extractor, layers = _build_extractor(recipe, size, population)
    return ProbeJob(
        recipe=recipe,
        data=data,
        split=split,
        resume=resume,
        manifest=shards.manifest,
        folder=folder,
        splits=splits,
        images=images,
        partitions=partitions,
        record=check.record(shards.manifest.name, partitions),
        seen=seen,
        network_fitted=network_fitted,
        population_fitted=of_population.overlap(images).fitted,
        extractor=extractor,
        layers=layers,
        workers=workers,
        bad_samples=bad_samples,
    )


def _ids(splits: Mapping[str, RecordingStimuli]) -> list[str]:
    return [name for stimuli in splits.values() for name in stimuli.stimulus_ids]


def _image_size_of_run(weights: Path) -> int | None:
    """Side of the images that a run was trained on, if the weights are those of a run; else None."""
    return load_progress(resolve_checkpoint(weights / "checkpoints", "best")).image_size if weights.is_dir() else None


def _build_extractor(recipe: ProbeRecipe, size: int, population: Population | None) -> tuple[ImageFeatures, list[str]]:
    """What extracts the features, and the layers in order."""
    if recipe.layers == [PIXELS]:
        return PixelFeatures(), [PIXELS]
    torch.manual_seed(recipe.seed)
    backbone = Backbone(recipe.backbone, size).eval()
    layers = choose_layers(backbone, recipe.layers, size)
    modules = dict.fromkeys(module for layer in layers for module in modules_of(layer))
    features = LayerFeatures(backbone, list(modules), recipe.pool)
    if population is None:
        return features, layers
    population.check_layers(layers, size, recipe.pool)
    population.check_network(network_digest(backbone))
    return features.joined_by(population), [with_population(layer) for layer in layers]


def _open_splits(
    shards: ShardFolder, split: str, recipe: ProbeRecipe, size: int, bad_samples: BadSamples
) -> dict[str, RecordingStimuli]:
    """The stimuli of train and the split to score; with cv, of all splits that have responses."""
    names = ["train", split]
    if split == "cv":
        if recipe.subset is not None or recipe.shuffle_responses:
            raise BadInput(
                "subset and shuffle_responses change the training stimuli, but --split cv fits on all; use --split val"
            )
        names = [name for name in shards.manifest.splits if shards.split(name).has_responses]
    usable = {
        name: bad_samples.usable_positions(shards.split(name), size, responses=True, classes=False) for name in names
    }
    if recipe.subset is not None:
        drawn = nested_subset(len(shards.split("train")), recipe.subset, recipe.seed)
        usable["train"] = np.intersect1d(usable["train"], drawn)
    caches = ImageCaches(recipe.loader, single_pass=True)  # activations are kept instead
    splits = {name: RecordingStimuli(shards.split(name), size, usable[name], caches=caches) for name in names}
    if recipe.shuffle_responses:
        splits["train"].shuffle_responses(recipe.seed)
    return splits


def _partition(
    shards: ShardFolder,
    split: str,
    recipe: ProbeRecipe,
    splits: Mapping[str, RecordingStimuli],
    images: ImageIdentities,
) -> list[Partition]:
    """Fit on train and score the split, or with cv, score each fold with a fit on the others."""
    facts = [stimuli.split.meta(position) for stimuli in splits.values() for position in stimuli.subset.tolist()]
    positions = np.arange(len(facts))
    copies = first_copies(images)
    if split == "cv":
        settings = recipe.cross_validation
        held_out_sets = held_out_folds(facts, copies, recipe)
        key = settings.key if settings.by == "grouped" else None
    else:
        held_out_sets = [positions[len(splits["train"]) :]]
        key = shards.manifest.group_by
    labels = None if key is None else np.array([str(stimulus.get(key)) for stimulus in facts])
    with_their_copies = with_copies(labels, copies)
    groups = positions if with_their_copies is None else np.asarray(with_their_copies)
    partitions = []
    for held_out in held_out_sets:
        fit = np.setdiff1d(positions, held_out)
        inner_folds = folds(groups[fit], recipe.inner_folds, recipe.seed)
        has_copies = len(np.unique(copies[fit])) < len(fit)
        partitions.append(Partition(fit, held_out, inner_folds, copies[fit] if has_copies else None))
    return partitions


def held_out_folds(facts: list[dict[str, Any]], copies: np.ndarray, recipe: ProbeRecipe) -> list[np.ndarray]:
    """The stimuli of each fold; copies of an image are in one."""
    settings = recipe.cross_validation
    labels = copies
    if settings.by != "random":
        if any(settings.key not in stimulus for stimulus in facts):
            raise BadInput(f"cross_validation.key: not every stimulus has a {settings.key!r}; use by: random")
        labels = np.array([str(stimulus[settings.key]) for stimulus in facts])
    if settings.by == "stratified":
        images = np.flatnonzero(copies == np.arange(len(copies)))
        of_images = folds(labels[images], settings.folds, recipe.seed, stratified=True)
        return [np.flatnonzero(np.isin(copies, images[fold])) for fold in of_images]
    labels = np.asarray(with_copies(labels, copies))
    if len(np.unique(labels)) < settings.folds:
        raise BadInput(f"cross_validation.folds: {len(np.unique(labels))} groups cannot fill {settings.folds} folds")
    return folds(labels, settings.folds, recipe.seed)
