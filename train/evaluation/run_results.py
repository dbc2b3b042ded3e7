"""What the evaluation of a run leaves: predictions.npz, metrics.json, TensorBoard's charts, and a line to read."""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common.atomic_writes import write_json, write_npz
from train.data.bad_samples import BadSamples
from train.data.recordings import subset_positions
from train.distributed.runtime import Runtime
from train.evaluation.metrics_report import metrics_report
from train.evaluation.run_scoring import Job, evaluate
from train.evaluation.score_charts import draw_figures, draw_numbers
from train.evaluation.scoring import RecordingScores
from train.run.monitor import Board

SHOWN = ("r2", "explained_variance", "mse", "pearson_r", "ceiled_explained_variance", "feve")


def unseen_classes(job: Job) -> int:
    """How many of the scored classes no training stimulus shows: a network cannot name those."""
    if job.stimuli.labels is None:
        return 0
    train = job.shards.split("train")
    usable = BadSamples(job.recipe.loader).usable_positions(train, None, responses=False, classes=True)
    return len(np.setdiff1d(job.stimuli.labels, train.labels(usable)))


def warn_of_unseen_classes(job: Job) -> None:
    """Say so where a division by object leaves nothing to be named right."""
    if unseen := unseen_classes(job):
        shown = len(np.unique(job.stimuli.labels))
        print(
            f"warning: {unseen} of the {shown} classes in {job.split} are not in train, so their images "
            "count as wrong by construction; classification needs a division that is not grouped by object",
            file=sys.stderr,
        )


def predictions(job: Job, scored: RecordingScores) -> dict[str, np.ndarray]:
    """What was predicted, and what is known of it: responses, and where the network names objects, classes."""
    arrays = {"stimulus_id": np.array(job.stimuli.stimulus_ids)}
    if scored.rates is not None:
        arrays |= {"site_id": np.array(job.manifest.site_ids), "prediction": scored.rates}
        arrays |= {} if job.stimuli.rates is None else {"target": job.stimuli.rates}
    if scored.classes is not None:
        arrays |= {"class_id": np.array(job.manifest.classes), "predicted_class": scored.classes}
        arrays |= {} if job.stimuli.labels is None else {"class": job.stimuli.labels}
    return arrays


def write_results(job: Job, scored: RecordingScores, ranks: int) -> tuple[Path, dict[str, Any]]:
    """Write predictions.npz and, where there is something to compare with, metrics.json; returns folder and metrics."""
    target = job.folder.evaluation(job.split, job.options.checkpoint, job.recording)
    write_npz(target / "predictions.npz", predictions(job, scored))
    metrics: dict[str, Any] = {}
    if scored.moments is not None or scored.counts is not None:
        metrics = metrics_report(scored, job.stimuli, job.manifest, job.split, ranks)
        metrics |= {"checkpoint": job.options.checkpoint, "epoch": job.progress.epoch, "step": job.progress.step}
        metrics["selected_on"] = [job.progress.selection_split]
        if job.recording is not None:
            metrics["trained_on"] = list(job.progress.recordings)
        metrics |= job.screening.facts()
        metrics["training_stimuli"] = len(subset_positions(job.shards.split("train"), job.recipe))
        if unseen := unseen_classes(job):
            metrics["classification"]["classes_not_in_train"] = unseen
        if job.recipe.task.shuffle_responses:
            metrics["control"] = "shuffled responses"
        write_json(target / "metrics.json", metrics)
    return target, metrics


def chart(job: Job, scored: RecordingScores) -> None:
    """Add the scores, the sites and the stimuli to the run's TensorBoard, at the step that was scored."""
    board = Board(job.folder.tensorboard, lambda message: print(message, file=sys.stderr, flush=True))
    split = job.split if job.recording is None else f"{job.split}/{job.recording}"
    step = job.progress.step
    board.scalars({f"{split}/{name}": value for name, value in scored.means().items()}, step)
    draw_numbers(board, split, scored, step)
    draw_figures(board, split, scored, job.stimuli, step)
    board.close()


def shown_scores(metrics: dict[str, Any]) -> str:
    """The means over sites for a line of text, those relative to a ceiling included."""
    found = metrics.get("regression", {})
    means = {name: found[name]["mean"] for name in SHOWN if name in found}
    if "classification" in metrics:
        means["top1"] = metrics["classification"]["top1"]
    known = {name: mean for name, mean in means.items() if mean is not None}
    return "  ".join(f"{name} {value:.4f}" for name, value in known.items()) or "no responses to compare with"


def run_one(job: Job, runtime: Runtime) -> None:
    """Score a fine-tuned run on a recording, write, chart and say how good it is."""
    scored = evaluate(job, runtime)
    if not runtime.is_main:
        return
    warn_of_unseen_classes(job)
    target, metrics = write_results(job, scored, runtime.ranks)
    chart(job, scored)
    of = "" if job.recording is None else f"{job.recording}, "
    print(f"{of}{job.split}: {len(job.stimuli):,} stimuli  {shown_scores(metrics)}\nwritten to {target}", flush=True)
    warn_of_bad_samples(job.screening)


def warn_of_bad_samples(screening: BadSamples) -> None:
    """Say aloud what was left out."""
    for warning in screening.warnings():
        print(warning, file=sys.stderr, flush=True)
