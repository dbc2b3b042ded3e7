"""Stacking equals scipy's non-negative least squares and weights members by their quality."""

import numpy as np
import pytest
from scipy.optimize import nnls

from data_prep.splits import folds
from train.regression.stacking import (
    FOLD_SEED,
    FOLDS,
    PENALTY,
    TARGET_STIMULI,
    LeftOutErrors,
    SiteTargets,
    stack,
)

STIMULI, OTHERS, SITES = 200, 50, 3


@pytest.fixture
def members():
    """A good, a poor, a random and a sign-flipped member, and the responses."""
    generator = np.random.default_rng(0)
    rates = generator.normal(5, 2, size=(STIMULI + OTHERS, SITES))
    noise = generator.normal(size=(4, *rates.shape))
    predictions = [rates + noise[0], rates + 3 * noise[1], 5 + noise[2], 10 - rates + noise[3]]
    return rates, predictions


def stacked(rates, predictions, copies=None):
    fit = slice(0, STIMULI)
    return stack([p[fit] for p in predictions], rates[fit], [p[STIMULI:] for p in predictions], copies)


def test_weights_are_those_of_non_negative_least_squares(members):
    rates, predictions = members
    result = stacked(rates, predictions)
    for site in range(SITES):
        y = rates[:STIMULI, site]
        x = np.stack([p[:STIMULI, site] for p in predictions], axis=1) - y.mean()
        penalty = np.sqrt(PENALTY * np.square(y - y.mean()).sum()) * np.eye(len(predictions))
        expected, _ = nnls(np.vstack([x, penalty]), np.concatenate([y - y.mean(), np.zeros(len(predictions))]))
        np.testing.assert_allclose(result.weights[:, site], expected, atol=1e-4)
    assert (result.weights[0] > result.weights[1]).all()
    assert (result.weights[3] == 0).all()


def test_the_stack_is_better_than_its_best_member_and_says_how_good_it_is(members):
    rates, predictions = members
    stack = stacked(rates, predictions)

    def error(prediction, part):
        return np.square(prediction - rates[part]).mean()

    new, seen = slice(STIMULI, None), slice(0, STIMULI)
    assert error(stack.prediction, new) < min(error(p[new], new) for p in predictions)
    assert error(stack.left_out, seen) == pytest.approx(error(stack.prediction, new), rel=0.25)


def test_left_out_predictions_do_not_know_their_own_response(members):
    rates, predictions = members
    before = stacked(rates, predictions)
    changed = rates.copy()
    changed[17] += 1000
    after = stacked(changed, predictions)
    np.testing.assert_array_equal(after.left_out[17], before.left_out[17])
    assert np.abs(after.left_out - before.left_out).max() > 1


def test_missing_responses_and_predictions_are_left_out(members):
    rates, predictions = members
    holey = rates.copy()
    holey[3, 0] = np.nan
    holey[:STIMULI, 2] = np.nan
    predictions[1] = predictions[1].copy()
    predictions[1][5, 1] = np.nan
    result = stacked(holey, predictions)
    assert np.isfinite(result.prediction[:, :2]).all()
    assert (result.weights[:, 2] == 0).all()
    keep = np.arange(STIMULI) != 3
    alone = stack([p[:STIMULI][keep] for p in predictions], rates[:STIMULI][keep], [p[STIMULI:] for p in predictions])
    np.testing.assert_allclose(result.weights[:, 0], alone.weights[:, 0], atol=1e-9)


def test_left_out_predictions_do_not_know_the_response_to_a_copy_of_the_image(members):
    rates, predictions = members
    copies = np.arange(STIMULI)
    copies[100:] = copies[:100]
    apart = folds(np.arange(STIMULI), FOLDS, FOLD_SEED)
    first = next(one for one in range(100) if not any({one, one + 100} <= set(fold.tolist()) for fold in apart))
    changed = rates.copy()
    changed[first] += 1000
    both = [first, first + 100]
    before, after = stacked(rates, predictions, copies), stacked(changed, predictions, copies)
    np.testing.assert_array_equal(after.left_out[both], before.left_out[both])
    before, after = stacked(rates, predictions), stacked(changed, predictions)
    assert np.abs(after.left_out[both] - before.left_out[both]).max() > 1


def together(rates, predictions, copies=None, stimuli=STIMULI):
    """The stack with targets that are learned over sites."""
    left_out = [p[:stimuli] for p in predictions]
    targets = SiteTargets.learned(LeftOutErrors.of(left_out, rates[:stimuli], copies))
    return stack(left_out, rates[:stimuli], [p[STIMULI:] for p in predictions], copies, targets), targets


def test_weights_are_pulled_towards_their_targets(members):
    """By as much as responses that follow the targets, whose number does not grow with that of the stimuli."""
    rates, predictions = members
    result, targets = together(rates, predictions)
    for site in range(SITES):
        y = rates[:STIMULI, site] - rates[:STIMULI, site].mean()
        x = np.stack([p[:STIMULI, site] for p in predictions], axis=1) - rates[:STIMULI, site].mean()
        pull = np.sqrt(TARGET_STIMULI / STIMULI * np.square(y).sum())
        extra, of_targets = pull * np.eye(len(predictions)), pull * targets.whole[:, site]
        expected, _ = nnls(np.vstack([x, extra]), np.concatenate([y, of_targets]))
        np.testing.assert_allclose(result.weights[:, site], expected, atol=1e-4)


def test_few_stimuli_are_stacked_better_together():
    """Members of equal quality at all sites, whose noise a site alone takes for more."""
    generator = np.random.default_rng(2)
    rates = generator.normal(size=(25 + OTHERS, 60))
    predictions = [0.5 * rates + scale * generator.normal(size=rates.shape) for scale in (0.5, *[1.5] * 20)]
    left_out, others = [p[:25] for p in predictions], [p[25:] for p in predictions]
    targets = SiteTargets.learned(LeftOutErrors.of(left_out, rates[:25], None))
    shared = stack(left_out, rates[:25], others, None, targets)
    alone = stack(left_out, rates[:25], others)
    assert targets.whole[0].mean() > 0.9
    shared_error, own_error = (np.square(one.prediction - rates[25:]).mean() for one in (shared, alone))
    assert shared_error < 0.9 * own_error


def test_sites_in_parts_are_stacked_as_all_at_once(members):
    rates, predictions = members
    whole, targets = together(rates, predictions)
    parts = [slice(0, 1), slice(1, SITES)]
    errors = [LeftOutErrors.of([p[:STIMULI, part] for p in predictions], rates[:STIMULI, part], None) for part in parts]
    found = SiteTargets.learned(LeftOutErrors.side_by_side(errors))
    np.testing.assert_allclose(found.whole, targets.whole, rtol=1e-9)
    np.testing.assert_allclose(found.without_fold, targets.without_fold, rtol=1e-9)
    part = parts[1]
    of_part = stack(
        [p[:STIMULI, part] for p in predictions],
        rates[:STIMULI, part],
        [p[STIMULI:, part] for p in predictions],
        None,
        targets.of_sites(part),
    )
    np.testing.assert_allclose(of_part.prediction, whole.prediction[:, part], rtol=1e-6)
    np.testing.assert_allclose(of_part.left_out, whole.left_out[:, part], rtol=1e-6)


def test_left_out_predictions_do_not_know_their_own_response_through_the_other_sites(members):
    """Targets are learned from the responses of all sites."""
    rates, predictions = members
    changed = rates.copy()
    changed[17, 1:] += 1000
    before, after = together(rates, predictions)[0], together(changed, predictions)[0]
    np.testing.assert_array_equal(after.left_out[17], before.left_out[17])
    assert np.abs(after.left_out - before.left_out).max() > 0.1


def test_targets_of_a_site_without_responses_are_those_of_the_others(members):
    rates, predictions = members
    holey = rates.copy()
    holey[:, 2] = np.nan
    result, targets = together(holey, predictions)
    assert np.isfinite(targets.whole).all()
    assert (result.weights[:, 2] == 0).all()
    expected, _ = together(rates[:, :2], [p[:, :2] for p in predictions])
    np.testing.assert_allclose(result.prediction[:, :2], expected.prediction, rtol=1e-6)
