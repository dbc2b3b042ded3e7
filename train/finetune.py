"""Fine-tune a vision backbone to predict the responses of a recording's sites.

accelerate launch [...] train/finetune.py [RECIPE.yaml] --data DIR --out RUN [--section.key value ...]
launch/local.sh -n 2    train/finetune.py [RECIPE.yaml] --data DIR --out RUN [--section.key value ...]
"""

import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated

import torch
import tyro
from pydantic import Field

from data_prep.common.command_line import Place, parse
from data_prep.common.errors import run_command
from train.distributed.engine import Engine
from train.distributed.runtime import Runtime, started
from train.distributed.zero import ZeroEngine
from train.finetuning.ema import RunningAverage
from train.finetuning.layer_balance import balance_layers
from train.finetuning.loop import Training, evaluation_batch_size
from train.finetuning.preparation import Job, prepare
from train.finetuning.resume import StartingPoint, starting_point
from train.finetuning.ridge_start import start_from_ridge
from train.finetuning.schedule import build_optimizer
from train.models.backbone import check_name
from train.models.network import Network, parameter_groups
from train.models.readouts import parameter_count
from train.run.folder import begun_by_this_job, open_run
from train.run.monitor import Monitor, layout
from train.run.recipe import MOST_RECORDINGS, Recipe, leading_recipe


class Finetune(Recipe):
    """Fine-tune a vision backbone to predict the responses of a recording's sites.

    A recipe (.yaml) as the first word gives the defaults: train/finetune.py [RECIPE.yaml] --data DIR --out RUN ...
    """

    data: Annotated[list[Place], Field(min_length=1, max_length=MOST_RECORDINGS)]
    """Shard folder made by data_prep/pack.py, or its URL (https://, s3://, gs://, hf://, ...); several train one
    backbone on several recordings, with a readout for each."""
    out: Path
    """Run folder to make."""
    resume: bool = False
    """Go on with the run in --out from its last checkpoint; a job that is started again (SPIKETUNE_JOB) does so."""


def parse_command_line(words: list[str]) -> tuple[Finetune, Recipe]:
    """A command line, whose first word may be a recipe, as options and as the recipe they amount to.

    With --resume and no recipe, the run's own recipe gives the defaults.

    Raises:
        BadInput: anything in it that is unknown, out of bounds or contradictory.
    """
    recipe, words = leading_recipe(words, Recipe)
    options = _parse_flags(words, recipe or Recipe(data="" if "--resume" in words else None))
    resume = options.resume or begun_by_this_job(options.out)
    if resume and recipe is None:
        options = _parse_flags(words, open_run(options.out)[1])
    options.resume = resume
    recipe = Recipe(**{name: getattr(options, name) for name in Recipe.model_fields})
    recipe.check()
    check_name(recipe.backbone.name)
    return options, recipe


def _parse_flags(words: list[str], defaults: Recipe) -> Finetune:
    missing = {"data": defaults.places or tyro.MISSING, "out": tyro.MISSING}
    return parse(Finetune, args=words, default=Finetune.model_construct(**(dict(defaults) | missing), resume=False))


def build(job: Job, start: StartingPoint, runtime: Runtime) -> Training:
    """Make network, optimizer and monitor, and claim the run's folder."""
    recipe, loader, begins = job.recipe, job.loader, start.begins
    network = build_network(job, runtime, begins)
    size = {"all": parameter_count(network), "trained": parameter_count(network, trainable_only=True)}
    if job.site_weights is not None:
        network.objective.responses.weigh(job.site_weights)
    ridge_scores = start_in_closed_form(job, network, runtime) if begins else {}
    average = None if recipe.ema is None else RunningAverage(network, recipe.ema)
    if not begins:
        start.load_network(network, average, runtime)
    engine = build_engine(job, network, runtime)
    if not begins:
        start.load_optimizer(engine)
    if average is not None:
        average.follow(engine)
    if not job.resume:
        several = {"recordings": job.recordings.names} if len(job.recordings) > 1 else {}
        facts = {"processes": runtime.describe(), "parameters": size} | several | job.facts
        runtime.lead(lambda: job.folder.claim(recipe, job.data, facts))
    monitor, what = Monitor(job.folder, runtime.leads), (loader, job.selection, job.workers)
    if monitor.board is not None:
        several = job.recordings.names if len(job.recordings) > 1 else []
        monitor.board.lay_out(layout(recipe.task.predicts_responses, recipe.task.predicts_classes, several))
    introduce(job, network, size, runtime, monitor)
    introduce_readouts(job, network, monitor, ridge_scores)
    return Training(recipe, job.folder, runtime, engine, network, average, *what, monitor, start.progress)


def build_network(job: Job, runtime: Runtime, begins: bool) -> Network:
    """The network of the recipe on this rank's device; with its first weights where the run begins."""
    recipe = job.recipe
    network = Network(recipe if begins else recipe.for_checkpoint(), job.manifest, job.loader.stimuli.size)
    if recipe.backbone.batch_norm == "synced" and runtime.ranks > 1:
        network.backbone.sync_batch_norm()
    if runtime.deepspeed:  # channels-last weights break the flattened views of ZeRO
        return network.to(runtime.device)
    return network.to(runtime.device, memory_format=torch.channels_last)


def start_in_closed_form(job: Job, network: Network, runtime: Runtime) -> dict[str, float]:
    """Set what the stimuli to fit decide before the first step; returns the scores of the readouts' ridges."""
    recipe, stimuli = job.recipe, job.loader.stimuli
    options = {"batch_size": evaluation_batch_size(recipe), "workers": job.workers}
    if network.backbone.join is not None:
        balance_layers(network.backbone, stimuli, runtime, **options)
    if recipe.readout.start == "zero":
        return {}
    return start_from_ridge(network, stimuli, runtime, **options, fields=recipe.readout.start == "field")


def build_engine(job: Job, network: Network, runtime: Runtime) -> Engine:
    """The optimizer, and both as the strategy wraps them."""
    settings = job.recipe.optimizer
    optimizer = build_optimizer(settings, parameter_groups(network, job.recipe), runtime.device)
    wrapped = runtime.wrap(network, optimizer)
    options = {"pieces": job.loader.pieces, "clip_norm": settings.clip_norm}
    if runtime.deepspeed:
        engine = ZeroEngine(runtime, wrapped, network, optimizer, **options)
    else:
        engine = Engine(runtime, wrapped, network, optimizer, **options, scales_loss=job.recipe.precision == "fp16")
    if job.recipe.compile:
        engine.compile()
    return engine


def introduce(job: Job, network: Network, size: dict[str, int], runtime: Runtime, monitor: Monitor) -> None:
    """Say what is trained, on what, and how."""
    manifest, loader, recipe = job.manifest, job.loader, job.recipe
    name = f"{manifest.name} (SIMULATED)" if manifest.simulated else manifest.name
    monitor.say(
        f"{name}: {len(loader.stimuli):,} stimuli to fit, {len(job.selection):,} of {recipe.early_stopping.split} "
        f"to select the epoch, {len(manifest.sites)} sites, images of {loader.stimuli.size} px"
    )
    introduce_recordings(job, monitor)
    if recipe.loader.engine == "webdataset":
        monitor.say(
            f"loader.engine webdataset: images stream from {len(loader.stimuli.split.shards)} tars that are drawn "
            "with replacement, so an epoch is a number of steps and not every stimulus once"
        )
    monitor.say(
        f"{recipe.backbone.name}{f' cut after {recipe.backbone.cut}' if recipe.backbone.cut else ''}, "
        f"weights: {network.backbone.weights_from}; "
        f"{size['trained']:,} of {size['all']:,} parameters are trained"
    )
    monitor.say(
        f"{runtime.describe()}, {recipe.precision}; {loader.steps} steps an epoch of {loader.global_size} stimuli, "
        f"in {loader.pieces} micro-batch{'es' * (loader.pieces > 1)} per process"
    )


def introduce_recordings(job: Job, monitor: Monitor) -> None:
    """Say what several recordings have of their own, and how a step mixes them."""
    if len(job.recordings) == 1:
        return
    for fit, selection in zip(job.loader.stimuli.parts, job.selection.parts, strict=True):
        sites = len(fit.split.manifest.sites)
        monitor.say(f"  {fit.recording}: {len(fit):,} to fit, {len(selection):,} to select, {sites} sites")
    mixes = {
        "proportional": "every stimulus once an epoch; the loss is the mean over all recorded responses",
        "equal": "equally many stimuli of each in a step; the loss is the mean over recordings",
    }
    monitor.say(f"mix {job.recipe.mix}: {mixes[job.recipe.mix]}; the best epoch is that of the mean over recordings")


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
    for remark in job.remarks:
        monitor.say(remark)
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
    recipe = job.recipe
    settings = (job.deepspeed, recipe.precision, recipe.deterministic)
    with started(*settings, timeouts=recipe.faults.timeouts) as runtime, closing(job.folder):
        if job.resume:
            runtime.lead(job.folder.hold)
        start = starting_point(job, runtime)
        training = build(job, start, runtime)
        with closing(training.monitor), job.folder.keeping_failures(runtime.rank):
            if job.resume:
                training.go_on(start)
            training.run()


if __name__ == "__main__":
    run_command(main)
