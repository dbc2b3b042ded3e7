"""Opens the data of a run and checks it with the recipe as far as possible before the process group starts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.shards.folder import ShardFolder
from train.data.augment import KINDS
from train.data.bad_samples import BadSamples
from train.data.combined_stimuli import combine_recordings
from train.data.image_cache import ImageCaches
from train.data.loader import TrainLoader, workers_per_rank
from train.data.recordings import FitAndSelection, Recordings
from train.data.stimuli import RecordingStimuli, StimulusSet
from train.data.streaming import StreamLoader
from train.data.worker_limits import workers_within_limits
from train.distributed.launch_environment import cores_of_rank, this_process, uses_gpu
from train.distributed.strategy import complete_deepspeed_config, resolve_strategy, zero_stage
from train.evaluation.scoring import check_enough_stimuli
from train.finetuning.setup.data_notes import notes_on_left_out, notes_on_remote_shards
from train.finetuning.setup.recipe_checks import check_engine, check_hardware, check_loss, check_selection
from train.finetuning.setup.training_targets import TrainingTargets, set_targets
from train.models.timm_networks import check_network_name, check_weights
from train.run.folder import RunFolder
from train.run.recipe import Recipe
from train.run.trackers import check_trackers


@dataclass(frozen=True)
class TrainingData:
    """The recordings of a run, divided.

    Attributes:
        recordings: opened.
        fit: the stimuli that are trained on.
        selection: the stimuli that select the best epoch.
        bad_samples: stimuli that cannot be read and are left out.
        notes: about the data, for the log.
    """

    recordings: Recordings
    fit: StimulusSet
    selection: StimulusSet
    bad_samples: BadSamples
    notes: list[str]


@dataclass(frozen=True)
class PreparedRun:
    """A checked run.

    Attributes:
        recipe: its settings.
        locations: paths or URLs of its shard folders.
        folder: where it is written.
        resume: whether it continues a run.
        data: its stimuli.
        targets: what is learned of the stimuli that are trained on.
        loader: this rank's training batches.
        workers: decoding processes per rank.
        deepspeed: complete configuration; None for DDP.
    """

    recipe: Recipe
    locations: Sequence[Path | str]
    folder: RunFolder
    resume: bool
    data: TrainingData
    targets: TrainingTargets
    loader: TrainLoader
    workers: int
    deepspeed: dict[str, Any] | None

    @property
    def recording_names(self) -> list[str]:
        """Of several recordings; none of one."""
        return self.data.recordings.names if len(self.data.recordings) > 1 else []


def prepare(recipe: Recipe, locations: Sequence[Path | str], out: Path, resume: bool) -> PreparedRun:
    """Open the data and check that recipe, data, folder and processes fit together.

    Args:
        recipe: of the run.
        locations: paths or URLs of shard folders, one per recording.
        out: run folder.
        resume: whether to continue the run in it.

    Raises:
        BadInput: they do not fit together.
    """
    process = this_process()
    check_network_name(recipe.backbone.name)
    check_trackers(recipe.trackers)
    folder = RunFolder(out)
    if resume:
        folder.check_resumable(recipe)
    else:
        check_weights(recipe.backbone.name, recipe.backbone.weights)
        folder.check_free(recipe)
    data = open_data(recipe, locations)
    targets = set_targets(recipe, data.recordings.manifest, data.fit, data.selection)
    largest_batch = max(
        recipe.batch.per_device or -(-recipe.batch.global_size // process.world_size), recipe.evaluation_batch_size
    )
    wanted = workers_per_rank(recipe.loader.workers, cores_of_rank(process))
    workers = workers_within_limits(wanted, largest_batch, data.fit.size)
    loader = build_loader(recipe, data.fit, workers)
    check_loss(recipe, data.fit, loader.accumulation_steps)
    deepspeed = deepspeed_config(recipe, loader)
    return PreparedRun(recipe, locations, folder, resume, data, targets, loader, workers, deepspeed)


def open_data(recipe: Recipe, locations: Sequence[Path | str]) -> TrainingData:
    """Open the recordings and divide their stimuli.

    Raises:
        BadInput: a folder cannot be read, or the recipe asks for something that the recordings do not have.
    """
    folders = [ShardFolder(location, recipe.loader.fetch) for location in locations]
    check_engine(folders, recipe.loader)
    recordings = Recordings(folders)
    recordings.check(recipe)
    bad_samples = BadSamples(recipe.loader, name_recordings=len(folders) > 1)
    divided = recordings.divide(recipe, bad_samples)
    fit, selection = training_stimuli(recordings, divided, recipe)
    for stimuli in selection.recordings:
        check_enough_stimuli(stimuli, this_process().world_size, recipe.early_stopping.split)
        check_selection(stimuli, recipe.selection_metric, recipe.early_stopping.split)
    notes = [
        *bad_samples.warnings(),
        *notes_on_remote_shards(folders, recipe.loader),
        *notes_on_left_out(recordings, divided),
    ]
    return TrainingData(recordings, fit, selection, bad_samples, notes)


def training_stimuli(
    recordings: Recordings, divided: Sequence[FitAndSelection], recipe: Recipe
) -> tuple[StimulusSet, StimulusSet]:
    """The stimuli that are trained on and those that select, as they were divided.

    The few that select are opened first, so that their images are cached before all others. Under order blocks, where
    the split need not fit into memory, they have a cache of their own; otherwise all shards would be read again to
    score them.
    """
    size, caches = recordings.image_size(recipe), ImageCaches(recipe.loader)
    streams = recipe.loader.engine == "webdataset"  # and reads every image from its tar each time
    separate_cache = recipe.loader.order == "blocks" and recipe.early_stopping.split == "inner"
    selection = [
        RecordingStimuli(
            part.selection_split,
            size,
            part.selection,
            responses=recipe.task.predicts_responses,
            classes=recipe.task.predicts_classes,
            caches=caches,
            separate_cache=separate_cache,
            columns=columns,
        )
        for part, columns in zip(divided, recordings.columns, strict=True)
    ]
    fit = [
        RecordingStimuli(
            part.train,
            size,
            part.fit,
            responses=recipe.task.predicts_responses,
            classes=recipe.task.predicts_classes,
            caches=None if streams else caches,
            columns=columns,
        )
        for part, columns in zip(divided, recordings.columns, strict=True)
    ]
    return combine_recordings(fit, recipe.mix), combine_recordings(selection, recipe.mix)


def build_loader(recipe: Recipe, fit: StimulusSet, workers: int) -> TrainLoader:
    """This rank's training batches.

    Raises:
        BadInput: more ranks than stimuli in a global batch.
    """
    process = this_process()
    loader_type = StreamLoader if recipe.loader.engine == "webdataset" else TrainLoader
    return loader_type(
        fit,
        seed=recipe.seed,
        global_size=recipe.batch.global_size,
        per_device=recipe.batch.per_device,
        rank=process.rank,
        ranks=process.world_size,
        workers=workers,
        pin=uses_gpu(),
        draws=KINDS if recipe.augment.is_on else 0,
        block_shards=recipe.loader.block_shards if recipe.loader.order == "blocks" else None,
    )


def deepspeed_config(recipe: Recipe, loader: TrainLoader) -> dict[str, Any] | None:
    """The complete DeepSpeed configuration; None for DDP.

    Raises:
        BadInput: a strategy that cannot be read, or that this machine or the recipe does not go with.
    """
    config = resolve_strategy(recipe.strategy)
    check_hardware(recipe, zero_stage(config), loader.ranks)
    if config is None:
        return None
    return complete_deepspeed_config(
        config,
        micro_batch=loader.largest_micro_batch,
        accumulation_steps=loader.accumulation_steps,
        ranks=loader.ranks,
        clip_norm=recipe.optimizer.clip_norm,
    )
