"""A new recording is read together with maps of what the sites of others read."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import assert_refused, run_here, slow, succeed_here
from launching import metrics, predictions, succeed_on
from make_sources import make_folder
from safetensors.torch import load_file, save_file
from sklearn.linear_model import RidgeCV

import spiketune
from data_prep.shards.folder import ShardFolder
from data_prep.shards.packing import pack
from data_prep.sources.folder import Folder
from train.data.seen import FITTED, record_of
from train.data.stimuli import RecordingStimuli
from train.models.backbone import Backbone
from train.models.features import LayerFeatures
from train.models.population import POPULATION_FILE, SHARE
from train.models.saved_probe import SAVED_PROBE
from train.regression.ridge import PENALTIES
from train.run.settings import Source

SIDE, GRID = 32, 7
MODULES = ["stages.0", "stages.1"]
NETWORK = ["--backbone.name", "test_convnext", "--backbone.weights", "random", "--images.size", SIDE]
PROBE = [*NETWORK, "--layers", "+".join(MODULES)]
WINDOWS = ["--field", "gaussian", "--sites-learn", "together", "--response", "curved"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Recordings a, b and c, the first two of which are probed (RUN a, b) and make the population `sites`."""
    path = tmp_path_factory.mktemp("population")
    for seed, name in enumerate("abc"):
        make_folder(path / "src" / name, n=100, size=SIDE, sites=5 + seed, splits=True, noise=0.2, seed=seed)
        recording = Folder(source=path / "src" / name).open()
        pack(recording, path / "data" / name, stimuli_per_shard=50, workers=1)
    for name in "ab":
        succeed_here("train/probe.py", "--data", path / "data" / name, "--out", path / name, *PROBE, *WINDOWS)
    out = succeed_here(
        "train/population.py", path / "a", path / "b", "--out", path / "sites", "--licence", "CC0"
    ).stdout
    assert "11 sites of 2 recordings" in out
    return path


@pytest.fixture(scope="module")
def windowed(made):
    """Recording c read through windows together with the population."""
    command = ["train/probe.py", "--data", made / "data" / "c", *PROBE, *WINDOWS]
    succeed_here(*command, "--out", made / "windowed", "--population", made / "sites")
    return made / "windowed"


def features_of(images):
    """By module, float32 (b, channels, rows, columns) of the network that is probed."""
    torch.manual_seed(0)
    backbone = Backbone(Source(name="test_convnext", weights="random"), SIDE).eval()
    extractor = LayerFeatures(backbone, MODULES, GRID)
    sizes = extractor.map_sizes(images[:1])
    with torch.no_grad():
        found = extractor(images)
    return {name: rows.view(len(rows), -1, *sizes[name]).numpy() for name, rows in found.items()}


def on_grid(maps):
    """Maps averaged to GRID x GRID positions: each position becomes GRID parts, of which as many as it was are one."""
    for axis in (-2, -1):
        side = maps.shape[axis]
        parts = np.moveaxis(np.repeat(maps, GRID, axis), axis, -1)
        maps = np.moveaxis(parts.reshape(*parts.shape[:-1], GRID, side).mean(-1), -1, axis)
    return maps


def expected_weights(made, features):
    """By module, float64 (sites of a and b, channels): what the probes saved, summed over positions."""
    weights = {}
    for number, module in enumerate(MODULES):
        channels, of_probes = features[module].shape[1], []
        for name in "ab":
            spread = np.array(ShardFolder(made / "data" / name).manifest.rates.std)
            saved = load_file(made / name / SAVED_PROBE)[f"weight.{number}"].double().numpy()
            of_probes.append(saved.reshape(len(saved), channels, -1).sum(2) / spread[:, None])
        weights[module] = np.concatenate(of_probes)
    return weights


def images_and_rates(made, name):
    """uint8 (stimuli, 3, side, side) and rates by split."""
    shards, found = ShardFolder(made / "data" / name), {}
    for split in ("train", "val"):
        stimuli = RecordingStimuli(shards.split(split), SIDE)
        found[split] = stimuli.images(stimuli.subset).permute(0, 3, 1, 2), stimuli.rates.astype(np.float64)
    return found


def test_a_population_has_the_saved_weights_summed_over_positions(made):
    features = features_of(images_and_rates(made, "a")["val"][0])
    found = load_file(made / "sites" / POPULATION_FILE)
    for number, expected in enumerate(expected_weights(made, features).values()):
        np.testing.assert_allclose(found[f"weight.{number}"], expected, rtol=1e-5, atol=1e-6)
    card = json.loads((made / "sites" / "card.json").read_text())
    assert [recording["stimuli"] for recording in card["recordings"]] == [60, 60]
    assert [len(recording["site_ids"]) for recording in card["recordings"]] == [5, 6]
    assert (card["licence"], card["sites"], card["modules"]) == ("CC0", 11, MODULES)
    for recording, name in zip(card["recordings"], "ab", strict=True):
        scores = metrics(made / name)
        assert recording["inner_r2"] == scores["layers"][scores["chosen"]]["inner_r2"]
    text = (made / "sites" / "card.md").read_text()
    assert "CC0" in text
    assert card["network"] in text
    assert record_of(made / "sites").count(FITTED) == 120


@pytest.mark.parametrize("joined", ["alike", "by_channels"])
def test_a_probe_with_a_population_is_ridge_on_the_sum_of_kernels(made, tmp_path, joined):
    options = ["--components", "None", "--products", "float64", "--population", made / "sites", "--joined", joined]
    succeed_here("train/probe.py", "--data", made / "data" / "c", "--out", tmp_path / "run", *PROBE, *options)
    parts = images_and_rates(made, "c")
    features = features_of(torch.cat([images for images, _ in parts.values()]))
    weights = expected_weights(made, features)
    site_maps = sum(on_grid(np.einsum("sc,bcij->bsij", weights[m], features[m].astype(np.float64))) for m in MODULES)
    kernel = np.zeros((80, 80))
    channels = np.array([features[m].shape[1] for m in MODULES])
    shares = channels / channels.mean() if joined == "by_channels" else np.ones(len(MODULES))
    every_map = [*(features[m] for m in MODULES), site_maps]
    for maps, share in zip(every_map, [*shares, SHARE * len(MODULES)], strict=True):
        rows = maps.reshape(80, -1).astype(np.float64)
        products = (rows - rows.mean(0)) @ (rows - rows.mean(0)).T
        kernel += share * products / (np.trace(products) / 80)
    values, vectors = np.linalg.eigh(kernel)
    inputs = vectors * np.sqrt(values.clip(min=0))
    train, val = inputs[:60], inputs[60:]
    unit = np.square(train - train.mean(0)).sum() / 60
    sites = parts["train"][1].T
    expected = [RidgeCV(alphas=PENALTIES * unit, gcv_mode="eigen").fit(train, y).predict(val) for y in sites]
    np.testing.assert_allclose(predictions(tmp_path / "run")["prediction"], np.array(expected).T, rtol=1e-3, atol=1e-3)
    by_itself = spiketune.load(tmp_path / "run").predict(parts["val"][0].permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(by_itself, np.array(expected).T, rtol=1e-3, atol=1e-3)


def test_the_saved_predictor_needs_no_population(made, windowed, tmp_path):
    """The weights of the maps are in those of the network's modules."""
    shutil.copytree(windowed, tmp_path / "run")
    images, _ = images_and_rates(made, "c")["val"]
    found = spiketune.load(tmp_path / "run").predict(images.permute(0, 2, 3, 1).numpy())
    expected = predictions(windowed)["prediction"]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * expected.std())
    assert set(load_file(windowed / SAVED_PROBE)) == {
        "bias", "curve", *(f"{kind}.{number}" for kind in ("weight", "centre") for number in (0, 1))
    }  # fmt: skip
    assert f"{'+'.join(MODULES)}+population" in metrics(windowed)["layers"]


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=slow)])
def test_a_probe_with_a_population_does_not_depend_on_the_process_count(made, windowed, processes):
    out = made / f"on_{processes}"
    command = ["train/probe.py", "--data", made / "data" / "c", "--out", out, *PROBE, *WINDOWS]
    succeed_on(processes, *command, "--population", made / "sites")
    one, more = (metrics(run)["regression"]["r2"]["per_site"] for run in (windowed, out))
    assert more == pytest.approx(one, rel=1e-4, abs=1e-5)
    saved, other = (load_file(run / SAVED_PROBE) for run in (windowed, out))
    for name, tensor in saved.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=float(1e-4 * tensor.std()))


def test_a_probe_with_a_population_goes_on_where_it_was_stopped(made, windowed, tmp_path, monkeypatch):
    command = ["train/probe.py", "--data", made / "data" / "c", "--out", tmp_path / "run", *PROBE, *WINDOWS]
    command += ["--population", made / "sites"]
    monkeypatch.setattr("train.probing.probe_run.save_predictor", None)
    assert run_here(*command).returncode
    monkeypatch.undo()
    succeed_here(*command, "--resume")
    np.testing.assert_array_equal(predictions(tmp_path / "run")["prediction"], predictions(windowed)["prediction"])
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("inner products ...") == 1  # the second start took the results of the first


def test_images_that_a_population_was_fitted_on_are_not_scored(made, tmp_path):
    shards = tmp_path / "shards"
    succeed_here("data_prep/pack.py", "folder", made / "src" / "a", "--out", shards, "--split", "ordered")
    command = ["train/probe.py", "--data", shards, "--out", tmp_path / "run", *PROBE, "--population", made / "sites"]
    assert_refused(run_here(*command), "were fitted before", "--seen drop")
    succeed_here(*command, "--seen", "drop")
    assert metrics(tmp_path / "run")["seen"]["dropped"] > 0
    assert "note: " in (log := (tmp_path / "run" / "log.txt").read_text())
    assert "among those that the population was fitted on" in log


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seed", 1], ["other weights of a network"]),
        (["--images.size", 48], ["images.size 32, not 48"]),
        (["--pool", 3], ["pool 7, not 3"]),
        (["--layers", "stages.0"], ["stages.0, stages.1", "--layers stages.0+stages.1"]),
        (["--layers", *MODULES], ["as one layer"]),
        (["--layers", "pixels"], ["pixels"]),
        (["--population", "nowhere"], ["nowhere", "train/population.py"]),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else None,
)
def test_a_population_that_does_not_fit_is_refused(made, tmp_path, options, words):
    command = ["train/probe.py", "--data", made / "data" / "c", "--out", tmp_path / "run", *PROBE]
    assert_refused(run_here(*command, "--population", made / "sites", *options), "population", *words)
    assert not (tmp_path / "run").exists()


def test_a_damaged_population_is_refused(made, tmp_path):
    shutil.copytree(made / "sites", tmp_path / "sites")
    tensors = load_file(made / "sites" / POPULATION_FILE)
    save_file(tensors, tmp_path / "sites" / POPULATION_FILE)
    command = ["train/probe.py", "--data", made / "data" / "c", "--out", tmp_path / "run", *PROBE]
    assert_refused(run_here(*command, "--population", tmp_path / "sites"), "is damaged")


def test_probes_that_do_not_fit_together_make_no_population(made, tmp_path):
    probe = ["train/probe.py", "--data", made / "data" / "b", *NETWORK, "--out"]
    succeed_here(*probe, tmp_path / "other", "--layers", "stages.0")
    succeed_here(*probe, tmp_path / "seeded", "--layers", "stages.0", "--seed", 1)
    succeed_here(*probe, tmp_path / "pixels", "--layers", "pixels")
    succeed_here(*probe, tmp_path / "control", "--layers", "stages.0", "--shuffle-responses")
    for probes, words in (
        ([made / "a", tmp_path / "other"], ["different modules"]),
        ([tmp_path / "other", tmp_path / "seeded"], ["different weights"]),
        ([tmp_path / "pixels"], ["reads pixels"]),
        ([tmp_path / "control"], ["shuffled responses"]),
        ([made / "a", made / "a"], ["same recording"]),
        ([made / "data" / "a"], ["is not a probe"]),
    ):
        assert_refused(run_here("train/population.py", *probes, "--out", tmp_path / "sites"), *words)
        assert not (tmp_path / "sites").exists()
    assert_refused(run_here("train/population.py", made / "a", "--out", made / "sites"), "not an empty folder")
