"""Intervals of many models hold together, and ranks are as probable as they say."""

import numpy as np
import pytest
from scipy.stats import norm

from train.evaluation.comparison import ScoredPredictions, leads
from train.evaluation.multiplicity import ComparedModels

STIMULI, RESAMPLES = 60, 400


def drawn(rng, truth, correlation=0.5):
    """Models' scores, means over the stimuli, around their true values, and the resamples of these."""
    shared, own = rng.normal(size=STIMULI), rng.normal(size=(len(truth), STIMULI))
    values = np.array(truth)[:, None] + np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own
    counts = rng.multinomial(STIMULI, np.full(STIMULI, 1 / STIMULI), RESAMPLES)
    return ComparedModels(values.mean(axis=1), values @ counts.T / STIMULI, STIMULI)


def test_the_intervals_of_all_models_and_of_all_differences_hold_together():
    """While the intervals of single differences do not: among 28, some excludes the truth."""
    rng, truth, trials = np.random.default_rng(0), np.linspace(0, 1, 8), 200
    held = {"scores": 0, "differences": 0, "alone": 0, "ranks": 0}
    pairs = [(a, b) for a in range(8) for b in range(a)]
    for _ in range(trials):
        models = drawn(rng, truth)
        standings = models.standings()
        held["scores"] += all(s.interval[0] <= true <= s.interval[1] for s, true in zip(standings, truth, strict=True))
        ends = [models.difference(a, b) for a, b in pairs]
        differences = [truth[a] - truth[b] for a, b in pairs]
        held["differences"] += all(low <= true <= high for (low, high), true in zip(ends, differences, strict=True))
        alone = [ComparedModels(models._scores[[a, b]], models._resampled[[a, b]], STIMULI) for a, b in pairs[:7]]
        ends = [one.difference(0, 1) for one in alone]
        held["alone"] += all(low <= true <= high for (low, high), true in zip(ends, differences, strict=False))
        held["ranks"] += all(s.best <= 8 - number <= s.worst for number, s in enumerate(standings))
    error = 3 * np.sqrt(0.95 * 0.05 / trials)
    assert abs(held["scores"] / trials - 0.95) < error
    assert abs(held["differences"] / trials - 0.95) < error
    assert held["alone"] / trials < 0.95 - error
    assert held["ranks"] / trials > 0.95 - error


def test_the_probability_of_each_rank_is_that_of_normal_scores():
    """Of two models, the better is first with Phi(difference / its standard error)."""
    rng = np.random.default_rng(1)
    scores, error = np.array([0.30, 0.32]), 0.02
    resampled = scores[:, None] + error / np.sqrt(2) * rng.normal(size=(2, 200_000))
    first, second = ComparedModels(scores, resampled, 10**6).standings()
    assert second.probabilities[0] == pytest.approx(norm.cdf(1.0), abs=0.01)
    np.testing.assert_allclose(np.add(first.probabilities, second.probabilities), 1)
    assert (first.best, first.worst, second.best, second.worst) == (1, 2, 1, 2)


def test_equal_models_share_their_ranks_and_clear_ones_do_not():
    rng = np.random.default_rng(2)
    values = 0.3 + 0.01 * rng.normal(size=1000)
    models = ComparedModels(np.array([0.3, 0.3, 0.9]), np.array([values, values, values + 0.6]), 100)
    one, other, best = models.standings()
    np.testing.assert_allclose(one.probabilities, [0, 0.5, 0.5])
    np.testing.assert_allclose(other.probabilities, [0, 0.5, 0.5])
    np.testing.assert_allclose(best.probabilities, [1, 0, 0])
    assert [(s.best, s.worst) for s in (one, other, best)] == [(2, 3), (2, 3), (1, 1)]


def test_adjusted_intervals_of_leads_are_wider_with_more_models_and_decide():
    rng = np.random.default_rng(3)
    target = rng.normal(size=(100, 5))
    better = [target + noise * rng.normal(size=target.shape) for noise in (0.9, 1.0, 1.05, 1.1, 1.15, 1.2)]
    resampled = [ScoredPredictions(prediction, target).resampled(500) for prediction in better]
    scores = [1 - ((prediction - target) ** 2).mean() / target.var() for prediction in better]
    (of_two,) = leads("r2", scores[:2], resampled[:2], 100)
    assert of_two.adjusted == of_two.interval
    of_many = leads("r2", scores, resampled, 100)[0]
    assert of_many.interval == of_two.interval
    assert of_many.adjusted[1] - of_many.adjusted[0] > 1.2 * (of_two.interval[1] - of_two.interval[0])
    assert of_many.is_certain == (of_many.adjusted[0] > 0)
