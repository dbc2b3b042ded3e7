"""Score a fine-tuned run on a split, from its checkpoint."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.common.errors import BadInput
from data_prep.shards.folder import ShardFolder
from data_prep.shards.manifest import Manifest
from train.data.bad_samples import BadSamples
from train.data.image_cache import ImageCaches
from train.data.loader import workers_per_rank
from train.data.recordings import Recordings
from train.data.stimuli import RecordingStimuli
from train.distributed.launch_environment import ranks_on_machine, world_size
from train.distributed.runtime import Runtime
from train.evaluation.options import Evaluate
from train.evaluation.scoring import RecordingScores, check_enough_stimuli, score
from train.models.network import Network
from train.run.checkpoint import Progress, checked_tensors, current, load_progress
from train.run.folder import LEFT_OUT, RunFolder, check_writable, open_run
from train.run.recipe import Recipe


@dataclass
class Job:
    """An evaluation on one recording that is checked as far as it can be before its processes are joined.

    Attributes:
        options: of the command line.
        split: that is scored.
        folder: of the run.
        recipe: of the run.
        checkpoint: folder.
        progress: of the checkpoint.
        recording: the one that is scored, of a run of several; else None.
        shards: of that recording.
        stimuli: to predict.
        screening: what was left out of them.
    """

    options: Evaluate
    split: str
    folder: RunFolder
    recipe: Recipe
    checkpoint: Path
    progress: Progress
    recording: str | None
    shards: ShardFolder
    stimuli: RecordingStimuli
    screening: BadSamples

    @property
    def manifest(self) -> Manifest:
        """Of the shards."""
        return self.shards.manifest


def prepare(options: Evaluate, run: Path, name: str) -> list[Job]:
    """Open run and data and check that they fit together; one job for each recording.

    Args:
        options: of the command line.
        run: folder.
        name: of the split.

    Raises:
        BadInput: they do not.
    """
    folder, recipe = open_run(run)
    check_writable(folder.path)
    checkpoint = current(folder.checkpoints, options.checkpoint)
    progress = load_progress(checkpoint)
    if options.shard_cache is not None:
        recipe.loader.shard_cache = options.shard_cache
    if options.on_bad_sample is not None:
        recipe.loader.on_bad_sample = options.on_bad_sample
    shards = [ShardFolder(place, recipe.loader.fetch) for place in options.data or folder.data_folders()]
    if len(shards) > 1 and not progress.is_of_several:
        raise BadInput(f"data: {run} was trained on one recording; name one shard folder")
    left_out = _left_out(folder, recipe, progress, shards) if name == LEFT_OUT else {}
    jobs, caches = [], ImageCaches(recipe.loader, single_pass=True)
    for opened in Recordings(shards).folders:
        where, recording, own = str(opened.folder), None, progress
        if progress.is_of_several:
            recording = opened.manifest.name
            own = progress.of(recording, where)
        own.check_fits(opened.manifest, where)
        split = opened.split("train" if name == LEFT_OUT else name)
        responses = recipe.task.predicts_responses and split.has_responses
        wanted = {"responses": responses, "classes": recipe.task.predicts_classes}
        screening = BadSamples(recipe.loader)
        usable = screening.usable_positions(split, progress.image_size, **wanted)
        if name == LEFT_OUT:
            usable = np.intersect1d(usable, left_out[opened.manifest.name])
        stimuli = RecordingStimuli(split, progress.image_size, usable, **wanted, caches=caches)
        check_enough_stimuli(stimuli, world_size(), name)
        jobs.append(Job(options, name, folder, recipe, checkpoint, progress, recording, opened, stimuli, screening))
    return jobs


def _left_out(
    folder: RunFolder, recipe: Recipe, progress: Progress, given: Sequence[ShardFolder]
) -> dict[str, np.ndarray]:
    """By recording, positions of the training stimuli that a run was not fitted on.

    Several recordings have been divided together, so those that are not scored are opened too.

    Raises:
        BadInput: the run was fitted on all of them.
    """
    if recipe.early_stopping.split != "inner":
        raise BadInput(f"{folder.path} was fitted on all of train (early_stopping.split: val), so it left nothing out")
    opened = {shards.manifest.name: shards for shards in given}
    if progress.is_of_several:
        for name, shards in opened.items():
            progress.rows_of(name, str(shards.folder))
        places = dict(zip(folder.recordings(), folder.data_folders(), strict=False))
        if missing := [name for name in progress.recordings if name not in opened.keys() | places.keys()]:
            raise BadInput(f"{folder.env} does not tell where {missing[0]} lies; name all recordings with --data")
        opened = {
            name: opened.get(name) or ShardFolder(places[name], recipe.loader.fetch) for name in progress.recordings
        }
    divided = Recordings(list(opened.values())).divide(recipe)
    return {name: part.selection for name, part in zip(opened, divided, strict=True)}


def evaluate(job: Job, runtime: Runtime) -> RecordingScores:
    """Load the network and score the split over all ranks.

    Raises:
        BadInput: the run goes on, and ranks have found different checkpoints.
    """
    if len(found := set(runtime.gather_objects(job.checkpoint.name))) > 1:
        raise BadInput(
            f"{job.folder.path} goes on: {job.options.checkpoint} was {' and '.join(sorted(found))} for different "
            "processes; start again"
        )
    network = Network(job.recipe.for_evaluation(), job.manifest, job.stimuli.size)
    rows = slice(None) if job.recording is None else job.progress.rows_of(job.recording, str(job.shards.folder))
    network.load_state_dict(checked_tensors(network, job.checkpoint, "network", rows))
    setting = job.recipe.loader.workers if job.options.workers is None else job.options.workers
    return score(
        network.to(runtime.device),
        job.stimuli,
        runtime,
        batch_size=job.options.batch_size or job.recipe.evaluation_batch_size,
        workers=workers_per_rank(setting, ranks_on_machine(), os.cpu_count() or 1),
        keep_predictions=True,
        label=f"evaluating {job.split}{f' of {job.recording}' if job.recording else ''}",
    )
