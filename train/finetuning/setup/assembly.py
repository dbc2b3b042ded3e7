"""Puts a training together: network, optimizer, monitor, and the run's folder."""

from typing import Any

import numpy as np
import torch

from data_prep.shards.image_identity import first_copies
from train.distributed.engine import Engine
from train.distributed.runtime import Runtime
from train.distributed.zero import ZeroEngine
from train.finetuning.ema import RunningAverage
from train.finetuning.loop import Training
from train.finetuning.optimizer import build_optimizer
from train.finetuning.selection_scoring import SelectionScoring
from train.finetuning.setup.agreement import check_agreement
from train.finetuning.setup.introduction import NetworkSize, introduce
from train.finetuning.setup.layer_balance import balance_layers
from train.finetuning.setup.preparation import PreparedRun
from train.finetuning.setup.recipe_checks import check_batch_norm
from train.finetuning.setup.resume import StartingPoint
from train.finetuning.setup.ridge_start import start_from_ridge
from train.finetuning.setup.seen_record import fitted_images, notes_on_seen, record_of_run
from train.models.network import Network, parameter_groups
from train.run.monitor import Monitor
from train.run.tensorboard import training_pages


def build(run: PreparedRun, start: StartingPoint, runtime: Runtime) -> Training:
    """Make network, optimizer and monitor, and claim the run's folder.

    Raises:
        BadInput: the processes disagree on what they are about to do, or the checkpoint is of another network.
    """
    recipe = run.recipe
    check_agreement(run, start.progress, runtime)
    network = build_network(run, runtime, first_weights=start.is_fresh)
    size = NetworkSize.of(network)
    ridge_scores = start_in_closed_form(run, network, runtime) if start.is_fresh else {}
    average = None if recipe.ema is None else RunningAverage(network, recipe.ema)
    start.load_network(network, average, runtime)
    engine = build_engine(run, network, runtime)
    start.load_optimizer(engine)
    if average is not None:
        average.follow(engine)
    facts, seen = run_facts(run, size, runtime), list[str]()
    runtime.run_on_main(lambda: seen.extend(begin_folder(run, start, facts)))
    monitor = Monitor(run.folder, runtime.is_main, recipe.trackers)
    if monitor.trackers is not None:
        pages = training_pages(recipe.task.predicts_responses, recipe.task.predicts_classes, run.recording_names)
        monitor.trackers.arrange(pages)
    compared_on = dict.fromkeys((recipe.early_stopping.split, "val", "test"))
    monitor.describe(recipe, run.targets.manifest.name, list(compared_on), recipe.selection_metric)
    introduce(run, network, size, ridge_scores, runtime, monitor)
    for note in seen:
        monitor.log(note)
    scoring = SelectionScoring(
        network=network,
        average=average,
        fit=run.data.fit,
        selection=run.data.selection,
        runtime=runtime,
        batch_size=recipe.evaluation_batch_size,
        workers=run.workers,
    )
    return Training(
        recipe=recipe,
        folder=run.folder,
        runtime=runtime,
        engine=engine,
        network=network,
        average=average,
        loader=run.loader,
        scoring=scoring,
        monitor=monitor,
        progress=start.progress,
    )


def begin_folder(run: PreparedRun, start: StartingPoint, facts: dict[str, Any]) -> list[str]:
    """Claim the folder of a run that begins, and write what the run fits and selects on; for one process only.

    Returns:
        Notes on images that were seen before, for the log.

    Raises:
        BadInput: a record of seen images does not allow it; then nothing is written.
    """
    record = record_of_run(run, start)
    if not run.resume:
        run.folder.claim(run.recipe, run.locations, facts)
    record.write(run.folder.path)
    return notes_on_seen(run, record)


def build_network(run: PreparedRun, runtime: Runtime, *, first_weights: bool) -> Network:
    """The network of the recipe on this rank's device, with its first weights or with any, to be loaded.

    Raises:
        BadInput: its BatchNorm cannot normalise the smallest micro-batches.
    """
    recipe = run.recipe
    network = Network(recipe if first_weights else recipe.for_checkpoint(), run.targets.manifest, run.data.fit.size)
    if recipe.backbone.batch_norm == "synced" and runtime.ranks > 1:
        network.backbone.sync_batch_norm()
    network.to(runtime.device)
    check_batch_norm(network, run.data.fit.size, run.loader)
    if not runtime.deepspeed:  # channels-last weights break the flattened views of ZeRO
        network.to(memory_format=torch.channels_last)
    if run.targets.site_weights is not None:
        assert network.objective.responses is not None
        network.objective.responses.set_site_weights(run.targets.site_weights)
    return network


def start_in_closed_form(run: PreparedRun, network: Network, runtime: Runtime) -> dict[str, float]:
    """Set what the training stimuli determine before the first step; returns the score of each readout's ridge."""
    recipe, fit, batch_size = run.recipe, run.data.fit, run.recipe.evaluation_batch_size
    if network.backbone.join is not None:
        balance_layers(network.backbone, fit, runtime, batch_size=batch_size, workers=run.workers)
    if recipe.readout.start == "zero":
        return {}
    through_windows = recipe.readout.start == "field"
    copies = runtime.gather_objects(_copies(run) if runtime.is_main else None)[0]
    return start_from_ridge(
        network,
        fit,
        runtime,
        batch_size=batch_size,
        workers=run.workers,
        copies=copies,
        through_windows=through_windows,
    )


def _copies(run: PreparedRun) -> np.ndarray | None:
    """For each stimulus to fit, the position of the first one with the same image; None if all images differ."""
    copies = first_copies(fitted_images(run))
    return None if np.array_equal(copies, np.arange(len(copies))) else copies


def build_engine(run: PreparedRun, network: Network, runtime: Runtime) -> Engine:
    """Network and optimizer as the strategy wraps them."""
    settings, accumulation_steps = run.recipe.optimizer, run.loader.accumulation_steps
    optimizer = build_optimizer(settings, parameter_groups(network, run.recipe), runtime.device)
    wrapped = runtime.wrap(network, optimizer)
    engine: Engine
    if runtime.deepspeed:
        engine = ZeroEngine(
            runtime,
            wrapped,
            network,
            optimizer,
            accumulation_steps=accumulation_steps,
            clip_norm=settings.clip_norm,
        )
    else:
        engine = Engine(
            runtime,
            wrapped,
            network,
            optimizer,
            accumulation_steps=accumulation_steps,
            clip_norm=settings.clip_norm,
            scales_loss=run.recipe.precision == "fp16",
        )
    if run.recipe.compile:
        engine.compile()
    return engine


def run_facts(run: PreparedRun, size: NetworkSize, runtime: Runtime) -> dict[str, Any]:
    """The entries of env.json about processes, network and stimuli."""
    facts: dict[str, Any] = {
        **runtime.facts(),
        "parameters": {"all": size.all, "trained": size.trained},
    }
    if run.recording_names:
        facts["recordings"] = run.recording_names
    return facts | run.data.bad_samples.facts()
