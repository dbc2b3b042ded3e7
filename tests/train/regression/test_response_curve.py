"""Curves mend responses that are not in proportion to what is predicted, and leave alone what is."""

import numpy as np
import pytest

from train.regression.response_curve import crossed_curves, learn_curves

STIMULI, SITES = 300, 30


def simulated(bend, seed=0, noise=0.5):
    """Predictions and responses that rise with them; `bend` in units of the slope and of the predictions' spread."""
    generator = np.random.default_rng(seed)
    drive = generator.normal(size=(2 * STIMULI, SITES))
    spread, mean = generator.uniform(0.5, 3, SITES), generator.uniform(2, 6, SITES)
    truth = mean + spread * (drive + bend * (drive**2 - 1))
    return (
        (mean + spread * drive).astype(np.float32),
        truth,
        truth + noise * spread * generator.normal(size=drive.shape),
    )


def errors(prediction, truth):
    return np.square(prediction - truth).mean()


def test_a_bend_is_found():
    prediction, truth, rates = simulated(bend=0.2)
    curves = learn_curves(prediction[:STIMULI], rates[:STIMULI])
    curved = curves.apply(prediction[STIMULI:])
    assert errors(curved, truth[STIMULI:]) < 0.1 * errors(prediction[STIMULI:], truth[STIMULI:])
    spread = prediction[:STIMULI].std(axis=0)
    np.testing.assert_allclose(curves.bend * spread, np.full(SITES, 0.2), atol=0.05)


def test_the_curve_is_that_of_least_squares_beside_a_line_where_there_is_no_noise():
    prediction, truth, _ = simulated(bend=np.linspace(0, 0.3, SITES))
    curves = learn_curves(prediction[:STIMULI], truth[:STIMULI])
    for site in (3, 29):
        p = prediction[:STIMULI, site].astype(np.float64)
        fitted = np.polyfit(p, truth[:STIMULI, site], 2)
        assert curves.bend[site] == pytest.approx(fitted[0], rel=1e-3)


def test_sites_without_a_bend_are_hardly_changed_by_noise():
    """What a site alone would take for a bend is a sixth of the noise of a mean over 40 stimuli, and more."""
    prediction, _, rates = simulated(bend=0.0, noise=2.0)
    few = slice(0, 40)
    curved = learn_curves(prediction[few], rates[few]).apply(prediction[STIMULI:])
    alone = np.empty_like(curved)
    for site in range(SITES):
        alone[:, site] = learn_curves(prediction[few, site : site + 1], rates[few, site : site + 1]).apply(
            prediction[STIMULI:, site : site + 1]
        )[:, 0]
    together, apart = (errors(values, prediction[STIMULI:]) for values in (curved, alone))
    assert together < 0.3 * apart


def test_a_site_that_differs_from_the_others_keeps_its_bend():
    bend = np.where(np.arange(SITES) % 2, 0.3, -0.1)
    prediction, _, rates = simulated(bend)
    curves = learn_curves(prediction[:STIMULI], rates[:STIMULI])
    np.testing.assert_allclose(curves.bend * prediction[:STIMULI].std(axis=0), bend, atol=0.1)


def test_beyond_what_was_seen_the_correction_stays_as_it_is():
    prediction, _, rates = simulated(bend=0.2)
    curves = learn_curves(prediction, rates)
    ends = np.stack([prediction.min(axis=0), prediction.max(axis=0)])
    beyond = ends + np.array([[-5.0], [7.0]], np.float32)
    np.testing.assert_allclose(curves.apply(beyond) - beyond, curves.apply(ends) - ends, rtol=1e-4, atol=1e-4)


def test_sites_that_cannot_be_measured_stay_as_they_are():
    """Without responses, with few, unpredicted, and predicted the wrong way round."""
    prediction, _, rates = simulated(bend=0.2)
    rates[:, 0], rates[10:, 1], prediction[:, 2] = np.nan, np.nan, 4
    rates[:, 3] = -rates[:, 3]
    prediction[:, 4] = np.nan
    curves = learn_curves(prediction, rates)
    curved = curves.apply(prediction)
    np.testing.assert_allclose(curved[:, :5], prediction[:, :5])
    assert np.abs(curved[:, 5:] - prediction[:, 5:]).max() > 0.1
    for values in (curves.low, curves.high, curves.constant, curves.slope, curves.bend):
        assert np.isfinite(values).all()


def test_missing_responses_are_left_out():
    prediction, _, rates = simulated(bend=0.2)
    holey = rates.copy()
    holey[7:19, 5] = np.nan
    keep = np.ones(len(rates), bool)
    keep[7:19] = False
    one = slice(5, 6)
    found, expected = (
        learn_curves(prediction[:, one], holey[:, one]),
        learn_curves(prediction[keep, one], rates[keep, one]),
    )
    np.testing.assert_allclose(found.bend, expected.bend)
    np.testing.assert_allclose(found.constant, expected.constant)


def test_crossed_predictions_do_not_know_their_own_response_or_that_to_a_copy():
    prediction, _, rates = (values[:STIMULI] for values in simulated(bend=0.1))
    copies = np.arange(STIMULI)
    copies[200] = 17
    changed = rates.copy()
    changed[17] += 1000
    before, after = (crossed_curves(prediction, responses, copies) for responses in (rates, changed))
    np.testing.assert_array_equal(after[[17, 200]], before[[17, 200]])
    assert np.abs(after - before).max() > 1
