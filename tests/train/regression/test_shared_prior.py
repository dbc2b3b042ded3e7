"""What sites have in common decides where a site's own errors do not, and gives way where they do."""

from dataclasses import replace

import numpy as np
import pytest

from train.regression import ridge as ridge_module
from train.regression.gram import centred_gram
from train.regression.ridge import PENALTIES, ridge
from train.regression.shared_prior import EVEN, TEMPER, shared_prior


def test_a_single_round_is_bayes_rule():
    """Two options, of which the second has errors of twice the size, at a site with 10 stimuli."""
    squares, counts = np.array([[1.0], [2.0]]), np.array([10])
    odds = 2 ** (TEMPER * 10 / 2)
    found = shared_prior(squares, counts)
    np.testing.assert_allclose(found.prior.sum(), 1)
    np.testing.assert_allclose(found.posterior.sum(axis=0), 1)
    ratio = found.posterior[0, 0] / found.posterior[1, 0]
    np.testing.assert_allclose(ratio, odds * found.prior[0] / found.prior[1])


def test_expectation_maximisation_makes_the_sites_likelier_than_an_even_prior():
    generator = np.random.default_rng(0)
    squares, counts = generator.uniform(1, 1.2, size=(7, 30)), np.full(30, 60)
    found = shared_prior(squares, counts)
    likelihood = (squares / squares.min(axis=0)) ** (-TEMPER / 2 * counts)
    assert np.log(found.prior @ likelihood).sum() > np.log(likelihood.mean(axis=0)).sum()
    posterior = found.prior[:, None] * likelihood
    np.testing.assert_allclose(found.posterior, posterior / posterior.sum(axis=0))
    assert found.prior.min() >= EVEN / 7 / (1 + EVEN)


def test_an_undecided_site_follows_the_others_and_a_decided_one_does_not():
    squares = np.ones((3, 12))
    squares[1] = 0.5  # suits all
    squares[:, 10] = 1.0  # cannot tell
    squares[:, 11] = [0.05, 1, 1]  # is sure of another
    found = shared_prior(squares, np.full(12, 100))
    assert (found.posterior.argmax(axis=0)[:11] == 1).all()
    assert found.posterior[1, 10] > 0.8
    assert found.posterior[0, 11] > 0.99


def test_a_site_without_errors_has_the_prior_and_no_say():
    generator = np.random.default_rng(1)
    squares, counts = generator.uniform(1, 2, size=(4, 6)), np.full(6, 50)
    expected = shared_prior(squares, counts)
    more = np.concatenate([squares, np.full((4, 1), np.nan), np.zeros((4, 1)), squares[:, :1]], axis=1)
    found = shared_prior(more, np.array([*counts, 50, 50, 0]))
    np.testing.assert_allclose(found.prior, expected.prior)
    np.testing.assert_allclose(found.posterior[:, :6], expected.posterior)
    for site in (6, 7, 8):
        np.testing.assert_allclose(found.posterior[:, site], found.prior)


def test_no_site_at_all_leaves_the_options_even():
    found = shared_prior(np.full((4, 2), np.nan), np.zeros(2))
    np.testing.assert_allclose(found.posterior, 0.25)


@pytest.fixture(scope="module")
def few_stimuli():
    """Sites with the same share of noise: inner products of 30 stimuli to fit and 300 others, and responses."""
    generator = np.random.default_rng(0)
    features = generator.normal(size=(330, 80))
    signal = features @ generator.normal(size=(80, 40))
    rates = signal + 2 * signal.std() * generator.normal(size=signal.shape)
    rates[:, 39] = signal[:, 39]  # one has no noise
    return features @ features.T, rates, signal


def test_penalties_that_are_learned_together_predict_better(few_stimuli):
    products, rates, signal = few_stimuli
    gram = centred_gram(products, np.arange(30), np.arange(30, 330))
    fits = {together: ridge(gram, rates[:30], sites_together=together) for together in (False, True)}
    errors = {together: np.square(fit.prediction - signal[30:]).mean(axis=0) for together, fit in fits.items()}
    assert errors[True][:39].mean() < 0.97 * errors[False][:39].mean()
    assert np.log(fits[True].penalty[:39]).std() < np.log(fits[False].penalty[:39]).std()
    assert set(fits[True].penalty) <= set(PENALTIES)


def test_what_is_left_out_is_predicted_with_the_penalty_that_was_chosen(few_stimuli):
    products, rates, _ = few_stimuli
    fit = ridge(centred_gram(products, np.arange(30), np.arange(30, 33)), rates[:30], sites_together=True)
    residual = np.square(fit.left_out - rates[:30]).sum(axis=0)
    total = np.square(rates[:30] - rates[:30].mean(axis=0)).sum(axis=0)
    np.testing.assert_allclose(fit.inner_r2, 1 - residual / total, rtol=1e-4, atol=1e-5)
    unit = np.trace(centred_gram(products, np.arange(30), np.arange(30)).fit) / 30
    others = np.delete(np.arange(30), 4)
    refit = centred_gram(products, others, np.array([4]))
    for site in (0, 20, 39):
        dual = np.linalg.solve(
            refit.fit + fit.penalty[site] * unit * np.eye(29), rates[others, site] - rates[others, site].mean()
        )
        expected = refit.cross @ dual + rates[others, site].mean()
        assert fit.left_out[4, site] == pytest.approx(expected[0], rel=1e-4)


def test_copies_of_an_image_count_once(few_stimuli, monkeypatch):
    """Sites that have seen every image twice are no surer of their penalties for that."""
    products, rates, _ = few_stimuli
    twice, counts = np.tile(np.arange(20), 2), []
    gram = centred_gram(products[np.ix_(twice, twice)], np.arange(40), np.arange(0))

    def counting(squares, stimuli):
        counts.append(stimuli)
        return shared_prior(squares, stimuli)

    monkeypatch.setattr(ridge_module, "shared_prior", counting)
    for copies in (None, twice):
        ridge(replace(gram, copies=copies), rates[twice], sites_together=True)
    np.testing.assert_array_equal(counts, [np.full(40, 40), np.full(40, 20)])
