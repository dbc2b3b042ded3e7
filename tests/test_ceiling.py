"""The noise ceiling: the true reliability of simulated responses, and the known one of a real recording."""

import numpy as np
import pytest
from helpers import DATA

from data_prep.ceiling import split_half_reliability

STIMULI, SITES = 2000, 24
TOLERANCE = 0.015  # of the mean over SITES sites; its standard error is about 0.004 at these sizes


def simulate(repetitions, noise, stimuli=STIMULI, sites=SITES, seed=0):
    """Trials float (stimuli, repetitions, sites): mean rates of variance 1, and a single trial's variance `noise`."""
    rng = np.random.default_rng([seed, repetitions])
    signal = rng.normal(size=(stimuli, 1, sites))
    return 10 + signal + np.sqrt(noise) * rng.normal(size=(stimuli, repetitions, sites))


def drop(trials, kept):
    """Keep `kept` (stimuli,) repetitions of each stimulus, at random places."""
    rng = np.random.default_rng(9)
    place = rng.permuted(np.tile(np.arange(trials.shape[1]), (len(trials), 1)), axis=1)
    return np.where((place < kept[:, None])[:, :, None], trials, np.nan)


def true_reliability(noise, repetitions):
    return 1 / (1 + noise / repetitions)


def expected(noise, counts):
    """What halves of the given counts lead to; for odd counts the halves differ in size, and so in noise."""
    smaller, larger = np.asarray(counts) // 2, (np.asarray(counts) + 1) // 2
    r = 1 / (1 + noise * np.mean((1 / smaller + 1 / larger) / 2))
    return 2 * r / (1 + r)


@pytest.mark.parametrize("noise", [0.5, 2, 6])
@pytest.mark.parametrize("repetitions", [2, 4, 10])
def test_the_true_reliability_is_found(repetitions, noise):
    rho = split_half_reliability(simulate(repetitions, noise), random_splits=10)
    assert rho.dtype == np.float64
    assert rho.mean() == pytest.approx(true_reliability(noise, repetitions), abs=TOLERANCE)
    assert np.abs(rho - rho.mean()).max() < 0.15


@pytest.mark.parametrize(("repetitions", "too_low"), [(3, 0.04), (5, 0.02), (7, 0.01)])
@pytest.mark.parametrize("noise", [0.5, 2, 6])
def test_odd_counts_are_a_little_too_low_never_too_high(repetitions, too_low, noise):
    rho = split_half_reliability(simulate(repetitions, noise), random_splits=10).mean()
    assert rho == pytest.approx(expected(noise, repetitions), abs=TOLERANCE)
    assert -too_low - TOLERANCE < rho - true_reliability(noise, repetitions) < TOLERANCE


def test_stimuli_may_have_different_numbers_of_repetitions():
    counts = np.random.default_rng(1).integers(6, 11, STIMULI)
    rho = split_half_reliability(drop(simulate(10, 4), counts), random_splits=10)
    assert rho.mean() == pytest.approx(expected(4, counts), abs=TOLERANCE)


def test_empty_repetitions_and_stimuli_seen_once_do_not_count():
    trials = simulate(4, 2)
    padded = np.concatenate([trials, np.full_like(trials, np.nan)], axis=1)
    once = padded.copy()
    once[:400, 1:] = np.nan
    once[:400, 0] = 1e6  # a single repetition says nothing of reliability
    for changed in (padded, once):
        rho = split_half_reliability(changed, random_splits=10).mean()
        assert rho == pytest.approx(true_reliability(2, 4), abs=TOLERANCE)


def test_a_site_without_signal_has_none():
    rng = np.random.default_rng(0)
    rho = split_half_reliability(rng.normal(size=(STIMULI, 6, SITES)), random_splits=10)
    assert abs(rho.mean()) < 0.03


def test_noise_free_responses_are_fully_reliable():
    rho = split_half_reliability(np.repeat(simulate(2, 1, stimuli=50)[:, :1], 5, axis=1), random_splits=5)
    np.testing.assert_allclose(rho, 1, rtol=1e-9)


def test_it_does_not_depend_on_units():
    trials = simulate(5, 2, stimuli=100)
    plain = split_half_reliability(trials, random_splits=5)
    np.testing.assert_allclose(split_half_reliability(1000 * trials - 3, random_splits=5), plain, rtol=1e-6)


def test_too_little_data_gives_nan():
    trials = simulate(4, 1, stimuli=20, sites=6).astype(np.float32)
    trials[:, :, 1] = np.nan  # never recorded
    trials[:, 1:, 2] = np.nan  # one repetition of each stimulus
    trials[2:, :, 3] = np.nan  # two stimuli
    trials[:, :, 4] = 0.1  # always the same
    trials[3:, :, 5] = np.nan  # three stimuli are enough
    rho = split_half_reliability(trials, random_splits=3)
    assert np.isnan(rho).tolist() == [False, True, True, True, True, False]


def test_constant_float64_responses_have_no_reliability():
    """Their averages differ in the last digit, which is reproducible and means nothing."""
    assert np.isnan(split_half_reliability(np.full((640, 3, 2), 0.1), random_splits=3)).all()


@pytest.mark.parametrize("repetitions", [4, 5])
def test_the_seed_decides_the_splits(repetitions):
    trials = simulate(repetitions, 2, stimuli=40)
    first = split_half_reliability(trials, random_splits=3, seed=1)
    assert np.array_equal(first, split_half_reliability(trials, random_splits=3, seed=1))
    assert not np.array_equal(first, split_half_reliability(trials, random_splits=3, seed=2))


def test_more_random_splits_steady_the_estimate():
    trials = simulate(4, 4, stimuli=60)
    few, many = (
        np.std([split_half_reliability(trials, random_splits, seed) for seed in range(6)], axis=0).mean()
        for random_splits in (1, 30)
    )
    assert many < 0.4 * few


@pytest.mark.skipif(not (DATA / "v4_hvm640").is_dir(), reason="the real recordings are not here")
def test_the_known_reliability_of_a_real_recording():
    rho = split_half_reliability(np.load(DATA / "v4_hvm640" / "trials.npy"), random_splits=20)
    assert rho.shape == (50,)
    assert np.median(rho) == pytest.approx(0.75, abs=0.02)
    assert rho.max() < 1
