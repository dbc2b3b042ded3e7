"""Fine-tune a vision backbone to predict the responses of a recording's sites.

accelerate launch [...] train/finetune.py [RECIPE.yaml] --data DIR --out RUN [--section.key value ...]
launch/local.sh -n 2    train/finetune.py [RECIPE.yaml] --data DIR --out RUN [--section.key value ...]
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from data_prep.command_line import parse
from data_prep.errors import BadInput, run_command
from data_prep.manifest import Manifest
from data_prep.shards import ShardFolder
from train.augment import KINDS
from train.backbones import check_name
from train.checkpoint import Progress
from train.ema import RunningAverage
from train.loader import Stimuli, TrainLoader, workers_per_rank
from train.loop import Training, evaluation_batch_size
from train.monitor import Monitor
from train.order import inner_split
from train.processes import rank, ranks_on_machine, uses_gpu, world_size
from train.readouts import parameter_count
from train.recipe import Recipe, load_recipe
from train.ridge_start import start_from_ridge
from train.run_folder import RunFolder, open_run
from train.runtime import Runtime, chosen_strategy, fill_deepspeed, started
from train.schedule import build_optimizer
from train.scoring import check_not_empty
from train.tasks import Network, parameter_groups


class Finetune(Recipe):
    """Fine-tune a vision backbone to predict the responses of a recording's sites.

    A recipe (.yaml) as the first word gives the defaults: train/finetune.py [RECIPE.yaml] --data DIR --out RUN ...
    """

    data: Path
    """Shard folder made by data_prep/pack.py."""
    out: Path
    """Run folder to make."""
    resume: bool = False
    """Go on with the run in --out from its last checkpoint."""


def parse_command_line(words: list[str]) -> tuple[Finetune, Recipe]:
    """A command line, whose first word may be a recipe, as options and as the recipe they amount to.

    With --resume and no recipe, the run's own recipe gives the defaults.

    Raises:
        BadInput: anything in it that is unknown, out of bounds or contradictory.
    """
    recipe = None
    if words and words[0].endswith((".yaml", ".yml")):
        recipe, words = load_recipe(Path(words[0])), words[1:]
    options = _parse_flags(words, recipe or Recipe())
    if options.resume and recipe is None:
        options = _parse_flags(words, open_run(options.out)[1])
    recipe = Recipe(**{name: getattr(options, name) for name in Recipe.model_fields})
    recipe.check()
    check_name(recipe.backbone.name)
    return options, recipe


def _parse_flags(words: list[str], defaults: Recipe) -> Finetune:
    missing = dict.fromkeys(("data", "out"), tyro.MISSING)
    return parse(Finetune, args=words, default=Finetune.model_construct(**dict(defaults), **missing, resume=False))


def training_stimuli(shards: ShardFolder, recipe: Recipe) -> tuple[Stimuli, Stimuli]:
    """The stimuli to fit and the stimuli that select, as `early_stopping.split` says."""
    size = recipe.images.size or shards.manifest.image.side
    wanted = {"responses": recipe.task.predicts_responses, "classes": recipe.task.predicts_classes}
    train = shards.split("train")
    if recipe.early_stopping.split == "val":
        return Stimuli(train, size, **wanted), Stimuli(shards.split("val"), size, **wanted)
    key = shards.manifest.group_by
    groups = [str(train.meta(i).get(key)) for i in range(len(train))] if key else train.stimulus_ids
    fit, inner = inner_split(groups, recipe.early_stopping.inner_fraction, recipe.seed)
    return Stimuli(train, size, fit, **wanted), Stimuli(train, size, inner, **wanted)


def check_task(recipe: Recipe, fit: Stimuli, site_ids: list[str]) -> None:
    """Refuse responses that the loss has no meaning for.

    Raises:
        BadInput: negative rates under the Poisson likelihood.
    """
    if recipe.loss.responses != "poisson" or not (fit.rates < 0).any():
        return
    stimulus, site = np.argwhere(fit.rates < 0)[0]
    raise BadInput(
        f"loss.responses: poisson needs raw, non-negative rates, but site {site_ids[site]} has "
        f"{fit.rates[stimulus, site]:.4g} for stimulus {fit.stimulus_ids[stimulus]}: these responses were z-scored or "
        "had a baseline subtracted; use mse, or pack the raw rates"
    )


@dataclass
class Job:
    """A run that is checked as far as it can be before its processes are joined."""

    options: Finetune
    recipe: Recipe
    manifest: Manifest
    folder: RunFolder
    loader: TrainLoader
    selection: Stimuli
    workers: int
    deepspeed: dict[str, Any] | None


def prepare(options: Finetune, recipe: Recipe) -> Job:
    """Open the data and check that recipe, data, folder and processes fit together.

    Raises:
        BadInput: they do not.
    """
    ranks, folder = world_size(), RunFolder(options.out)
    if options.resume:
        folder.check_same(recipe)
    else:
        folder.check_free()
    shards = ShardFolder(options.data)
    fit, selection = training_stimuli(shards, recipe)
    check_not_empty(selection, ranks, recipe.early_stopping.split)
    check_task(recipe, fit, shards.manifest.site_ids)
    if recipe.task.shuffle_responses:
        for stimuli in (fit, selection):
            stimuli.shuffle_responses(recipe.seed)
    workers = workers_per_rank(recipe.loader.workers, ranks_on_machine(), os.cpu_count() or 1)
    loader = TrainLoader(
        fit,
        seed=recipe.seed,
        global_size=recipe.batch.global_size,
        per_device=recipe.batch.per_device,
        rank=rank(),
        ranks=ranks,
        workers=workers,
        pin=uses_gpu(),
        draws=KINDS if recipe.augment.is_on else 0,
    )
    if recipe.loss.responses == "correlation" and loader.pieces > 1:
        raise BadInput(
            "loss.responses: correlation needs each process's share of a global batch in one pass; leave out "
            "batch.per_device, or lower batch.global_size"
        )
    deepspeed = chosen_strategy(recipe.strategy)
    if deepspeed is not None:
        deepspeed = fill_deepspeed(
            deepspeed,
            share=loader.largest_piece,
            pieces=loader.pieces,
            ranks=ranks,
            clip_norm=recipe.optimizer.clip_norm,
        )
    return Job(options, recipe, shards.manifest, folder, loader, selection, workers, deepspeed)


def build(job: Job, runtime: Runtime) -> Training:
    """Make network, optimizer and monitor, and claim the run's folder."""
    recipe, manifest, loader = job.recipe, job.manifest, job.loader
    network = Network(recipe, manifest, loader.stimuli.size).to(runtime.device)
    if not runtime.deepspeed:  # channels-last weights break the flattened views of ZeRO
        network = network.to(memory_format=torch.channels_last)
    ridge_scores = {}
    if recipe.readout.start == "ridge" and not job.options.resume:
        options = {"batch_size": evaluation_batch_size(recipe), "workers": job.workers}
        ridge_scores = start_from_ridge(network, loader.stimuli, runtime, **options)
    average = None if recipe.ema is None else RunningAverage(network, recipe.ema)
    groups = parameter_groups(network, recipe)
    engine = runtime.prepare(
        network,
        build_optimizer(recipe.optimizer, groups, runtime.device),
        pieces=loader.pieces,
        clip_norm=recipe.optimizer.clip_norm,
    )
    if runtime.leads and not job.options.resume:
        job.folder.claim(recipe, job.options.data, {"processes": runtime.describe()})
    monitor = Monitor(job.folder, runtime.leads)
    progress = Progress(
        recording=manifest.fingerprint,
        selection_metric=recipe.selection_metric,
        selection_split=recipe.early_stopping.split,
        site_ids=manifest.site_ids,
        classes=manifest.classes if recipe.task.predicts_classes else None,
        image_size=loader.stimuli.size,
    )
    introduce(job, network, runtime, monitor, ridge_scores)
    return Training(
        recipe, job.folder, runtime, engine, network, average, loader, job.selection, job.workers, monitor, progress
    )


def introduce(job: Job, network: Network, runtime: Runtime, monitor: Monitor, ridge_scores: dict[str, float]) -> None:
    """Say what is trained, on what, and how."""
    manifest, loader, recipe = job.manifest, job.loader, job.recipe
    name = f"{manifest.name} (SIMULATED)" if manifest.simulated else manifest.name
    trained, held = parameter_count(network, trainable_only=True), parameter_count(network)
    monitor.say(
        f"{name}: {len(loader.stimuli):,} stimuli to fit, {len(job.selection):,} of {recipe.early_stopping.split} "
        f"to select the epoch, {len(manifest.sites)} sites, pictures of {loader.stimuli.size} px"
    )
    monitor.say(
        f"{recipe.backbone.name}, weights: {network.backbone.weights_from}; "
        f"{trained:,} of {held:,} parameters are trained"
    )
    for head, module in network.heads.items():
        kind = f"{recipe.readout.kind} readout to the sites" if head == "rates" else "linear readout to the classes"
        start = f", from a ridge (leave-one-out: {ridge_scores[head]:.4f})" if head in ridge_scores else ""
        monitor.say(f"{kind}: {parameter_count(module):,} parameters{start}")
    if recipe.task.shuffle_responses:
        monitor.say("CONTROL: the training responses are shuffled over stimuli; the scores must be at chance")
    if recipe.task.predicts_classes and (unseen := set(job.selection.labels) - set(loader.stimuli.labels)):
        monitor.say(
            f"warning: {len(unseen)} of the classes in {recipe.early_stopping.split} have no stimulus to fit: nothing "
            "can be learned of them (is the split grouped by object?)"
        )
    monitor.say(
        f"{runtime.describe()}, {recipe.precision}; {loader.steps} steps an epoch of {loader.global_size} stimuli, "
        f"in {loader.pieces} micro-batch{'es' * (loader.pieces > 1)} per process"
    )


def main() -> None:
    """Parse, check, build, train, close."""
    job = prepare(*parse_command_line(sys.argv[1:]))
    with started(job.deepspeed, job.recipe.precision, job.recipe.deterministic) as runtime:
        training = build(job, runtime)
        try:
            if job.options.resume:
                training.resume()
            training.run()
        finally:
            training.monitor.close()


if __name__ == "__main__":
    run_command(main)
