"""Bootstrap intervals have the width that theory and an explicit resampling give."""

import numpy as np
import pytest
from site_scores import SITES, make_predictions, moments, report, scores

from data_prep.confidence_interval import PossibleValues, confidence_interval
from train.evaluation.confidence_intervals import bootstrap_means
from train.evaluation.metrics import all_scores


def test_intervals_hold_the_point_estimates():
    block = report(*make_predictions())
    for name in ("r2", "explained_variance", "mse", "pearson_r"):
        low, high = block[name]["ci95"]
        assert low < block[name]["mean"] < high


def test_what_is_the_same_on_every_resample_has_no_spread():
    """A prediction that is off by a constant: EV and r are 1 and MSE the square, whichever stimuli are drawn."""
    _, target = make_predictions()
    resampled = bootstrap_means(target.astype(np.float64) + 3, target, resamples=100)
    for name, value in (("explained_variance", 1), ("pearson_r", 1), ("mse", 9)):
        np.testing.assert_allclose(resampled[name], value, rtol=1e-9)
    assert np.ptp(resampled["r2"]) > 0.1


def test_resampled_means_are_those_of_an_explicit_resampling():
    prediction, target = make_predictions(stimuli=120)
    mine = bootstrap_means(prediction, target, resamples=2000)
    rng = np.random.default_rng(1)
    explicit = {name: [] for name in mine}
    for _ in range(600):
        rows = rng.integers(0, len(target), len(target))
        for name, values in all_scores(moments(prediction[rows], target[rows]), None, None).items():
            explicit[name].append(values.mean())
    for name, values in explicit.items():
        assert np.mean(mine[name]) == pytest.approx(np.mean(values), abs=4 * np.std(values) / np.sqrt(600)), name
        assert np.std(mine[name]) == pytest.approx(np.std(values), rel=0.15), name


def test_the_width_is_that_of_the_known_standard_error():
    """One site, residuals of unit variance: SE(MSE) = sd(e^2) / sqrt(n), SE(r) = (1 - r^2) / sqrt(n)."""
    rng = np.random.default_rng(0)
    n, r = 1000, 0.6
    y, other = rng.normal(size=(2, n))
    p = r * y + np.sqrt(1 - r**2) * other
    resampled = bootstrap_means(p[:, None], y[:, None])
    for name, error in (("mse", np.std((y - p) ** 2) / np.sqrt(n)), ("pearson_r", (1 - r**2) / np.sqrt(n))):
        low, high = confidence_interval(float(np.mean(resampled[name])), resampled[name], n)
        assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15), name


def test_sites_that_share_their_noise_do_not_narrow_the_interval():
    prediction, target = make_predictions(sites=1)
    one = np.std(bootstrap_means(prediction, target)["r2"])
    copies = np.std(bootstrap_means(np.repeat(prediction, 9, 1), np.repeat(target, 9, 1))["r2"])
    independent = np.std(bootstrap_means(*make_predictions(sites=9, missing=0))["r2"])
    assert copies == pytest.approx(one, rel=1e-9)
    assert independent < 0.6 * one


@pytest.mark.parametrize("stimuli", [5, 8, 12])
def test_no_interval_has_impossible_values(stimuli):
    """Near-perfect predictions of few stimuli, where the correction for bias leads above 1."""
    shifted_too_far = given = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        target = rng.normal(0, 1, (stimuli, SITES)).astype(np.float32)
        prediction = target + rng.normal(0, 0.2, target.shape).astype(np.float32)
        block = report(prediction, target)
        for name, least, most in (("r2", -np.inf, 1), ("pearson_r", -1, 1), ("squared_pearson_r", 0, 1)):
            low, high = block[name]["ci95"] or (least, most)  # None where nothing possible is left
            assert least <= low <= high <= most
        given += block["r2"]["ci95"] is not None
        assert block["mse"]["ci95"][0] >= 0
        resampled = bootstrap_means(prediction, target)["r2"]
        shifted_too_far += confidence_interval(block["r2"]["mean"], resampled, stimuli)[1] > 1
    assert shifted_too_far  # so that the test is of something
    assert given >= 25  # of 30: an interval is rarely lost


def test_an_interval_without_a_possible_value_is_none():
    resampled = np.linspace(0.2, 0.9, 100)
    assert confidence_interval(0.99, resampled, 5)[0] > 1
    assert confidence_interval(0.99, resampled, 5, PossibleValues(most=1)) is None
    assert confidence_interval(0.6, resampled, 5, PossibleValues(most=0.7))[1] == 0.7


def test_intervals_are_the_same_every_time():
    prediction, target = make_predictions()
    assert report(prediction, target) == report(prediction, target)


@pytest.mark.parametrize(("stimuli", "sites", "explained"), [(100, 60, 0.05), (200, 1, 0.4)])
def test_an_interval_holds_the_score_over_endless_stimuli_as_often_as_it_says(stimuli, sites, explained):
    """R2 over many sites is the hard case: on n stimuli it lies (1 - R2) / n below that over endless ones."""
    trials, rng = 300, np.random.default_rng(stimuli)
    mixed = rng.normal(size=(3, sites))
    mixed *= np.sqrt(explained / (1 - explained) / (mixed**2).sum(0))  # the signal's variance, for noise of variance 1
    held = 0
    for _ in range(trials):
        signal = rng.normal(size=(stimuli, 3)) @ mixed
        response = signal + rng.normal(size=signal.shape)
        estimate = scores(signal, response)["r2"].mean()
        interval = confidence_interval(estimate, bootstrap_means(signal, response, 300)["r2"], stimuli)
        held += interval[0] <= explained <= interval[1]
    error = 3 * np.sqrt(0.95 * 0.05 / trials)  # of a share counted in so many trials, three standard deviations
    assert abs(held / trials - 0.95) < error


def test_what_has_no_spread_has_an_interval_of_no_width_and_one_stimulus_has_none():
    assert confidence_interval(0.5, np.full(100, 0.5), 30) == (0.5, 0.5)
    assert confidence_interval(0.5, np.full(100, 0.5), 1) is None
    assert confidence_interval(float("nan"), np.full(100, 0.5), 30) is None
    assert confidence_interval(0.5, np.full(100, np.nan), 30) is None
