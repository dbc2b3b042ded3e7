"""Fine-tune a vision backbone to predict the responses of a recording's sites.

accelerate launch [...] train/finetune.py [RECIPE.yaml] --data DIR --out RUN [--section.key value ...]
launch/local.sh -n 2    train/finetune.py [RECIPE.yaml] --data DIR --out RUN [--section.key value ...]
"""

import sys
from pathlib import Path

import torch
import tyro

from data_prep.command_line import parse
from data_prep.errors import run_command
from train.backbones import check_name
from train.checkpoint import Progress
from train.ema import RunningAverage
from train.loop import Training, evaluation_batch_size
from train.monitor import Monitor
from train.preparation import Job, prepare
from train.readouts import parameter_count
from train.recipe import Recipe, leading_recipe
from train.ridge_start import start_from_ridge
from train.run_folder import open_run
from train.runtime import Runtime, started
from train.schedule import build_optimizer
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
    recipe, words = leading_recipe(words, Recipe)
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


def build(job: Job, runtime: Runtime) -> Training:
    """Make network, optimizer and monitor, and claim the run's folder."""
    recipe, manifest, loader = job.recipe, job.manifest, job.loader
    network = Network(recipe if job.begins else recipe.for_checkpoint(), manifest, loader.stimuli.size)
    network = network.to(runtime.device)
    if not job.begins:
        network.backbone.weights_from = "the run's checkpoint"
    if not runtime.deepspeed:  # channels-last weights break the flattened views of ZeRO
        network = network.to(memory_format=torch.channels_last)
    ridge_scores = {}
    if recipe.readout.start == "ridge" and job.begins:
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
    if runtime.leads and not job.resume:
        job.folder.claim(recipe, job.data, {"processes": runtime.describe()})
    monitor = Monitor(job.folder, runtime.leads)
    progress = Progress(
        recording=manifest.fingerprint,
        selection_metric=recipe.selection_metric,
        selection_split=recipe.early_stopping.split,
        site_ids=manifest.site_ids,
        classes=manifest.classes if recipe.task.predicts_classes else None,
        image_size=loader.stimuli.size,
    )
    introduce(job, network, runtime, monitor)
    introduce_readouts(job, network, monitor, ridge_scores)
    return Training(
        recipe, job.folder, runtime, engine, network, average, loader, job.selection, job.workers, monitor, progress
    )


def introduce(job: Job, network: Network, runtime: Runtime, monitor: Monitor) -> None:
    """Say what is trained, on what, and how."""
    manifest, loader, recipe = job.manifest, job.loader, job.recipe
    name = f"{manifest.name} (SIMULATED)" if manifest.simulated else manifest.name
    trained, held = parameter_count(network, trainable_only=True), parameter_count(network)
    monitor.say(
        f"{name}: {len(loader.stimuli):,} stimuli to fit, {len(job.selection):,} of {recipe.early_stopping.split} "
        f"to select the epoch, {len(manifest.sites)} sites, pictures of {loader.stimuli.size} px"
    )
    monitor.say(
        f"{recipe.backbone.name}{f' cut after {recipe.backbone.cut}' if recipe.backbone.cut else ''}, "
        f"weights: {network.backbone.weights_from}; "
        f"{trained:,} of {held:,} parameters are trained"
    )
    monitor.say(
        f"{runtime.describe()}, {recipe.precision}; {loader.steps} steps an epoch of {loader.global_size} stimuli, "
        f"in {loader.pieces} micro-batch{'es' * (loader.pieces > 1)} per process"
    )


def introduce_readouts(job: Job, network: Network, monitor: Monitor, ridge_scores: dict[str, float]) -> None:
    """Say what the readouts are, where they begin, and what to beware of."""
    recipe = job.recipe
    for head, module in network.heads.items():
        kind = f"{recipe.readout.kind} readout to the sites" if head == "rates" else "linear readout to the classes"
        start = f", from a ridge (leave-one-out: {ridge_scores[head]:.4f})" if head in ridge_scores else ""
        monitor.say(f"{kind}: {parameter_count(module):,} parameters{start}")
    if ridge_scores and network.backbone.normalises_by_batch:
        monitor.say(
            "note: the ridge saw features under BatchNorm's own statistics, training normalises by the batch; "
            "backbone.batch_norm frozen keeps what the ridge saw"
        )
    if recipe.task.shuffle_responses:
        monitor.say("CONTROL: the training responses are shuffled over stimuli; the scores must be at chance")
    if recipe.task.predicts_classes and (unseen := set(job.selection.labels) - set(job.loader.stimuli.labels)):
        monitor.say(
            f"warning: {len(unseen)} of the classes in {recipe.early_stopping.split} have no stimulus to fit: nothing "
            "can be learned of them (is the split grouped by object?)"
        )


def main() -> None:
    """Parse, check, build, train, close."""
    options, recipe = parse_command_line(sys.argv[1:])
    job = prepare(recipe, options.data, options.out, options.resume)
    with started(job.deepspeed, job.recipe.precision, job.recipe.deterministic) as runtime:
        training = build(job, runtime)
        try:
            if job.resume:
                training.resume()
            training.run()
        finally:
            training.monitor.close()


if __name__ == "__main__":
    run_command(main)
