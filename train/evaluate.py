"""Score a fine-tuned run on a split: exact metrics over all ranks, and the predictions. Several runs make an ensemble.

accelerate launch [...] train/evaluate.py RUN --split val
launch/local.sh -n 2    train/evaluate.py RUN --split val
launch/local.sh -n 2    train/evaluate.py RUN PROBE RUN ... --combine stack --out ENSEMBLE
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
from data_prep.remote import FetchSettings
from data_prep.shards import ShardFolder, ShardSplit
from train.checkpoint import Progress, checked_tensors, load_progress
from train.ensemble import Combine, Ensemble, check_place, data_of, is_fine_tuned, members_of, write_ensemble
from train.loader import Stimuli, workers_per_rank
from train.loop import evaluation_batch_size
from train.picture_cache import PictureCaches
from train.preparation import fit_and_inner, used_of
from train.processes import ranks_on_machine, world_size
from train.recipe import Recipe
from train.run_folder import LEFT_OUT, RunFolder, check_writable, open_run, write_json, write_npz
from train.runtime import Runtime, started
from train.scoring import Scored, check_not_empty, report, score
from train.tasks import Network

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
    data: Place | None = None
    """Shard folder or its URL; by default the one the run was trained on."""
    shard_cache: str | None = None
    """Of remote shards: folder for copies; by default the recipe's."""
    batch_size: int | None = Field(None, ge=1)
    """Stimuli per forward pass; by default the recipe's."""
    workers: int | None = Field(None, ge=0)
    """Decoding processes per rank; by default the recipe's."""


@dataclass
class Job:
    """An evaluation that is checked as far as it can be before its processes are joined."""

    options: Evaluate
    split: str
    folder: RunFolder
    recipe: Recipe
    checkpoint: Path
    progress: Progress
    shards: ShardFolder
    stimuli: Stimuli

    @property
    def manifest(self) -> Manifest:
        """Of the shards."""
        return self.shards.manifest


def prepare(options: Evaluate, run: Path, name: str) -> Job:
    """Open run and data and check that they fit together.

    Args:
        options: of the command line.
        run: folder.
        name: of the split.

    Raises:
        BadInput: they do not.
    """
    ranks = world_size()
    folder, recipe = open_run(run)
    check_writable(folder.path)
    checkpoint = folder.checkpoints / options.checkpoint
    progress = load_progress(checkpoint)
    if options.shard_cache is not None:
        recipe.loader.shard_cache = options.shard_cache
    shards = ShardFolder(options.data or folder.data_folder(), recipe.loader.fetch)
    progress.check_fits(shards.manifest, str(shards.folder))
    split = shards.split("train" if name == LEFT_OUT else name)
    classes = recipe.task.predicts_classes
    responses = recipe.task.predicts_responses and split.has_responses
    caches = PictureCaches(recipe.loader, once=True)
    subset = _left_out(split, recipe, run) if name == LEFT_OUT else None
    stimuli = Stimuli(split, progress.image_size, subset, responses=responses, classes=classes, caches=caches)
    check_not_empty(stimuli, ranks, name)
    return Job(options, name, folder, recipe, checkpoint, progress, shards, stimuli)


def _left_out(train: ShardSplit, recipe: Recipe, run: Path) -> np.ndarray:
    """Positions of the training stimuli that a run was not fitted on."""
    if recipe.early_stopping.split != "inner":
        raise BadInput(f"{run} was fitted on all of train (early_stopping.split: val), so it left nothing out")
    return fit_and_inner(train, recipe)[1]


def unseen_classes(job: Job) -> int:
    """How many of the scored classes no training stimulus shows: a network cannot name those."""
    if job.stimuli.labels is None:
        return 0
    return len(np.setdiff1d(job.stimuli.labels, job.shards.split("train").labels()))


def warn_of_unseen_classes(job: Job) -> None:
    """Say so where a division by object leaves nothing to be named right."""
    if unseen := unseen_classes(job):
        shown = len(np.unique(job.stimuli.labels))
        print(
            f"warning: {unseen} of the {shown} classes in {job.split} are not in train, so their pictures "
            "count as wrong by construction; classification needs a division that is not grouped by object",
            file=sys.stderr,
        )


def evaluate(job: Job, runtime: Runtime) -> Scored:
    """Load the network and score the split over all ranks."""
    network = Network(job.recipe.for_evaluation(), job.manifest, job.stimuli.size)
    network.load_state_dict(checked_tensors(network, job.checkpoint, "network"))
    setting = job.recipe.loader.workers if job.options.workers is None else job.options.workers
    return score(
        network.to(runtime.device),
        job.stimuli,
        runtime,
        batch_size=job.options.batch_size or evaluation_batch_size(job.recipe),
        workers=workers_per_rank(setting, ranks_on_machine(), os.cpu_count() or 1),
        keep=True,
        label=f"evaluating {job.split}",
    )


def write_results(job: Job, scored: Scored, ranks: int) -> tuple[Path, dict[str, Any]]:
    """Write predictions.npz and, where there is something to compare with, metrics.json; returns folder and metrics."""
    target = job.folder.evaluation(job.split, job.options.checkpoint)
    if scored.rates is not None:
        arrays = {
            "stimulus_id": np.array(job.stimuli.stimulus_ids),
            "site_id": np.array(job.manifest.site_ids),
            "prediction": scored.rates,
        }
        if job.stimuli.rates is not None:
            arrays["target"] = job.stimuli.rates
        write_npz(target / "predictions.npz", **arrays)
    metrics: dict[str, Any] = {}
    if scored.moments is not None or scored.counts is not None:
        metrics = report(scored, job.stimuli, job.manifest, job.split, ranks)
        metrics |= {"checkpoint": job.options.checkpoint, "epoch": job.progress.epoch, "step": job.progress.step}
        metrics["selected_on"] = [job.progress.selection_split]
        metrics["training_stimuli"] = len(used_of(job.shards.split("train"), job.recipe))
        if unseen := unseen_classes(job):
            metrics["classification"]["classes_not_in_train"] = unseen
        if job.recipe.task.shuffle_responses:
            metrics["control"] = "shuffled responses"
        write_json(target / "metrics.json", metrics)
    return target, metrics


def shown_scores(metrics: dict[str, Any]) -> str:
    """The means over sites for a line of text, those relative to a ceiling included."""
    found = metrics.get("regression", {})
    means = {name: found[name]["mean"] for name in SHOWN if name in found}
    if "classification" in metrics:
        means["top1"] = metrics["classification"]["top1"]
    known = {name: mean for name, mean in means.items() if mean is not None}
    return "  ".join(f"{name} {value:.4f}" for name, value in known.items()) or "no responses to compare with"


def run_one(job: Job, runtime: Runtime) -> None:
    """Score a fine-tuned run, write and say how good it is."""
    scored = evaluate(job, runtime)
    if runtime.leads:
        warn_of_unseen_classes(job)
        target, metrics = write_results(job, scored, runtime.ranks)
        print(f"{job.split}: {len(job.stimuli):,} stimuli  {shown_scores(metrics)}\nwritten to {target}", flush=True)


def prepare_ensemble(options: Evaluate) -> tuple[list[Job], Ensemble, ShardFolder]:
    """What has to be scored for an ensemble, and who is in it.

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
    jobs = []
    for run, recipe in zip(options.runs, recipes, strict=True):
        if recipe is not None:
            if not recipe.task.predicts_responses:
                raise BadInput(f"{run} predicts no responses; an ensemble joins predictions of those")
            left_out = options.combine == "stack" or recipe.early_stopping.split == "inner"
            jobs += [prepare(options, run, name) for name in (options.split, *([LEFT_OUT] * left_out))]
    cache = None if options.shard_cache is None else Path(options.shard_cache).expanduser()
    shards = ShardFolder(options.data or data_of(options.runs[0]), FetchSettings(cache))
    ensemble = Ensemble(members_of(options.runs, recipes), options.combine, shards)
    check_place(options.out, ensemble)
    ensemble.check_complete(options.split)
    return jobs, ensemble, shards


def main() -> None:
    """Parse, check, score, write."""
    options = parse(Evaluate, args=sys.argv[1:])
    if len(options.runs) == 1 and options.out is None:
        if options.combine != "mean":
            raise BadInput("--combine joins several runs; there is one")
        jobs, ensemble = [prepare(options, options.runs[0], options.split)], None
    else:
        jobs, ensemble, shards = prepare_ensemble(options)
    recipe = jobs[0].recipe if jobs else Recipe()
    with started(None, "fp32", recipe.deterministic, timeouts=recipe.faults.timeouts) as runtime:
        for job in jobs:
            run_one(job, runtime)
        if ensemble is not None and runtime.leads:
            metrics = write_ensemble(options.out, ensemble, shards, options.split, runtime.ranks)
            print(f"ensemble, {options.split}: {shown_scores(metrics)}\nwritten to {options.out}", flush=True)


if __name__ == "__main__":
    run_command(main)
