"""Evaluates a fine-tuned run on a split: predicts, scores, writes the results."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common.atomic_writes import write_json
from data_prep.common.errors import BadInput
from train.data.bad_samples import BadSamples
from train.data.loader import workers_per_rank
from train.data.worker_limits import workers_within_limits
from train.distributed.launch_environment import cores_of_rank, this_process
from train.distributed.runtime import Runtime
from train.evaluation.evaluation_job import EvaluationJob
from train.evaluation.figures.score_charts import chart_figures, chart_site_scores
from train.evaluation.frozen_rivals import frozen_ahead
from train.evaluation.metrics import TITLES
from train.evaluation.metrics_file import METRICS_FILE
from train.evaluation.metrics_report import SHUFFLED_CONTROL, metrics_report
from train.evaluation.predictions_file import write_predictions
from train.evaluation.scoring import RecordingScores, score
from train.evaluation.seen_stimuli import UNSEEN, mark_of, seen_in, selected_on
from train.evaluation.training_facts import OTHER_SCALE, ResponseScale, other_scale, training_stimuli
from train.models.network import Network
from train.run.checkpoint import load_matching_tensors
from train.run.trackers import open_trackers

SUMMARISED = ("r2", "explained_variance", "mse", "pearson_r", "ceiled_explained_variance", "feve")


# --------------------------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True)
class Evaluated:
    """The scores of a run on a recording.

    Attributes:
        scores: of its predictions.
        other_scale: how the recording's responses differ in scale from those it was trained on; "" if they do not.
    """

    scores: RecordingScores
    other_scale: str


def run_job(job: EvaluationJob, runtime: Runtime) -> None:
    """Score a run on a recording; on the leading rank, write the results and print a summary."""
    evaluated = evaluate(job, runtime)
    if not runtime.is_main:
        return
    folder, metrics = write_results(job, evaluated, runtime.ranks)
    _chart(job, evaluated.scores)
    name = f"{job.run.folder.path}, {job.title}"
    print(f"{name}: {len(job.stimuli):,} stimuli  {summary(metrics)}\nwritten to {folder}", flush=True)
    if rival := frozen_ahead(job.run.folder.path, job.split, job.manifest.name, metrics):
        print(f"note: {rival}", flush=True)
    _warn_of_unseen_classes(job, metrics)
    _warn_of_other_recording(job, evaluated)
    print_warnings(job.bad_samples)


def evaluate(job: EvaluationJob, runtime: Runtime) -> Evaluated:
    """Load the network and score the split over all ranks.

    Raises:
        BadInput: the run is still training, and ranks found different checkpoints.
    """
    runtime.check_agreement({"the stimuli to score": job.stimuli.fingerprint()[:12], "the split": job.split})
    run = job.run
    checkpoints = set(runtime.gather_objects(run.checkpoint.name))
    if len(checkpoints) > 1:
        raise BadInput(
            f"{run.folder.path} is still training: its {job.options.checkpoint} checkpoint changed from "
            f"{' to '.join(sorted(checkpoints))} while the processes started; start again"
        )
    network = Network(job.recipe.for_evaluation(), job.manifest, job.stimuli.size)
    rows = slice(None) if job.recording is None else run.progress.rows_of(job.recording, str(job.shards.folder))
    network.load_state_dict(load_matching_tensors(network, run.checkpoint, "network", rows))
    scale = _other_scale(network, job)
    workers = job.recipe.loader.workers if job.options.workers is None else job.options.workers
    batch_size = job.options.batch_size or job.recipe.evaluation_batch_size
    wanted = workers_per_rank(workers, cores_of_rank(this_process()))
    label = f"evaluating {job.split}"
    if job.recording is not None:
        label = f"{label} of {job.recording}"
    scores = score(
        network.to(runtime.device),
        job.stimuli,
        runtime,
        batch_size=batch_size,
        workers=workers_within_limits(wanted, batch_size, job.stimuli.size),
        keep_predictions=True,
        label=label,
    )
    return Evaluated(scores, scale)


def _other_scale(network: Network, job: EvaluationJob) -> str:
    """How the responses differ in scale from those that the network was trained on; "" if they do not."""
    responses = network.objective.responses
    if responses is None or job.stimuli.rates is None:
        return ""
    trained = ResponseScale(responses.rate_mean.numpy(), responses.rate_std.numpy())
    return other_scale(trained, ResponseScale.of(job.manifest))


def _is_other_recording(job: EvaluationJob) -> bool:
    """Whether a run on one recording is scored on another one, whose sites have the same names."""
    trained_on = job.run.progress.recordings  # empty in runs of earlier versions
    return bool(trained_on) and job.manifest.name not in trained_on


def _warn_of_other_recording(job: EvaluationJob, evaluated: Evaluated) -> None:
    run, where = job.run.folder.path, job.shards.folder
    if _is_other_recording(job):
        print(other_recording_warning(run, list(job.run.progress.recordings), job.manifest.name), file=sys.stderr)
    if evaluated.other_scale:
        print(other_scale_warning(run, str(where), evaluated.other_scale), file=sys.stderr)


def other_recording_warning(path: Path, trained_on: Sequence[str], scored: str) -> str:
    """The warning about a predictor of some recordings that is scored on another one."""
    names = " and ".join(trained_on)
    return (
        f"warning: {path} was trained on the recording {names} and is scored on {scored}, whose sites have the same "
        "names; if they are other neurons, the scores mean nothing"
    )


def other_scale_warning(path: Path, where: str, difference: str) -> str:
    """The warning about responses on another scale than those that a predictor was fitted on."""
    return (
        f"warning: the responses of {where} are on another scale than those that {path} was trained on: {difference}; "
        "if the response window or the units differ, R2 and MSE mean nothing"
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


def write_results(job: EvaluationJob, evaluated: Evaluated, ranks: int) -> tuple[Path, dict[str, Any]]:
    """Write predictions.npz and, if there are responses or labels to compare with, metrics.json.

    Returns:
        The folder, and the metrics; none without responses and labels.
    """
    scores = evaluated.scores
    folder = job.run.folder.evaluation(job.split, job.options.checkpoint, job.recording)
    digest = write_predictions(folder, _prediction_arrays(job, scores))
    metrics: dict[str, Any] = {}
    if scores.moments is not None or scores.counts is not None:
        metrics = metrics_report(scores, job.stimuli, job.manifest, job.split, ranks) | _run_facts(job)
        metrics["predictions"] = digest
        if evaluated.other_scale:
            metrics[OTHER_SCALE] = True
        unseen = _unseen_classes(job)
        if unseen:
            metrics["classification"]["classes_not_in_train"] = unseen
        write_json(folder / METRICS_FILE, metrics)
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
    progress = job.run.progress
    facts: dict[str, Any] = {
        "checkpoint": job.options.checkpoint,
        "epoch": progress.epoch,
        "step": progress.step,
        "selected_on": selected_on([progress.selection_split], job.split, job.seen),
        "seen": job.seen.content(),
    }
    if job.recording is not None or _is_other_recording(job):
        facts["trained_on"] = list(progress.recordings)
    facts |= job.bad_samples.facts()
    if job.run.record is not None:
        selected_in_train = progress.selection_split == "inner"
        facts["training_stimuli"] = training_stimuli(job.run.record, job.recording, selected_in_train)
    if job.recipe.task.shuffle_responses:
        facts["control"] = SHUFFLED_CONTROL
    return facts


def _chart(job: EvaluationJob, scores: RecordingScores) -> None:
    """Add scores and figures to the run's trackers, at the step of the checkpoint."""
    run, names = job.run.folder, job.recipe.trackers if job.options.trackers is None else job.options.trackers
    board = open_trackers(names, run.path, run.tensorboard, lambda text: print(text, file=sys.stderr, flush=True))
    name = job.split if job.recording is None else f"{job.split}/{job.recording}"
    step = job.run.progress.step
    board.scalars({f"{name}/{metric}": value for metric, value in scores.means().items()}, step)
    chart_site_scores(board, name, scores, step)
    chart_figures(board, name, scores, job.stimuli, step)
    board.close()


def summary(metrics: Mapping[str, Any]) -> str:
    """The mean scores in one line, and how many of the stimuli were seen before if any were."""
    regression = metrics.get("regression", {})
    means = {name: regression[name]["mean"] for name in SUMMARISED if name in regression}
    if "classification" in metrics:
        means["top1"] = metrics["classification"]["top1"]
    scores = [f"{TITLES[name]} {mean:.4f}" for name, mean in means.items() if mean is not None]
    if not metrics:
        return "no responses to compare with"
    mark = mark_of(seen_in(metrics))
    return "  ".join(scores) + ("" if mark == UNSEEN else f"  (seen before: {mark})")


def print_warnings(bad_samples: BadSamples) -> None:
    """Print which stimuli were left out because they cannot be read."""
    for warning in bad_samples.warnings():
        print(warning, file=sys.stderr, flush=True)
