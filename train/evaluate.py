"""Score a fine-tuned run on a split: exact metrics over all ranks, and the predictions. Several runs make an ensemble.

accelerate launch [...] train/evaluate.py RUN --split val
launch/local.sh -n 2    train/evaluate.py RUN --split val
launch/local.sh -n 2    train/evaluate.py RUN PROBE RUN ... --combine stack --out ENSEMBLE
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from pydantic import BaseModel, ConfigDict, Field

from data_prep.common.atomic_writes import write_json, write_npz
from data_prep.common.command_line import Place, parse
from data_prep.common.errors import BadInput, run_command
from data_prep.shards.folder import ShardFolder
from data_prep.shards.manifest import Manifest
from train.data.bad_samples import Screening
from train.data.image_cache import ImageCaches
from train.data.loader import Stimuli, workers_per_rank
from train.data.recordings import Recordings, used_of
from train.distributed.launch_environment import ranks_on_machine, world_size
from train.distributed.runtime import Runtime, started
from train.evaluation.ensembles import (
    Combine,
    Ensemble,
    check_place,
    data_of,
    is_fine_tuned,
    members_of,
    write_ensembles,
)
from train.evaluation.metrics_report import metrics_report
from train.evaluation.scoring import RecordingScores, check_enough_stimuli, score
from train.finetuning.charts import draw_figures, draw_numbers
from train.finetuning.loop import evaluation_batch_size
from train.models.network import Network
from train.run.checkpoint import Progress, checked_tensors, current, load_progress
from train.run.folder import LEFT_OUT, RunFolder, check_writable, open_run
from train.run.monitor import Board
from train.run.recipe import MOST_RECORDINGS, Loader, Recipe

SHOWN = ("r2", "explained_variance", "mse", "pearson_r", "ceiled_explained_variance", "feve")


class Evaluate(BaseModel):
    """Score a fine-tuned run on a split, or join several runs and probes into an ensemble and score that."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    runs: Annotated[list[Path], tyro.conf.Positional] = Field(min_length=1)
    """Run folder made by train/finetune.py; for an ensemble several, among which may be probes and ensembles."""
    split: Literal["train", "val", "test", "left_out"] = "val"
    """Which stimuli to predict; on a split without responses the predictions alone are written. left_out are the
    training stimuli that the run was not fitted on, its inner split."""
    out: Path | None = None
    """Folder of the ensemble; needed with several runs."""
    combine: Combine = "mean"
    """An ensemble's prediction: the mean over all runs; or a sum whose weights each site learns on left_out."""
    checkpoint: Literal["best", "last"] = "best"
    """Which epoch's weights."""
    data: Annotated[list[Place], Field(min_length=1, max_length=MOST_RECORDINGS)] | None = None
    """Shard folder or its URL; by default the one the run was trained on. Of a run of several recordings those that are
    to be scored; by default all."""
    shard_cache: str | None = None
    """Of remote shards: folder for copies; by default the recipe's."""
    batch_size: int | None = Field(None, ge=1, le=1_000_000)
    """Stimuli per forward pass; by default the recipe's."""
    workers: int | None = Field(None, ge=0, le=256)
    """Decoding processes per rank; by default the recipe's."""
    on_bad_sample: Literal["stop", "skip"] | None = None
    """Whether a stimulus that cannot be read stops the evaluation or is left out, which metrics.json then says; by
    default the recipe's."""


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
    stimuli: Stimuli
    screening: Screening

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
    jobs, caches = [], ImageCaches(recipe.loader, once=True)
    for opened in Recordings(shards).folders:
        where, recording, own = str(opened.folder), None, progress
        if progress.is_of_several:
            recording = opened.manifest.name
            own = progress.of(recording, where)
        own.check_fits(opened.manifest, where)
        split = opened.split("train" if name == LEFT_OUT else name)
        responses = recipe.task.predicts_responses and split.has_responses
        wanted = {"responses": responses, "classes": recipe.task.predicts_classes}
        screening = Screening(recipe.loader)
        usable = screening.usable(split, progress.image_size, **wanted)
        if name == LEFT_OUT:
            usable = np.intersect1d(usable, left_out[opened.manifest.name])
        stimuli = Stimuli(split, progress.image_size, usable, **wanted, caches=caches)
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


def unseen_classes(job: Job) -> int:
    """How many of the scored classes no training stimulus shows: a network cannot name those."""
    if job.stimuli.labels is None:
        return 0
    train = job.shards.split("train")
    usable = Screening(job.recipe.loader).usable(train, None, responses=False, classes=True)
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
        batch_size=job.options.batch_size or evaluation_batch_size(job.recipe),
        workers=workers_per_rank(setting, ranks_on_machine(), os.cpu_count() or 1),
        keep_predictions=True,
        label=f"evaluating {job.split}{f' of {job.recording}' if job.recording else ''}",
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
        metrics["training_stimuli"] = len(used_of(job.shards.split("train"), job.recipe))
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
    if not runtime.leads:
        return
    warn_of_unseen_classes(job)
    target, metrics = write_results(job, scored, runtime.ranks)
    chart(job, scored)
    of = "" if job.recording is None else f"{job.recording}, "
    print(f"{of}{job.split}: {len(job.stimuli):,} stimuli  {shown_scores(metrics)}\nwritten to {target}", flush=True)
    warn_of_bad_samples(job.screening)


def warn_of_bad_samples(screening: Screening) -> None:
    """Say aloud what was left out."""
    for warning in screening.warnings():
        print(warning, file=sys.stderr, flush=True)


def prepare_ensembles(options: Evaluate) -> tuple[list[Job], list[Ensemble]]:
    """What has to be scored for an ensemble, and who is in it: an ensemble for each recording.

    Those are the recordings of --data, by default those of the first run; every member must predict them.

    Raises:
        BadInput: options or members that do not go together.
    """
    if options.out is None:
        raise BadInput("several runs make an ensemble; name its folder with --out")
    if options.split == LEFT_OUT or options.checkpoint != "best":
        raise BadInput("an ensemble is of best checkpoints, on train, val or test; left_out is written beside those")
    if doubled := [run for run in options.runs if options.runs.count(run) > 1]:
        raise BadInput(f"{doubled[0]} is named twice; each run of an ensemble counts once")
    recipes = [open_run(run)[1] if is_fine_tuned(run) else None for run in options.runs]
    jobs: list[Job] = []
    for run, recipe in zip(options.runs, recipes, strict=True):
        if recipe is not None:
            if not recipe.task.predicts_responses:
                raise BadInput(f"{run} predicts no responses; an ensemble joins predictions of those")
            left_out = options.combine == "stack" or recipe.early_stopping.split == "inner"
            for name in (options.split, *([LEFT_OUT] * left_out)):
                jobs += prepare(options, run, name)
    skips = options.on_bad_sample or ("skip" if any(job.screening.skips for job in jobs) else "stop")
    loader = Loader(on_bad_sample=skips, shard_cache=options.shard_cache)
    shards = [ShardFolder(place, loader.fetch) for place in options.data or data_of(options.runs[0])]
    ensembles = [
        Ensemble(members_of(options.runs, recipes, opened.manifest.name), options.combine, opened, Screening(loader))
        for opened in Recordings(shards).folders
    ]
    check_place(options.out, ensembles)
    for ensemble in ensembles:
        ensemble.check_complete(options.split)
    return jobs, ensembles


def join(options: Evaluate, ensembles: Sequence[Ensemble], ranks: int) -> None:
    """Join what the members predicted, write, and say how good it is."""
    found = write_ensembles(options.out, ensembles, options.split, ranks)
    for ensemble, metrics in zip(ensembles, found, strict=True):
        of = f"{ensemble.recording}, " if len(ensembles) > 1 else ""
        print(f"ensemble, {of}{options.split}: {shown_scores(metrics)}", flush=True)
        warn_of_bad_samples(ensemble.screening)
    print(f"written to {options.out}", flush=True)


def main() -> None:
    """Parse, check, score, write."""
    options = parse(Evaluate, args=sys.argv[1:])
    ensembles: list[Ensemble] = []
    if len(options.runs) == 1 and options.out is None:
        if options.combine != "mean":
            raise BadInput("--combine joins several runs; there is one")
        jobs = prepare(options, options.runs[0], options.split)
    else:
        jobs, ensembles = prepare_ensembles(options)
    recipe = jobs[0].recipe if jobs else Recipe()
    with started(None, "fp32", recipe.deterministic, timeouts=recipe.faults.timeouts) as runtime:
        for job in jobs:
            run_one(job, runtime)
        if ensembles and runtime.leads:
            join(options, ensembles, runtime.ranks)


if __name__ == "__main__":
    run_command(main)
