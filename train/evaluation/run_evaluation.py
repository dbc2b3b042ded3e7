"""Evaluates a fine-tuned run on a split: opens run and data, predicts, scores, writes the results."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common.atomic_writes import write_json, write_npz
from data_prep.common.errors import BadInput
from data_prep.shards.folder import ShardFolder
from data_prep.shards.manifest import Manifest
from train.data.bad_samples import BadSamples
from train.data.image_cache import ImageCaches
from train.data.loader import workers_per_rank
from train.data.recordings import Recordings, subset_positions
from train.data.stimuli import RecordingStimuli
from train.distributed.launch_environment import cores_of_rank, this_process
from train.distributed.runtime import Runtime
from train.evaluation.figures.score_charts import chart_figures, chart_site_scores
from train.evaluation.metrics_report import SHUFFLED_CONTROL, metrics_report
from train.evaluation.options import Evaluate
from train.evaluation.predictions_file import PREDICTIONS_FILE
from train.evaluation.scoring import RecordingScores, check_enough_stimuli, score
from train.models.network import Network
from train.run.checkpoint import load_matching_tensors, load_progress, resolve_checkpoint
from train.run.folder import LEFT_OUT, RunFolder, check_writable, open_run
from train.run.progress import Progress
from train.run.recipe import Recipe
from train.run.tensorboard import TensorBoard

SUMMARISED = ("r2", "explained_variance", "mse", "pearson_r", "ceiled_explained_variance", "feve")


@dataclass(frozen=True)
class EvaluationJob:
    """An evaluation on one recording, checked as far as possible before the process group starts.

    Attributes:
        options: of the command line.
        split: to score.
        folder: of the run.
        recipe: of the run.
        checkpoint: folder.
        progress: of the checkpoint.
        recording: name of the recording if the run was trained on several, else None.
        shards: of the recording.
        stimuli: to predict.
        bad_samples: records which stimuli are left out.
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
    bad_samples: BadSamples

    @property
    def manifest(self) -> Manifest:
        """Of the recording."""
        return self.shards.manifest


# ----------------------------------------------------------------------------------------------------- preparation


def prepare(options: Evaluate, run: Path, split: str) -> list[EvaluationJob]:
    """Open run and data and check that they fit together.

    Args:
        options: of the command line.
        run: folder.
        split: to score.

    Returns:
        One job for each recording.

    Raises:
        BadInput: they do not fit.
    """
    process = this_process()
    folder, recipe = open_run(run)
    check_writable(folder.path)
    checkpoint = resolve_checkpoint(folder.checkpoints, options.checkpoint)
    progress = load_progress(checkpoint)
    if options.shard_cache is not None:
        recipe.loader.shard_cache = options.shard_cache
    if options.on_bad_sample is not None:
        recipe.loader.on_bad_sample = options.on_bad_sample
    recordings = [ShardFolder(data, recipe.loader.fetch) for data in options.data or folder.data_folders()]
    if len(recordings) > 1 and not progress.has_several_recordings:
        raise BadInput(f"data: {run} was trained on one recording; give one shard folder")
    positions_left_out = _left_out(folder, recipe, progress, recordings) if split == LEFT_OUT else {}
    caches = ImageCaches(recipe.loader, single_pass=True)
    jobs = []
    for shards in Recordings(recordings).folders:
        name = shards.manifest.name
        recording = name if progress.has_several_recordings else None
        _check_fits(progress, recording, shards)
        bad_samples = BadSamples(recipe.loader)
        stimuli = _stimuli(
            recipe, shards, split, progress.image_size, bad_samples, positions_left_out.get(name), caches
        )
        check_enough_stimuli(stimuli, process.world_size, split)
        jobs.append(
            EvaluationJob(
                options=options,
                split=split,
                folder=folder,
                recipe=recipe,
                checkpoint=checkpoint,
                progress=progress,
                recording=recording,
                shards=shards,
                stimuli=stimuli,
                bad_samples=bad_samples,
            )
        )
    return jobs


def _check_fits(progress: Progress, recording: str | None, shards: ShardFolder) -> None:
    where = str(shards.folder)
    if recording is not None:
        progress = progress.for_recording(recording, where)
    progress.check_fits(shards.manifest, where)


def _stimuli(
    recipe: Recipe,
    shards: ShardFolder,
    split: str,
    image_size: int,
    bad_samples: BadSamples,
    positions: np.ndarray | None,
    caches: ImageCaches,
) -> RecordingStimuli:
    """The stimuli to score: all of a split that can be read, or those at `positions`."""
    shard_split = shards.split("train" if split == LEFT_OUT else split)
    responses = recipe.task.predicts_responses and shard_split.has_responses
    classes = recipe.task.predicts_classes
    usable = bad_samples.usable_positions(shard_split, image_size, responses=responses, classes=classes)
    if positions is not None:
        usable = np.intersect1d(usable, positions)
    return RecordingStimuli(shard_split, image_size, usable, responses=responses, classes=classes, caches=caches)


def _left_out(
    folder: RunFolder, recipe: Recipe, progress: Progress, scored: Sequence[ShardFolder]
) -> dict[str, np.ndarray]:
    """By recording, positions of the training stimuli that a run was not fitted on.

    Several recordings are divided together, so those that are not scored are opened too.

    Raises:
        BadInput: the run was fitted on all of them, or it is unknown where a recording is.
    """
    if recipe.early_stopping.split != "inner":
        raise BadInput(f"{folder.path} was fitted on all of train (early_stopping.split: val): no stimuli are left out")
    opened = {shards.manifest.name: shards for shards in scored}
    if progress.has_several_recordings:
        for name, shards in opened.items():
            progress.rows_of(name, str(shards.folder))
        folder_of = dict(zip(folder.recordings(), folder.data_folders(), strict=False))
        for name in progress.recordings:
            if name in opened:
                continue
            if name not in folder_of:
                raise BadInput(f"{folder.env} does not say where {name} is; give all recordings with --data")
            opened[name] = ShardFolder(folder_of[name], recipe.loader.fetch)
        opened = {name: opened[name] for name in progress.recordings}
    divided = Recordings(list(opened.values())).divide(recipe)
    return {name: part.selection for name, part in zip(opened, divided, strict=True)}


# --------------------------------------------------------------------------------------------------------- scoring


def run_job(job: EvaluationJob, runtime: Runtime) -> None:
    """Score a run on a recording; on the leading rank, write the results and print a summary."""
    scores = evaluate(job, runtime)
    if not runtime.is_main:
        return
    folder, metrics = write_results(job, scores, runtime.ranks)
    _chart(job, scores)
    name = job.split if job.recording is None else f"{job.recording}, {job.split}"
    print(f"{name}: {len(job.stimuli):,} stimuli  {summary(metrics)}\nwritten to {folder}", flush=True)
    _warn_of_unseen_classes(job, metrics)
    print_warnings(job.bad_samples)


def evaluate(job: EvaluationJob, runtime: Runtime) -> RecordingScores:
    """Load the network and score the split over all ranks.

    Raises:
        BadInput: the run is still training, and ranks found different checkpoints.
    """
    runtime.check_agreement({"the stimuli to score": job.stimuli.fingerprint()[:12], "the split": job.split})
    checkpoints = set(runtime.gather_objects(job.checkpoint.name))
    if len(checkpoints) > 1:
        raise BadInput(
            f"{job.folder.path} is still training: its {job.options.checkpoint} checkpoint changed from "
            f"{' to '.join(sorted(checkpoints))} while the processes started; start again"
        )
    network = Network(job.recipe.for_evaluation(), job.manifest, job.stimuli.size)
    rows = slice(None) if job.recording is None else job.progress.rows_of(job.recording, str(job.shards.folder))
    network.load_state_dict(load_matching_tensors(network, job.checkpoint, "network", rows))
    workers = job.recipe.loader.workers if job.options.workers is None else job.options.workers
    label = f"evaluating {job.split}"
    if job.recording is not None:
        label = f"{label} of {job.recording}"
    return score(
        network.to(runtime.device),
        job.stimuli,
        runtime,
        batch_size=job.options.batch_size or job.recipe.evaluation_batch_size,
        workers=workers_per_rank(workers, cores_of_rank(this_process())),
        keep_predictions=True,
        label=label,
    )


def _unseen_classes(job: EvaluationJob) -> int:
    """The number of scored classes without a training stimulus, which the network cannot predict."""
    if job.stimuli.labels is None:
        return 0
    train = job.shards.split("train")
    usable = BadSamples(job.recipe.loader).usable_positions(train, None, responses=False, classes=True)
    return len(np.setdiff1d(job.stimuli.labels, train.labels(usable)))


def _warn_of_unseen_classes(job: EvaluationJob, metrics: Mapping[str, Any]) -> None:
    scores = metrics.get("classification", {})
    if "classes_not_in_train" in scores:
        print(
            f"warning: {scores['classes_not_in_train']} of the {len(scores['per_class'])} classes in {job.split} are "
            "not in train, so their images "
            "count as wrong by construction; for classification, split in a way that does not group by object",
            file=sys.stderr,
        )


# --------------------------------------------------------------------------------------------------------- results


def write_results(job: EvaluationJob, scores: RecordingScores, ranks: int) -> tuple[Path, dict[str, Any]]:
    """Write predictions.npz and, if there are responses or labels to compare with, metrics.json.

    Returns:
        The folder, and the metrics; none without responses and labels.
    """
    folder = job.folder.evaluation(job.split, job.options.checkpoint, job.recording)
    write_npz(folder / PREDICTIONS_FILE, _prediction_arrays(job, scores))
    metrics: dict[str, Any] = {}
    if scores.moments is not None or scores.counts is not None:
        metrics = metrics_report(scores, job.stimuli, job.manifest, job.split, ranks) | _run_facts(job)
        unseen = _unseen_classes(job)
        if unseen:
            metrics["classification"]["classes_not_in_train"] = unseen
        write_json(folder / "metrics.json", metrics)
    return folder, metrics


def _prediction_arrays(job: EvaluationJob, scores: RecordingScores) -> dict[str, np.ndarray]:
    """Predicted responses and classes, and the recorded responses and true classes where they are known."""
    arrays = {"stimulus_id": np.array(job.stimuli.stimulus_ids)}
    if scores.rates is not None:
        arrays |= {"site_id": np.array(job.manifest.site_ids), "prediction": scores.rates}
        if job.stimuli.rates is not None:
            arrays["target"] = job.stimuli.rates
    if scores.classes is not None:
        arrays |= {"class_id": np.array(job.manifest.classes), "predicted_class": scores.classes}
        if job.stimuli.labels is not None:
            arrays["class"] = job.stimuli.labels
    return arrays


def _run_facts(job: EvaluationJob) -> dict[str, Any]:
    """The entries of metrics.json that describe the run."""
    facts: dict[str, Any] = {
        "checkpoint": job.options.checkpoint,
        "epoch": job.progress.epoch,
        "step": job.progress.step,
        "selected_on": [job.progress.selection_split],
    }
    if job.recording is not None:
        facts["trained_on"] = list(job.progress.recordings)
    facts |= job.bad_samples.facts()
    facts["training_stimuli"] = len(subset_positions(job.shards.split("train"), job.recipe))
    if job.recipe.task.shuffle_responses:
        facts["control"] = SHUFFLED_CONTROL
    return facts


def _chart(job: EvaluationJob, scores: RecordingScores) -> None:
    """Add scores and figures to the run's TensorBoard, at the step of the checkpoint."""
    board = TensorBoard(job.folder.tensorboard, lambda message: print(message, file=sys.stderr, flush=True))
    name = job.split if job.recording is None else f"{job.split}/{job.recording}"
    step = job.progress.step
    board.scalars({f"{name}/{metric}": value for metric, value in scores.means().items()}, step)
    chart_site_scores(board, name, scores, step)
    chart_figures(board, name, scores, job.stimuli, step)
    board.close()


def summary(metrics: Mapping[str, Any]) -> str:
    """The mean scores in one line."""
    regression = metrics.get("regression", {})
    means = {name: regression[name]["mean"] for name in SUMMARISED if name in regression}
    if "classification" in metrics:
        means["top1"] = metrics["classification"]["top1"]
    scores = [f"{name} {mean:.4f}" for name, mean in means.items() if mean is not None]
    return "  ".join(scores) or "no responses to compare with"


def print_warnings(bad_samples: BadSamples) -> None:
    """Print which stimuli were left out because they cannot be read."""
    for warning in bad_samples.warnings():
        print(warning, file=sys.stderr, flush=True)
