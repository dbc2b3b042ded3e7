"""Predict the responses from a frozen network's activations, layer by layer, or from the pixels, by ridge regression.

accelerate launch [...] train/probe.py [RECIPE.yaml] --data DIR --out RUN --layers all
launch/local.sh -n 2    train/probe.py --data DIR --out RUN --layers pixels
"""

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from data_prep.command_line import parse
from data_prep.errors import run_command
from data_prep.manifest import Manifest, to_json_list
from data_prep.shards import ShardFolder
from train.backbones import Backbone, check_name
from train.features import PIXELS, LayerFeatures, choose_layers, extract, pixel_features
from train.gram import Ridge, feature_slice, gram, ridge
from train.loader import Stimuli, workers_per_rank
from train.metrics import SiteMoments, mean_score
from train.monitor import Monitor
from train.processes import ranks_on_machine, world_size
from train.recipe import ProbeRecipe, leading_recipe
from train.run_folder import RunFolder, write_json, write_npz
from train.runtime import Runtime, started
from train.scoring import check_not_empty, regression_block, report_head


class Probe(ProbeRecipe):
    """Predict the responses from a frozen network's activations, or from the pixels, by ridge regression.

    A recipe (.yaml) as the first word gives the defaults: train/probe.py [RECIPE.yaml] --data DIR --out RUN ...
    """

    data: Path
    """Shard folder made by data_prep/pack.py."""
    out: Path
    """Run folder to make."""
    split: Literal["val", "test"] = "val"
    """The stimuli to score; the regression is fitted on train."""


def parse_command_line(words: list[str]) -> tuple[Probe, ProbeRecipe]:
    """A command line, whose first word may be a recipe, as options and as the recipe they amount to."""
    recipe, words = leading_recipe(words, ProbeRecipe)
    missing = dict.fromkeys(("data", "out"), tyro.MISSING)
    options = parse(
        Probe, args=words, default=Probe.model_construct(**dict(recipe or ProbeRecipe()), **missing, split="val")
    )
    recipe = ProbeRecipe(**{name: getattr(options, name) for name in ProbeRecipe.model_fields})
    recipe.check()
    check_name(recipe.backbone.name)
    return options, recipe


@dataclass
class Job:
    """A probe that is checked as far as it can be before its processes are joined."""

    options: Probe
    recipe: ProbeRecipe
    manifest: Manifest
    folder: RunFolder
    train: Stimuli
    held_out: Stimuli
    backbone: Backbone | None
    layers: list[str]
    workers: int


def prepare(options: Probe, recipe: ProbeRecipe) -> Job:
    """Open data and network and check that everything fits together.

    Raises:
        BadInput: it does not.
    """
    ranks, folder = world_size(), RunFolder(options.out)
    folder.check_free()
    shards = ShardFolder(options.data)
    size = recipe.images.size or shards.manifest.image.side
    train, held_out = Stimuli(shards.split("train"), size), Stimuli(shards.split(options.split), size)
    check_not_empty(held_out, ranks, options.split)
    workers = workers_per_rank(recipe.loader.workers, ranks_on_machine(), os.cpu_count() or 1)
    backbone, layers = None, [PIXELS]
    if recipe.layers != [PIXELS]:
        torch.manual_seed(recipe.seed)
        backbone = Backbone(recipe.backbone, size).eval()
        layers = choose_layers(backbone.net, recipe.layers)
    return Job(options, recipe, shards.manifest, folder, train, held_out, backbone, layers, workers)


def probe(job: Job, runtime: Runtime, monitor: Monitor) -> dict[str, Ridge]:
    """Fit every layer: each rank extracts its share of the stimuli and solves its share of the layers."""
    look = pixel_features
    if job.backbone is not None:
        backbone = job.backbone.to(runtime.device, memory_format=torch.channels_last)
        look = LayerFeatures(backbone, job.layers, job.recipe.pool)
    features = {
        name: extract(
            look,
            stimuli,
            runtime,
            batch_size=job.recipe.batch_size,
            workers=job.workers,
            label=f"activations of {name}",
        )
        for name, stimuli in (("train", job.train), ("held-out", job.held_out))
    }
    kernels = {}
    for number, layer in enumerate(job.layers):
        train, held_out = features["train"].pop(layer), features["held-out"].pop(layer)
        monitor.say(f"{layer}: {train.shape[1]:,} features")
        kernel = gram(
            feature_slice(train, runtime, len(job.train)),
            feature_slice(held_out, runtime, len(job.held_out)),
            runtime,
            owner=number % runtime.ranks,
        )
        if kernel is not None:
            kernels[layer] = kernel
    solved = {layer: ridge(kernel, job.train.rates) for layer, kernel in kernels.items()}
    everyones = {layer: found for part in runtime.gather_objects(solved) for layer, found in part.items()}
    return {layer: everyones[layer] for layer in job.layers}


def results(job: Job, found: dict[str, Ridge], ranks: int) -> tuple[dict[str, Any], np.ndarray]:
    """The content of metrics.json, and the predictions of the layer that did best on the train stimuli left out."""
    inner = {layer: mean_score(fit.inner_r2) for layer, fit in found.items()}
    chosen = max(inner, key=lambda layer: np.nan_to_num(inner[layer], nan=-np.inf))
    layers = {
        layer: _layer_report(job, fit) | {"inner_r2": to_json_list([inner[layer]])[0]} for layer, fit in found.items()
    }
    metrics = report_head(job.held_out, job.manifest, job.options.split, ranks) | {
        "regression": layers[chosen]["regression"],
        "layers": layers,
        "chosen": chosen,
        "selected_on": ["train, leave-one-out"],
    }
    return metrics, found[chosen].prediction


def _layer_report(job: Job, fit: Ridge) -> dict[str, Any]:
    moments = SiteMoments(fit.prediction.shape[1])
    moments.add(torch.from_numpy(fit.prediction), torch.from_numpy(job.held_out.rates))
    block = regression_block(moments.state, fit.prediction, job.held_out.rates, job.manifest)
    return {"regression": block, "penalty": to_json_list(fit.penalty)}


def write_results(job: Job, metrics: dict[str, Any], prediction: np.ndarray) -> None:
    """Write metrics.json and predictions.npz."""
    target = job.folder.evaluation(job.options.split)
    write_npz(
        target / "predictions.npz",
        stimulus_id=np.array(job.held_out.stimulus_ids),
        site_id=np.array(job.manifest.site_ids),
        prediction=prediction,
        target=job.held_out.rates,
    )
    write_json(target / "metrics.json", metrics)


def describe(metrics: dict[str, Any]) -> str:
    """The scores of all layers, for the terminal."""
    lines = [f"{'layer':<24} {'R2':>8} {'inner R2':>9}"]
    for layer, block in metrics["layers"].items():
        mark = "  * chosen by inner R2" if layer == metrics["chosen"] else ""
        r2, inner = (math.nan if x is None else x for x in (block["regression"]["r2"]["mean"], block["inner_r2"]))
        lines.append(f"{layer:<24} {r2:8.4f} {inner:9.4f}{mark}")
    return "\n".join(lines)


def main() -> None:
    """Parse, check, extract, fit, write."""
    job = prepare(*parse_command_line(sys.argv[1:]))
    with started(None, "fp32") as runtime:
        if runtime.leads:
            job.folder.claim(job.recipe, job.options.data, {"processes": runtime.describe()})
        monitor = Monitor(job.folder, runtime.leads)
        try:
            found = probe(job, runtime, monitor)
            if runtime.leads:
                metrics, prediction = results(job, found, runtime.ranks)
                write_results(job, metrics, prediction)
                monitor.say(describe(metrics))
            runtime.barrier()
        finally:
            monitor.close()


if __name__ == "__main__":
    run_command(main)
