"""Score a fine-tuned run on a split: exact metrics over all ranks, and the predictions.

accelerate launch [...] train/evaluate.py RUN --split val
launch/local.sh -n 2    train/evaluate.py RUN --split val
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from pydantic import BaseModel, ConfigDict, Field

from data_prep.command_line import Place, parse
from data_prep.errors import BadInput, run_command
from data_prep.manifest import Manifest
from data_prep.shards import ShardFolder
from train.checkpoint import Progress, checked_tensors, current, load_progress
from train.loader import Stimuli, workers_per_rank
from train.loop import evaluation_batch_size
from train.monitor import Board
from train.picture_cache import PictureCaches
from train.processes import ranks_on_machine, world_size
from train.recipe import MOST_RECORDINGS, Recipe
from train.recordings import Recordings
from train.run_folder import RunFolder, check_writable, open_run, write_json, write_npz
from train.runtime import Runtime, started
from train.scoring import Scored, check_not_empty, report, score
from train.screening import Screening
from train.tasks import Network
from train.watching import draw_numbers, draw_pictures


class Evaluate(BaseModel):
    """Score a fine-tuned run on a split."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    run: tyro.conf.Positional[Path]
    """Run folder made by train/finetune.py."""
    split: Literal["train", "val", "test"] = "val"
    """Which stimuli to predict; on a split without responses the predictions alone are written."""
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


def prepare(options: Evaluate) -> list[Job]:
    """Open run and data and check that they fit together; one job for each recording.

    Raises:
        BadInput: they do not.
    """
    folder, recipe = open_run(options.run)
    check_writable(folder.path)
    checkpoint = current(folder.checkpoints, options.checkpoint)
    progress = load_progress(checkpoint)
    if options.shard_cache is not None:
        recipe.loader.shard_cache = options.shard_cache
    if options.on_bad_sample is not None:
        recipe.loader.on_bad_sample = options.on_bad_sample
    shards = [ShardFolder(place, recipe.loader.fetch) for place in options.data or folder.data_folders()]
    if len(shards) > 1 and not progress.is_of_several:
        raise BadInput(f"data: {options.run} was trained on one recording; name one shard folder")
    jobs, caches = [], PictureCaches(recipe.loader, once=True)
    for opened in Recordings(shards).folders:
        where, recording, own = str(opened.folder), None, progress
        if progress.is_of_several:
            recording = opened.manifest.name
            own = progress.of(recording, where)
        own.check_fits(opened.manifest, where)
        split = opened.split(options.split)
        responses = recipe.task.predicts_responses and split.has_responses
        wanted = {"responses": responses, "classes": recipe.task.predicts_classes}
        screening = Screening(recipe.loader)
        usable = screening.usable(split, progress.image_size, **wanted)
        stimuli = Stimuli(split, progress.image_size, usable, **wanted, caches=caches)
        check_not_empty(stimuli, world_size(), options.split)
        jobs.append(Job(options, folder, recipe, checkpoint, progress, recording, opened, stimuli, screening))
    return jobs


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
            f"warning: {unseen} of the {shown} classes in {job.options.split} are not in train, so their pictures "
            "count as wrong by construction; classification needs a division that is not grouped by object",
            file=sys.stderr,
        )


def evaluate(job: Job, runtime: Runtime) -> Scored:
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
        keep=True,
        label=f"evaluating {job.options.split}{f' of {job.recording}' if job.recording else ''}",
    )


def predictions(job: Job, scored: Scored) -> dict[str, np.ndarray]:
    """What was predicted, and what is known of it: responses, and where the network names objects, classes."""
    arrays = {"stimulus_id": np.array(job.stimuli.stimulus_ids)}
    if scored.rates is not None:
        arrays |= {"site_id": np.array(job.manifest.site_ids), "prediction": scored.rates}
        arrays |= {} if job.stimuli.rates is None else {"target": job.stimuli.rates}
    if scored.named is not None:
        arrays |= {"class_id": np.array(job.manifest.classes), "predicted_class": scored.named}
        arrays |= {} if job.stimuli.labels is None else {"class": job.stimuli.labels}
    return arrays


def write_results(job: Job, scored: Scored, ranks: int) -> tuple[Path, dict[str, Any]]:
    """Write predictions.npz and, where there is something to compare with, metrics.json; returns folder and metrics."""
    target = job.folder.evaluation(job.options.split, job.options.checkpoint, job.recording)
    write_npz(target / "predictions.npz", **predictions(job, scored))
    metrics: dict[str, Any] = {}
    if scored.moments is not None or scored.counts is not None:
        metrics = report(scored, job.stimuli, job.manifest, job.options.split, ranks)
        metrics |= {"checkpoint": job.options.checkpoint, "epoch": job.progress.epoch, "step": job.progress.step}
        metrics["selected_on"] = [job.progress.selection_split]
        if job.recording is not None:
            metrics["trained_on"] = list(job.progress.recordings)
        metrics |= job.screening.facts()
        if unseen := unseen_classes(job):
            metrics["classification"]["classes_not_in_train"] = unseen
        if job.recipe.task.shuffle_responses:
            metrics["control"] = "shuffled responses"
        write_json(target / "metrics.json", metrics)
    return target, metrics


def chart(job: Job, scored: Scored) -> None:
    """Add the scores, the sites and the stimuli to the run's TensorBoard, at the step that was scored."""
    board = Board(job.folder.tensorboard, lambda message: print(message, file=sys.stderr, flush=True))
    split = job.options.split if job.recording is None else f"{job.options.split}/{job.recording}"
    step = job.progress.step
    board.scalars({f"{split}/{name}": value for name, value in scored.means().items()}, step)
    draw_numbers(board, split, scored, step)
    draw_pictures(board, split, scored, job.stimuli, step)
    board.close()


def shown_scores(scored: Scored, metrics: dict[str, Any]) -> str:
    """The means over sites for a line of text, those relative to a ceiling included."""
    found = metrics.get("regression", {})
    ceiled = {name: found[name]["mean"] for name in ("ceiled_explained_variance", "feve") if name in found}
    means = scored.means() | {name: mean for name, mean in ceiled.items() if mean is not None}
    return "  ".join(f"{name} {value:.4f}" for name, value in means.items()) or "no responses to compare with"


def tell(job: Job, scored: Scored, target: Path, metrics: dict[str, Any]) -> None:
    """Say what was found and where it is."""
    warn_of_unseen_classes(job)
    of = "" if job.recording is None else f"{job.recording}, "
    shown = shown_scores(scored, metrics)
    print(f"{of}{job.options.split}: {len(job.stimuli):,} stimuli  {shown}\nwritten to {target}", flush=True)
    for warning in job.screening.warnings():
        print(warning, file=sys.stderr, flush=True)


def main() -> None:
    """Parse, check, score, write."""
    jobs = prepare(parse(Evaluate, args=sys.argv[1:]))
    recipe = jobs[0].recipe
    with started(None, "fp32", recipe.deterministic, timeouts=recipe.faults.timeouts) as runtime:
        for job in jobs:
            scored = evaluate(job, runtime)
            if runtime.leads:
                target, metrics = write_results(job, scored, runtime.ranks)
                chart(job, scored)
                tell(job, scored, target, metrics)


if __name__ == "__main__":
    run_command(main)
