"""Every recipe trains and is scored, on a tiny recording."""

import os
import re
import shutil

import numpy as np
import pytest
import timm
import torch
from helpers import ROOT, run_here, succeed_here
from launching import losses, metrics, predictions, weights
from make_sources import make_folder

from data_prep.shards.folder import ShardFolder
from data_prep.shards.packing import pack
from data_prep.sources.folder import Folder
from train.models.network import Network
from train.run.recipe import Recipe, load_recipe

SITES, HELD_OUT, SIZE = 5, 8, 64
RECIPES = [pytest.param(path, id=path.stem) for path in sorted(ROOT.glob("train/recipes/*.yaml"))]
# What makes a network of a family small: it is as deep as it must be for all its layers to be there. The 120 M weights
# of a VGG's classifier would take half a minute.
NARROW = {"vgg": {"mlp_ratio": 1 / 64}}
SHALLOW = {
    "resnet": {"layers": (1, 1, 1, 1)},
    "resnext": {"layers": (1, 1, 1, 1)},
    "densenet": {"block_config": (2, 2, 2, 2)},
}
TINY = {
    "images.size": SIZE,
    "backbone.weights": "random",
    "epochs": 1,
    "batch.global_size": 8,
    "batch.per_device": 8,
    "loader.workers": 0,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """40 stimuli, 24 of them for training."""
    path = tmp_path_factory.mktemp("tiny")
    make_folder(path / "src", n=40, size=48, sites=SITES, splits=True)
    pack(Folder(source=path / "src").open(), path / "shards", stimuli_per_shard=50, workers=1)
    return path / "shards"


def flags(settings: dict) -> list:
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]


def trained(run, data, *words, **settings):
    succeed_here("train/finetune.py", *words, "--data", data, "--out", run, *flags(TINY | settings))
    return run


@pytest.fixture
def small_networks(monkeypatch):
    """Networks with fewer blocks than those of the same name; with --slow, only VGG is smaller than it should be."""
    create, is_slow = timm.create_model, "SPIKETUNE_SLOW" in os.environ
    smaller = NARROW if is_slow else NARROW | SHALLOW

    def create_smaller(name, **options):
        name = name if is_slow else re.sub(r"^tf_efficientnet_b\d$", "tf_efficientnet_b0", name)
        return create(name, **options, **smaller.get(re.match("[a-z]+", name)[0], {}))

    monkeypatch.setattr(timm, "create_model", create_smaller)


@pytest.mark.parametrize("path", RECIPES)
def test_a_recipe_trains_and_is_scored(tiny, tmp_path, small_networks, path):
    run = trained(tmp_path / "run", tiny, path)
    scored = run_here("train/evaluate.py", run)
    assert scored.returncode == 0, scored.stderr
    recipe = load_recipe(path, Recipe).model_dump()
    for name, value in TINY.items():
        section, _, setting = name.rpartition(".")
        (recipe[section] if section else recipe)[setting] = value
    assert load_recipe(run / "recipe.yaml", Recipe).model_dump() == recipe
    assert np.isfinite(losses(run)).tolist() == [True]
    scores = metrics(run)
    assert scores["stimuli"] == HELD_OUT
    assert scores["selected_on"] == ["inner"]
    kind = recipe["task"]["kind"]
    assert ("regression" in scores) == (kind != "classification")
    assert ("classification" in scores) == (kind != "regression")
    if kind != "classification":
        arrays = predictions(run)
        assert arrays["prediction"].shape == (HELD_OUT, SITES)
        assert np.isfinite(arrays["prediction"]).all()
        np.testing.assert_array_equal(arrays["target"], ShardFolder(tiny).split("val").rates())
        assert np.isfinite(scores["regression"]["r2"]["per_site"]).all()
    if kind != "regression":
        assert 0 <= scores["classification"]["top1"] <= scores["classification"]["top5"] <= 1
    shutil.rmtree(run)  # up to 700 MB


# Settings, what the trained parameters' names begin with, and whether BatchNorm's statistics follow the images.
TRAINED = {
    "everything": ({}, ("backbone.", "heads."), True),
    "a cut network": ({"backbone.cut": "layer2.0.conv2", "readout.kind": "gaussian"}, ("backbone.", "heads."), True),
    "batch norm frozen": (
        {"backbone.batch_norm": "frozen", "backbone.gradient_checkpointing": True, "readout.kind": "low_rank"},
        ("backbone.", "heads."),
        False,
    ),
    "the head alone": ({"backbone.trainable": "head"}, ("heads.",), False),
    "two heads alone": (
        {"backbone.trainable": "head", "task.kind": "hybrid", "task.weighting": "uncertainty"},
        ("heads.", "objective.log_variance"),
        False,
    ),
}


@pytest.mark.parametrize("case", TRAINED)
def test_training_changes_all_that_is_trained_and_nothing_else(tiny, tmp_path, case):
    """Gradients reach every parameter that is trained; nothing else changes in a single bit."""
    settings, trained_parts, statistics_follow = TRAINED[case]
    options = {"backbone.name": "test_resnet", "optimizer.weight_decay": 0.0, "precision": "fp32", "epochs": 3}
    switches = [f"--{name.replace('_', '-')}" for name, value in settings.items() if value is True]
    settings = {name: value for name, value in settings.items() if value is not True}
    run = trained(tmp_path / "run", tiny, *switches, **options, **settings)
    network = Network(load_recipe(run / "recipe.yaml", Recipe), ShardFolder(tiny).manifest, SIZE)
    before, after = network.state_dict(), weights(run)
    parameters = {name for name, _ in network.named_parameters()}
    expected = {name for name in parameters if name.startswith(trained_parts)}
    if statistics_follow:
        expected |= {name for name in before if "running_" in name}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    counters = {name for name in before if name.endswith("num_batches_tracked")}
    assert expected
    assert changed - counters == expected
