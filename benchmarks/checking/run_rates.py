"""How fast a recipe trains or probes on these processes, measured on its own stimuli or on made-up ones."""

import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice, repeat
from pathlib import Path

import torch
from synthetic import finish
from training_speed import WARM_UP, of_all_ranks, seconds_for

from checking.verdicts import BEGAN
from train.data.batches import Batch
from train.data.combined_stimuli import combine_recordings
from train.data.image_cache import ImageCaches
from train.data.recordings import combined_manifest
from train.data.stimuli import RecordingStimuli, StimulusSet
from train.data.worker_limits import PREFETCHED
from train.distributed.runtime import Runtime
from train.finetuning.checkpointing import CheckpointWriter
from train.finetuning.loop import Training
from train.planning.operations import probed_network, speed_settings, training_flops
from train.planning.rates import FeatureRates, TrainingRates
from train.probing.preparation import ProbeJob
from train.regression.activations import activation_batches
from train.regression.feature_store import FeatureStore

LEAST_TIMED = 3  # steps
MOST_PASSES = 5  # over the stimuli of a probe, each of which starts decoding processes
MOST_STORED = 2**30  # bytes of activations


def since_start() -> float:
    """Seconds since this process was started, before Python began."""
    return time.time() - float(os.environ[BEGAN])


def resident_share(run: Training, micros: Sequence[Batch]) -> list[Batch]:
    """This rank's share of a global batch, kept on the device.

    What the loop reads on the host stays there; reading it from a GPU would make every step wait.
    """
    device = run.runtime.device
    return [replace(micro.to(device), positions=micro.positions, weight=micro.weight) for micro in micros]


def timed_steps(run: Training, batches: Iterator[list[Batch]], skipped: int, available: int, seconds: float) -> float:
    """Seconds of a step of the slowest rank, over about `seconds`; all ranks take the same steps.

    Where a step takes seconds, fewer are skipped and timed.

    Args:
        run: that takes the steps.
        batches: of which the first `skipped` are not timed.
        skipped: steps to warm up, in which what was read ahead is used up.
        available: number of batches.
        seconds: to measure.
    """
    step, left = slowest_step(run, batches, 1), available - 1
    skipped = max(min(skipped - 1, math.ceil(seconds / step), left - LEAST_TIMED), 0)
    if skipped:
        step = slowest_step(run, batches, skipped)
        left -= skipped
    timed = min(math.ceil(seconds / step), left)
    return slowest_step(run, batches, timed) if timed > 0 else step


def slowest_step(run: Training, batches: Iterator[list[Batch]], steps: int) -> float:
    """Seconds of a step, over some steps; those of the slowest rank."""
    return max(of_all_ranks(run, seconds_for(run, islice(batches, steps))[0] / steps))


def measure_training(run: Training, strategy: str, recording: str | None, seconds: float) -> TrainingRates:
    """Measure a training before its first step.

    Args:
        run: as `synthetic.training` builds it.
        strategy: its name.
        recording: name of the user's recording; None for a made-up one.
        seconds: to measure each speed.
    """
    loader, runtime, recipe = run.loader, run.runtime, run.recipe
    workers, steps = run.scoring.workers, loader.steps
    ahead = 1 + PREFETCHED * workers
    began = time.perf_counter()
    epoch = iter(loader.epoch(0))
    first = next(epoch)
    seconds_for(run, [first])
    first_step = max(of_all_ranks(run, time.perf_counter() - began))
    started = max(of_all_ranks(run, since_start()))
    fixed = resident_share(run, first)
    step = timed_steps(run, repeat(fixed), WARM_UP, 10**9, seconds)
    decoded = timed_steps(run, epoch, ahead, steps - 1, seconds) if steps > 1 else step
    cached = None
    if recipe.loader.cache != "off" and recipe.loader.engine == "indexed":
        taken = min(steps, run.progress.step)
        cached = timed_steps(run, iter(loader.epoch(0)), ahead, taken, seconds)
    evaluation = measure_evaluation(run, fixed)
    parameters = list(run.network.parameters())
    manifest = combined_manifest([part.split.manifest for part in run.scoring.fit.recordings])
    return TrainingRates(
        settings=speed_settings(recipe, run.scoring.fit.size),
        processes=runtime.ranks,
        machines=len(set(runtime.hosts)),
        side=run.scoring.fit.size,
        image_bytes=image_bytes_of(run.scoring.fit),
        flops=training_flops(recipe, manifest),
        workers=workers,
        start_seconds=started,
        first_step_seconds=first_step,
        recording=recording,
        strategy=strategy,
        share=-(-loader.global_size // runtime.ranks),
        micro_batches=loader.accumulation_steps,
        weights=sum(map(bytes_of, parameters)),
        trainable=sum(bytes_of(parameter) for parameter in parameters if parameter.requires_grad),
        step_seconds=step,
        decoded_seconds=max(decoded, step),
        cached_seconds=None if cached is None else max(cached, step),
        **evaluation,
        **measure_checkpoint(run),
    )


def bytes_of(parameter: torch.nn.Parameter) -> int:
    """Of all of a parameter, of which ZeRO-3 leaves a part on each rank."""
    return parameter.element_size() * getattr(parameter, "ds_numel", parameter.numel())


def image_bytes_of(stimuli: StimulusSet) -> float:
    """Mean size of the first encoded images of a recording, in bytes."""
    recording = stimuli.recordings[0]
    sizes = [len(recording.split.image(int(position))[0]) for position in recording.subset[:32]]
    return sum(sizes) / len(sizes)


def measure_evaluation(run: Training, fixed: list[Batch]) -> dict[str, float]:
    """The seconds of a batch of an evaluation, and what an evaluation takes besides."""
    scoring, runtime = run.scoring, run.runtime
    size, network = scoring.batch_size, run.scoring.network
    images = torch.cat([micro.images for micro in fixed])
    images = images.repeat(-(-size // len(images)), 1, 1, 1)[:size].contiguous(memory_format=torch.channels_last)
    network.eval()
    with torch.no_grad():
        network(images)
        took = []
        for _ in range(3):
            finish(runtime.device)
            started = time.perf_counter()
            network(images)
            finish(runtime.device)
            took.append(time.perf_counter() - started)
    network.train()
    batch_seconds = max(of_all_ranks(run, sorted(took)[1]))
    few = first_stimuli(run, runtime.ranks * size)
    batches = -(-len(few) // (runtime.ranks * size))
    of_few = replace(scoring, selection=few)
    of_few.scores()  # decodes, and caches where images are cached
    started = time.perf_counter()
    of_few.scores()
    whole = max(of_all_ranks(run, time.perf_counter() - started))
    return {
        "evaluation_batch": size,
        "evaluation_batch_seconds": batch_seconds,
        "evaluation_seconds": max(whole - batches * batch_seconds, 0.0),
    }


def first_stimuli(run: Training, count: int) -> StimulusSet:
    """The first stimuli of those that select, of each recording."""
    recipe = run.recipe
    caches = ImageCaches(recipe.loader)
    parts = [
        RecordingStimuli(
            part.split,
            part.size,
            part.subset[: max(count, run.runtime.ranks)],
            responses=recipe.task.predicts_responses,
            classes=recipe.task.predicts_classes,
            caches=caches,
            columns=part.columns,
        )
        for part in run.scoring.selection.recordings
    ]
    return combine_recordings(parts, recipe.mix)


def measure_checkpoint(run: Training) -> dict[str, float]:
    """The seconds and bytes of a checkpoint, the second of two."""
    writer = CheckpointWriter(run.folder.checkpoints, 1, run.engine, run.network, run.average, run.runtime)
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        writer.save(run.progress)
        seconds.append(time.perf_counter() - started)
        run.progress.step += 1
    files = [file for file in (run.folder.checkpoints / "last").resolve().rglob("*") if file.is_file()]
    return {
        "checkpoint_seconds": max(of_all_ranks(run, seconds[-1])),
        "checkpoint_bytes": max(sum(file.stat().st_size for file in files), 1),
    }


def measure_features(
    job: ProbeJob, runtime: Runtime, folder: Path, recording: str | None, seconds: float
) -> FeatureRates:
    """Measure the activations of a probe: decoded, computed, and written.

    Args:
        job: prepared.
        runtime: this process.
        folder: for the activations.
        recording: name of the user's recording; None for a made-up one.
        seconds: to measure.
    """
    recipe, stimuli = job.recipe, job.splits["train"]
    job.extractor.to(runtime.device)
    image = torch.zeros(1, 3, stimuli.size, stimuli.size, dtype=torch.uint8, device=runtime.device)
    with torch.no_grad():
        widths = {name: features.shape[1] for name, features in job.extractor(image).items()}
    store = FeatureStore(folder / f"features_{runtime.rank}", widths)
    store.truncate(0)
    activations = measure_activations(job, runtime, store, seconds)
    store.truncate(0)
    forward = forward_seconds(job, runtime, recipe.batch_size, stimuli.size)
    own = activations | {"forward": forward}
    slowest = {name: max(of_rank[name] for of_rank in runtime.gather_objects(own)) for name in own}
    network = probed_network(recipe, stimuli.size)
    return FeatureRates(
        settings=speed_settings(recipe, stimuli.size),
        processes=runtime.ranks,
        machines=len(set(runtime.hosts)),
        side=stimuli.size,
        image_bytes=image_bytes_of(stimuli),
        flops=max(network.flops, 1.0),
        workers=job.workers,
        start_seconds=slowest["started"],
        recording=recording,
        features=network.features,
        image_seconds=max(slowest["image"], slowest["forward"]),
        forward_seconds=slowest["forward"],
    )


def measure_activations(job: ProbeJob, runtime: Runtime, store: FeatureStore, seconds: float) -> dict[str, float]:
    """When this process's first batch was stored, and the seconds of an image, in passes over the training stimuli.

    The start of decoding processes, and what they read ahead, is not counted.
    """
    stimuli, size = job.splits["train"], job.recipe.batch_size
    batches = -(-len(stimuli) // (runtime.ranks * size))
    ahead = min(1 + PREFETCHED * job.workers, batches // 2)
    started, images, took = math.inf, 0, 0.0
    for _ in range(MOST_PASSES):
        read = activation_batches(
            job.extractor, stimuli, runtime, batch_size=size, workers=job.workers, label="activations"
        )
        stored = stored_batches(store, read)
        began = time.perf_counter()
        for _ in islice(stored, ahead):
            started = min(started, since_start())
            began = time.perf_counter()
        for rows in stored:
            images += rows
            if took + time.perf_counter() - began > seconds:
                break
        took += time.perf_counter() - began
        started = min(started, since_start())
        if took >= seconds:
            break
    return {"started": started, "image": took / max(images, 1)}


def stored_batches(store: FeatureStore, read: Iterator[dict[str, torch.Tensor]]) -> Iterator[int]:
    """The stimuli of each batch, once it is stored; the store starts again before it is too large."""
    kept = 0
    for features in read:
        size = sum(rows.nbytes for rows in features.values())
        if kept + size > MOST_STORED:
            store.truncate(0)
            kept = 0
        store.append(features)
        kept += size
        yield len(next(iter(features.values())))


def forward_seconds(job: ProbeJob, runtime: Runtime, batch: int, side: int) -> float:
    """Seconds of the network for an image, in a batch that is on the device."""
    images = torch.zeros(batch, 3, side, side, dtype=torch.uint8, device=runtime.device)
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        job.extractor(images)
        finish(runtime.device)
        started = time.perf_counter()
        job.extractor(images)
        finish(runtime.device)
    return (time.perf_counter() - started) / batch
