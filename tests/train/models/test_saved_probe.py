"""A saved probe predicts bias + (features - centre) @ weights', bent by a curve."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.common.errors import BadInput, RunFailed
from train.models.features import PIXELS
from train.models.probe_network import load_probe_network
from train.models.saved_probe import SAVED_PROBE, SavedProbe, SavedProbeWriter
from train.run.recipe import ProbeRecipe

SIDE, SITES = 4, 3
FACTS = SavedProbe(
    modules=[PIXELS],
    site_ids=["a", "b", "c"],
    units="spikes/s",
    rate_mean=[1.0, 2.0, None],
    rate_std=[1.0, 1.0, None],
    recording="made up",
    simulated=False,
    image_size=SIDE,
    network=None,
)


@pytest.fixture
def parts():
    random, width = np.random.default_rng(0), 3 * SIDE**2
    weight, centre = (random.normal(size=shape).astype(np.float32) for shape in ((SITES, width), (width,)))
    curve = np.array([[-2.0] * 3, [2.0] * 3, [0.5] * 3, [0.1] * 3, [0.2, 0.0, -0.2]])
    return weight, centre, np.array([1.0, 2.0, 3.0]), curve


def write(folder, parts, has_curve=True):
    """Site by site, the last one first."""
    weight, centre, bias, curve = parts
    with SavedProbeWriter(folder, FACTS, [weight.shape[1]], has_curve) as writer:
        for site in reversed(range(SITES)):
            writer.write_weight(0, site, weight[site : site + 1])
        writer.write_centre(0, centre)
        writer.write_bias(bias)
        if has_curve:
            writer.write_curve(curve)


@pytest.mark.parametrize("has_curve", [True, False])
def test_predictions_are_those_by_hand(tmp_path, parts, has_curve):
    write(tmp_path, parts, has_curve)
    network, facts = load_probe_network(tmp_path, ProbeRecipe(layers=[PIXELS]))
    assert facts == FACTS
    images = torch.randint(0, 256, (5, 3, SIDE, SIDE), dtype=torch.uint8)
    weight, centre, bias, (low, high, constant, slope, bend) = parts
    rates = (images.flatten(1).numpy() / 255 - centre) @ weight.T + bias
    if has_curve:
        within = np.clip(rates, low, high)
        rates = rates + constant + within * (slope + within * bend)
    np.testing.assert_allclose(network(images)["rates"], rates, rtol=1e-5, atol=1e-5)


def test_nothing_is_left_of_a_file_that_failed(tmp_path, parts):
    with pytest.raises(RuntimeError, match="interrupted"), SavedProbeWriter(tmp_path, FACTS, [48]):
        raise RuntimeError("interrupted")
    assert not list(tmp_path.iterdir())
    with pytest.raises(BadInput, match=SAVED_PROBE):
        load_probe_network(tmp_path, ProbeRecipe(layers=[PIXELS]))


def test_weights_of_other_features_are_refused(tmp_path):
    with SavedProbeWriter(tmp_path, FACTS, [47]) as writer:
        writer.write_bias(np.zeros(3))
    with pytest.raises(BadInput, match="48 features, the probe weighs 47"):
        load_probe_network(tmp_path, ProbeRecipe(layers=[PIXELS]))


def test_a_full_disk_is_told_of(tmp_path):
    with SavedProbeWriter(tmp_path, FACTS, [48]) as writer, Path("/dev/full").open("wb", buffering=0) as full:
        file, writer._file = writer._file, full
        with pytest.raises(RunFailed, match="no room for the predictor"):
            writer.write_bias(np.zeros(3))
        writer._file = file
