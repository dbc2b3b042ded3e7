"""Opens what an evaluation of a fine-tuned run needs and checks it, before the process group starts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.common.errors import BadInput
from data_prep.shards.folder import ShardFolder
from data_prep.shards.manifest import Manifest
from train.data.bad_samples import BadSamples
from train.data.image_cache import ImageCaches
from train.data.recordings import Recordings
from train.data.seen import SeenRecord, images_of_split, record_of
from train.data.stimuli import RecordingStimuli
from train.distributed.launch_environment import this_process
from train.evaluation.options import Evaluate
from train.evaluation.scoring import check_enough_stimuli
from train.evaluation.seen_stimuli import NothingLeftOut, Part, Seen, SeenRule, left_out_of
from train.run.checkpoint import load_progress, resolve_checkpoint
from train.run.folder import LEFT_OUT, RunFolder, check_writable, open_run
from train.run.progress import Progress
from train.run.recipe import Recipe

PARTS: dict[str, Part] = {"train": "train", LEFT_OUT: "left_out"}  # splits with fitted or taught stimuli


@dataclass(frozen=True)
class OpenedRun:
    """A fine-tuned run that is to be scored.

    Attributes:
        folder: of the run.
        recipe: of the run.
        checkpoint: folder.
        progress: of the checkpoint.
        record: what the run has seen; None if an earlier version trained it.
    """

    folder: RunFolder
    recipe: Recipe
    checkpoint: Path
    progress: Progress
    record: SeenRecord | None

    def check_fits(self, shards: ShardFolder) -> None:
        """Refuse a recording that the network does not predict.

        Raises:
            BadInput: naming what differs.
        """
        where, progress = str(shards.folder), self.progress
        if progress.has_several_recordings:
            progress = progress.for_recording(shards.manifest.name, where)
        progress.check_fits(shards.manifest, where)

    def check_left_out(self) -> None:
        """Refuse a run that has no inner split.

        Raises:
            NothingLeftOut: its epoch was chosen on val.
        """
        if self.recipe.early_stopping.split != "inner":
            raise NothingLeftOut(
                f"{self.folder.path} was fitted on all of train (early_stopping.split: val): no stimuli are left out"
            )


@dataclass(frozen=True)
class EvaluationJob:
    """An evaluation on one recording, checked as far as possible before the process group starts.

    Attributes:
        options: of the command line.
        split: to score.
        run: opened.
        recording: name of the recording if the run was trained on several, else None.
        shards: of the recording.
        stimuli: to predict.
        seen: which of them the run has seen.
        bad_samples: records which stimuli are left out.
    """

    options: Evaluate
    split: str
    run: OpenedRun
    recording: str | None
    shards: ShardFolder
    stimuli: RecordingStimuli
    seen: Seen
    bad_samples: BadSamples

    @property
    def recipe(self) -> Recipe:
        """Of the run."""
        return self.run.recipe

    @property
    def manifest(self) -> Manifest:
        """Of the recording."""
        return self.shards.manifest

    @property
    def title(self) -> str:
        """The split, after the recording's name if there are several."""
        return self.split if self.recording is None else f"{self.recording}, {self.split}"


def prepare(options: Evaluate, path: Path, split: str) -> list[EvaluationJob]:
    """Open run and data and check that they fit together.

    Args:
        options: of the command line.
        path: folder of the run.
        split: to score.

    Returns:
        One job for each recording.

    Raises:
        BadInput: they do not fit, or stimuli were fitted that --seen does not allow.
        NothingLeftOut: `left_out` is to be scored, and there are no such stimuli.
    """
    run = _open_run(options, path)
    if split == LEFT_OUT:
        run.check_left_out()
    folders = [ShardFolder(data, run.recipe.loader.fetch) for data in options.data or run.folder.data_folders()]
    if len(folders) > 1 and not run.progress.has_several_recordings:
        raise BadInput(f"data: {path} was trained on one recording; give one shard folder")
    caches = ImageCaches(run.recipe.loader, single_pass=True)
    return [_job(options, run, shards, split, caches) for shards in Recordings(folders).folders]


def _open_run(options: Evaluate, path: Path) -> OpenedRun:
    folder, recipe = open_run(path)
    check_writable(folder.path)
    checkpoint = resolve_checkpoint(folder.checkpoints, options.checkpoint)
    if options.shard_cache is not None:
        recipe.loader.shard_cache = options.shard_cache
    if options.on_bad_sample is not None:
        recipe.loader.on_bad_sample = options.on_bad_sample
    return OpenedRun(folder, recipe, checkpoint, load_progress(checkpoint), record_of(path))


def _job(options: Evaluate, run: OpenedRun, shards: ShardFolder, split: str, caches: ImageCaches) -> EvaluationJob:
    run.check_fits(shards)
    recording = shards.manifest.name if run.progress.has_several_recordings else None
    bad_samples = BadSamples(run.recipe.loader)
    shard_split = shards.split("train" if split == LEFT_OUT else split)
    responses = run.recipe.task.predicts_responses and shard_split.has_responses
    classes = run.recipe.task.predicts_classes
    size = run.progress.image_size
    positions = bad_samples.usable_positions(shard_split, size, responses=responses, classes=classes)
    images = images_of_split(shards, shard_split.name)
    if split == LEFT_OUT:
        left_out = left_out_of(run.record, str(run.folder.path), recording, images)
        positions = np.intersect1d(positions, left_out)
    rule = SeenRule(str(run.folder.path), split, options.seen, PARTS.get(split))
    stimulus_ids = _ids(shard_split.stimulus_ids, positions)
    compared = rule.compare(run.record, images.at(positions), stimulus_ids)
    stimuli = RecordingStimuli(
        shard_split, size, positions[compared.scored], responses=responses, classes=classes, caches=caches
    )
    check_enough_stimuli(stimuli, this_process().world_size, split)
    return EvaluationJob(options, split, run, recording, shards, stimuli, compared.seen, bad_samples)


def _ids(stimulus_ids: Sequence[str], positions: np.ndarray) -> list[str]:
    return [stimulus_ids[position] for position in positions.tolist()]
