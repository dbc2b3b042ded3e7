"""Windows find the part of the image that a site responds to, also over several layers."""

from functools import cache

import numpy as np
import pytest
import torch
from helpers import assert_refused, run_here, slow, succeed_here
from launching import metrics, predictions, succeed
from make_sources import make_folder

from data_prep.shards.folder import ShardFolder
from data_prep.shards.packing import pack
from data_prep.sources.folder import Folder
from train.data.stimuli import RecordingStimuli
from train.models.backbone import Backbone
from train.models.features import LayerFeatures, PixelFeatures
from train.models.windows import WHOLE_MAP, Window, probe_windows
from train.regression.gram import centred_gram
from train.regression.precision import ROUNDING
from train.regression.ridge import ridge
from train.regression.stacking import stack
from train.run.recipe import Source

SIZE, STAGES = 32, ["stages.0", "stages.1"]
PLACES = np.array([[-4 / 7, -4 / 7], [4 / 7, 0.0], [0.0, 4 / 7]])  # right and down, in half sides
NETWORK = ["--backbone.name", "test_convnext", "--backbone.weights", "random", "--images.size", SIZE]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("fields"), 300)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Where sites see is not to be found in them."""
    return make_data(tmp_path_factory.mktemp("few"), 100)


def make_data(path, images):
    """Images; each site responds to the contrast between two halves of a patch, plus noise. 3 in 5 are for training."""
    written = make_folder(path / "src", n=images, splits=True, sites=len(PLACES), size=SIZE)
    rates = []
    for x, y in PLACES:
        column, row = (round((coordinate + 1) / 2 * SIZE) for coordinate in (x, y))
        patch = written.images[:, row - 3 : row + 3, column - 3 : column + 3].astype(np.float64)
        rates.append(patch[:, :, 3:].mean((1, 2, 3)) - patch[:, :, :3].mean((1, 2, 3)))
    rates = np.stack(rates, axis=1)
    rates = (rates - rates.mean(0)) / rates.std(0) + np.random.default_rng(0).normal(size=rates.shape)
    np.save(path / "src" / "rates.npy", rates.astype(np.float32))
    return pack(Folder(source=path / "src").open(), path / "shards", stimuli_per_shard=100, workers=1).folder


def probed(run, data, *words):
    succeed_here("train/probe.py", "--data", data, "--out", run, "--loader.workers", 0, *words)
    return metrics(run)


@pytest.fixture(scope="module")
def on_pixels(data, tmp_path_factory):
    """Probes of the pixels: of the whole image, and through windows."""
    folder = tmp_path_factory.mktemp("pixels")
    words = ["--layers", "pixels", "--images.size", SIZE]
    return [(folder / field, probed(folder / field, data, *words, "--field", field)) for field in ("whole", "gaussian")]


def test_windows_are_gaussian_and_the_first_is_the_whole_map():
    assert probe_windows()[0] == WHOLE_MAP
    assert (WHOLE_MAP.weights(4, 4) == 1).all()
    weights = Window(x=0.5, y=-0.25, width=0.4).weights(4, 8).reshape(4, 8)
    down, right = -0.25, 0.375  # the middle of row 1 and of column 5
    assert weights[1, 5] == pytest.approx(np.exp(-((down + 0.25) ** 2 + (right - 0.5) ** 2) / (2 * 0.4**2)))


def test_a_site_is_read_where_it_sees(on_pixels):
    (_, whole), (_, through) = on_pixels
    assert through["regression"]["r2"]["mean"] > whole["regression"]["r2"]["mean"] + 0.03
    centre = np.array(through["layers"]["pixels"]["field_centre"][0], float).T
    np.testing.assert_allclose(centre, PLACES, atol=0.3)


def test_the_selection_score_is_an_honest_estimate(on_pixels):
    """On stimuli that neither the regression nor the windows' weights were fitted on."""
    _, (_, through) = on_pixels
    assert through["layers"]["pixels"]["inner_r2"] == pytest.approx(through["regression"]["r2"]["mean"], abs=0.15)


def test_predictions_of_the_stimuli_left_out_are_kept(on_pixels, data):
    train = ShardFolder(data).split("train")
    for run, _ in on_pixels:
        left_out = predictions(run, "left_out")
        assert left_out["stimulus_id"].tolist() == train.stimulus_ids
        np.testing.assert_array_equal(left_out["target"], train.rates())
        assert 0.1 < np.corrcoef(left_out["prediction"][:, 0], left_out["target"][:, 0])[0, 1] < 0.9


def test_a_sum_of_layers_is_ridge_on_features_of_one_size(few, tmp_path):
    probed(tmp_path / "run", few, *NETWORK, "--layers", "stages.0+stages.1")
    products = 0
    for features in centred_features(few).values():
        products = products + features @ features.T / np.square(features).sum()
    gram, rates = gram_and_rates(products, few, ROUNDING["float32"])
    expected = ridge(gram, rates, 1000).prediction
    np.testing.assert_allclose(predictions(tmp_path / "run")["prediction"], expected, atol=1e-3)


@pytest.mark.parametrize(
    ("layers", "processes"), [pytest.param("stages.1+stages.0", 1, marks=slow), ("stages.1+stages.0", 3), ("pixels", 1)]
)
def test_each_window_is_a_ridge_on_features_weighed_by_it(few, tmp_path, layers, processes):
    """On any number of processes, in stripes of a few rows; a map of few positions and one of many (pixels)."""
    run, own_words = tmp_path / "run", NETWORK if layers != "pixels" else ["--images.size", SIZE]
    words = [*own_words, "--layers", layers, "--field", "gaussian", "--products", "float64", "--memory", "0.002"]
    if processes == 1:
        probed(run, few, *words)
    else:
        succeed(processes, "train/probe.py", "--data", few, "--out", run, "--loader.workers", 0, *words)
    assert list(metrics(run)["layers"]) == ["pixels" if layers == "pixels" else "stages.0+stages.1"]
    stacked = ridge_on_weighed_features(few, layers)
    np.testing.assert_allclose(predictions(run)["prediction"], stacked.prediction, atol=1e-4)
    np.testing.assert_allclose(predictions(run, "left_out")["prediction"], stacked.left_out, atol=1e-4)


@cache
def ridge_on_weighed_features(data, layers):
    """Of all windows together, each on features that are weighed by it and kept."""
    fits = []
    for window in probe_windows():
        products = 0
        for layer, features in centred_features(data, layers).items():
            side = {"pixels": SIZE, "stages.0": 7, "stages.1": 4}[layer]
            seen = features * np.sqrt(np.tile(window.weights(side, side), features.shape[1] // side**2))
            products = products + seen @ seen.T / np.square(seen).sum()
        gram, rates = gram_and_rates(products, data, ROUNDING["float64"])
        fits.append(ridge(gram, rates, 1000))
    return stack([fit.left_out for fit in fits], rates, [fit.prediction for fit in fits])


def centred_features(data, layers=""):
    """Of all stimuli, train before val, float64 by layer."""
    shards = ShardFolder(data)
    torch.manual_seed(0)
    extract = LayerFeatures(Backbone(Source(name="test_convnext", weights="random"), SIZE).eval(), STAGES, 7)
    stimuli = [RecordingStimuli(shards.split(name), SIZE) for name in ("train", "val")]
    images = [of_split.images(of_split.subset) for of_split in stimuli]
    with torch.no_grad():
        features = (PixelFeatures() if layers == "pixels" else extract)(torch.cat(images).permute(0, 3, 1, 2))
    return {layer: (values.double() - values.double().mean(0)).numpy() for layer, values in features.items()}


def gram_and_rates(products, data, rounding):
    """For the regression from train to val."""
    train = ShardFolder(data).split("train")
    fit, held_out = np.split(np.arange(len(products)), [len(train)])
    return centred_gram(products, fit, held_out, rounding), train.rates()


def test_windows_need_leave_one_out(few, tmp_path):
    words = ["--layers", "pixels", "--readout", "ols", "--field", "gaussian"]
    done = run_here("train/probe.py", "--data", few, "--out", tmp_path / "run", *words)
    assert_refused(done, "field", "ridge")


def test_a_layer_may_join_more_modules_than_a_file_name_holds(few, tmp_path):
    run = tmp_path / "run"
    probed(run, few, *NETWORK, "--layers", "stages.*.blocks.*.*+stages.*.blocks.*.mlp.*")
    (layer,) = metrics(run)["layers"]
    assert len(layer) > 255
    (line,) = [line for line in (run / "eval" / "val" / "table.md").read_text().splitlines() if "(chosen)" in line]
    assert len(line) < 255
