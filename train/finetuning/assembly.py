"""Put a training together: network, optimizer, monitor, and the run's folder."""

import torch

from train.distributed.engine import Engine
from train.distributed.runtime import Runtime
from train.distributed.zero import ZeroEngine
from train.finetuning.ema import RunningAverage
from train.finetuning.introduction import introduce, introduce_readouts
from train.finetuning.layer_balance import balance_layers
from train.finetuning.loop import Training
from train.finetuning.optimizer import build_optimizer
from train.finetuning.preparation import Job
from train.finetuning.resume import StartingPoint
from train.finetuning.ridge_start import start_from_ridge
from train.models.network import Network, parameter_groups
from train.models.readouts import parameter_count
from train.run.monitor import Monitor
from train.run.tensorboard import training_pages


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
        runtime.run_on_main(lambda: job.folder.claim(recipe, job.data, facts))
    monitor, what = Monitor(job.folder, runtime.is_main), (loader, job.selection, job.workers)
    if monitor.tensorboard is not None:
        several = job.recordings.names if len(job.recordings) > 1 else []
        monitor.tensorboard.arrange(
            training_pages(recipe.task.predicts_responses, recipe.task.predicts_classes, several)
        )
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
    options = {"batch_size": recipe.evaluation_batch_size, "workers": job.workers}
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
    options = {"accumulation_steps": job.loader.accumulation_steps, "clip_norm": settings.clip_norm}
    if runtime.deepspeed:
        engine = ZeroEngine(runtime, wrapped, network, optimizer, **options)
    else:
        engine = Engine(runtime, wrapped, network, optimizer, **options, scales_loss=job.recipe.precision == "fp16")
    if job.recipe.compile:
        engine.compile()
    return engine
