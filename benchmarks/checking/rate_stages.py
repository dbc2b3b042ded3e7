"""Stages that measure the rates of train/plan.py: of the machine, and of the recipe that was asked for."""

import json
from pathlib import Path

import psutil
from gpu.deepspeed_ops import deepspeed_for
from harness import number
from synthetic import GIB, training

from checking.machine_rates import decoding_of, made_up_jpeg, measure_machine
from checking.measured_recipe import MeasuredRecipe, parse_measured
from checking.run_rates import measure_features, measure_training
from checking.verdicts import OK, RECIPE_FILE, Verdict, read_verdicts
from data_prep.shards.folder import ShardFolder
from train.distributed.runtime import start_runtime
from train.planning.rates import Decoding
from train.probing.preparation import prepare
from train.run.recipe import Recipe

SECONDS = {True: 5.0, False: 4.0}  # that each speed of the recipe is measured for, on a GPU and without
DECODED = 24  # images
DECODED_SIDE = 224  # pixels, of made-up images
MACHINE, TRAINING, FEATURES = "machine", "training", "features"  # names of the rates among a verdict's values


def measured_recipe(folder: Path) -> MeasuredRecipe | None:
    """The recipe that the check was asked to measure."""
    path = folder / RECIPE_FILE
    return parse_measured(json.loads(path.read_text())) if path.exists() else None


def decoding_here(measured: MeasuredRecipe | None) -> Decoding:
    """The time to decode the images of the recipe's recording, or a made-up one."""
    if measured is None or not measured.data:
        side = DECODED_SIDE if measured is None else measured.recipe.images.size or DECODED_SIDE
        return decoding_of([(made_up_jpeg(), "jpg")], side)
    shards = ShardFolder(measured.data[0], measured.recipe.loader.fetch)
    split = shards.split("train")
    images = [split.image(position) for position in range(min(len(split), DECODED))]
    side = measured.recipe.images.size or shards.manifest.image.side
    return decoding_of([(bytes(data), encoding) for data, encoding in images], side)


def machine_rates(folder: Path) -> list[Verdict]:
    """What this machine reaches, with all processes at work."""
    network = next((line.values for line in read_verdicts(folder) if line.subject == "network"), {})
    bandwidth = network.get("bus bandwidth GB/s")
    with start_runtime(None, "fp32") as runtime:
        # Other machines than the first do not have its verdicts.
        bandwidth = runtime.gather_objects(None if bandwidth is None else 1e9 * bandwidth)[0]
        rates = measure_machine(runtime, folder, decoding_here(measured_recipe(folder)), bandwidth)
    products = rates.products["float32"] / 1e9
    finding = (
        f"each process decodes {number(1 / rates.decoding.seconds)} images/s; products {number(products)} GFLOP/s; "
        f"disk {number(rates.disk_write / 1e6)} MB/s"
    )
    values = {MACHINE: rates.model_dump(), "host GiB": psutil.virtual_memory().total / GIB}
    return [Verdict("rates", OK, finding, values=values)]


def recipe_rates(folder: Path) -> list[Verdict]:
    """How fast the recipe that was asked for trains or probes."""
    measured = measured_recipe(folder)
    if measured is None:
        return []
    if isinstance(measured.recipe, Recipe):
        return [training_rates(measured, measured.recipe, folder)]
    return [probe_rates(measured, folder)]


def training_rates(measured: MeasuredRecipe, recipe: Recipe, folder: Path) -> Verdict:
    """A step, an evaluation and a checkpoint of a recipe."""
    recipe = recipe.model_copy(update={"epochs": 10**6})
    data = measured.data or [folder / "jpegs"]
    with deepspeed_for(measured.strategy), training(recipe, data, folder / "run_recipe") as run:
        recording = " + ".join(part.name for part in run.scoring.fit.recordings) if measured.data else None
        rates = measure_training(run, measured.strategy, recording, SECONDS[run.runtime.on_gpu])
    finding = (
        f"{recipe.backbone.name}, {rates.side} px, {rates.share} images a process: step "
        f"{1000 * rates.step_seconds:.0f} ms, {1000 * rates.decoded_seconds:.0f} ms while images are decoded; first "
        f"step after {rates.start_seconds:.0f} s"
    )
    return Verdict("recipe", OK, finding, values={TRAINING: rates.model_dump()})


def probe_rates(measured: MeasuredRecipe, folder: Path) -> Verdict:
    """The activations of a probe."""
    data: Path | str = measured.data[0] if measured.data else folder / "jpegs"
    recipe = measured.recipe
    assert not isinstance(recipe, Recipe)
    job = prepare(recipe, data, folder / "run_recipe", measured.split, "keep", resume=False)
    with start_runtime(None, "fp32") as runtime:
        recording = job.manifest.name if measured.data else None
        rates = measure_features(job, runtime, folder, recording, SECONDS[runtime.on_gpu])
    finding = (
        f"{recipe.backbone.name}, {rates.side} px, {rates.features:,} features: {number(1 / rates.image_seconds)} "
        f"images/s each; first batch after {rates.start_seconds:.0f} s"
    )
    return Verdict("recipe", OK, finding, values={FEATURES: rates.model_dump()})
