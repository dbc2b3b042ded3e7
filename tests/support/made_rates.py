"""Rates as launch/check.sh would have measured them, in round numbers."""

from typing import Any

from train.planning.operations import speed_settings
from train.planning.rates import FeatureRates, MachineRates, Place, Rates, TrainingRates
from train.run.recipe import ProbeRecipe, Recipe

SIDE, SHARE = 64, 16
PLACE = {
    "when": "2026-01-01 12:00",
    "hosts": ["node1"],
    "device": "H100",
    "device_bytes": 80 * 2**30,
    "host_bytes": 64 * 2**30,
    "processes": 2,
    "machines": 1,
    "cores": 8,
    "versions": {"torch": "2.15.0"},
    "launch_seconds": 5.0,
    "end_seconds": 2.0,
}
ON_CPU = {"device": "CPU", "device_bytes": None, "cores": 1}
MACHINE = {
    "decoding": {"seconds": 1e-3, "bytes": 20_000, "side": SIDE},
    "disk_write": 1e8,
    "page_write": 1e9,
    "disk_read": 2e8,
    "column_read": 1e9,
    "bandwidth": 1e9,
    "products": {"float32": 1e11, "float64": 5e10, "tf32": 2e11, "bf16": 4e11},
    "decompositions": [{"stimuli": 500, "seconds": 0.1}, {"stimuli": 1000, "seconds": 0.8}],
    "multiplication": 1e11,
    "passes": 1e10,
    "bootstrap_site": 1e-3,
    "bootstrap_response": 1e-6,
    "similarity": 1e-7,
    "figure": 1.5,
}


def _made_run(recipe: Recipe | ProbeRecipe) -> dict[str, Any]:
    """What is measured of a training and of a probe."""
    return {
        "settings": speed_settings(recipe, SIDE),
        "processes": 2,
        "machines": 1,
        "side": SIDE,
        "image_bytes": 20_000,
        "flops": 1e9,
        "start_seconds": 20.0,
        "recording": "mine",
    }


def made_training(recipe: Recipe, **changed: Any) -> TrainingRates:
    """A measured training of two processes: steps of 0.1 s, of which 0.01 s exchange 10 MB."""
    measured = _made_run(recipe) | {
        "workers": 7,
        "strategy": "ddp",
        "share": SHARE,
        "micro_batches": 1,
        "weights": 1e7,
        "trainable": 1e7,
        "first_step_seconds": 3.12,
        "step_seconds": 0.1,
        "decoded_seconds": 0.12,
        "cached_seconds": 0.101,
        "evaluation_batch": 32,
        "evaluation_batch_seconds": 0.05,
        "evaluation_seconds": 0.3,
        "checkpoint_seconds": 0.5,
        "checkpoint_bytes": 3e7,
    }
    return TrainingRates(**measured | changed)


def made_features(recipe: ProbeRecipe, **changed: Any) -> FeatureRates:
    """A measured probe of two processes: 10 ms for an image, of which 8 in the network."""
    measured = _made_run(recipe) | {
        "workers": 0,
        "features": 10_000,
        "image_seconds": 0.01,
        "forward_seconds": 0.008,
    }
    return FeatureRates(**measured | changed)


def made_rates(
    training: list[TrainingRates] | None = None, features: list[FeatureRates] | None = None, **place: Any
) -> Rates:
    """A file of rates; `place` changes where they were measured."""
    return Rates(
        place=Place(**PLACE | place),
        machine=MachineRates(**MACHINE),
        training=training or [],
        features=features or [],
    )
