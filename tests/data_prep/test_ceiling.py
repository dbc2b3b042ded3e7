"""The noise ceiling: the true reliability of simulated responses, and the known ones of real recordings."""

import numpy as np
import pytest
from helpers import DATA

from data_prep.ceiling import (
    TrialStatistics,
    estimate_ceiling,
    split_half_correlations,
    split_half_reliability,
    variance_components,
)
from data_prep.sources.simulated import Simulated
from data_prep.spikes import raster_counts

STIMULI, SITES = 2000, 24
TOLERANCE = 0.015  # of the mean over SITES sites; its standard error is about 0.004 at these sizes


def simulate(repetitions, noise, stimuli=STIMULI, sites=SITES, seed=0):
    """Trials float (stimuli, repetitions, sites): mean rates of variance 1, and a single trial's variance `noise`."""
    rng = np.random.default_rng([seed, repetitions])
    signal = rng.normal(size=(stimuli, 1, sites))
    return 10 + signal + np.sqrt(noise) * rng.normal(size=(stimuli, repetitions, sites))


def drop(trials, remaining):
    """Keep `remaining` (stimuli,) repetitions of each stimulus, chosen at random."""
    rng = np.random.default_rng(9)
    order = rng.permuted(np.tile(np.arange(trials.shape[1]), (len(trials), 1)), axis=1)
    return np.where((order < remaining[:, None])[:, :, None], trials, np.nan)


def true_reliability(noise, repetitions):
    return 1 / (1 + noise / repetitions)


def expected(noise, counts):
    """Expected split-half reliability for these counts; with odd counts the halves differ in size and noise."""
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


# ---- variance components -------------------------------------------------------------------------------------------


def components(trials):
    return variance_components(TrialStatistics.from_trials(trials))


@pytest.mark.parametrize("stimuli", [8, 21, 240])
@pytest.mark.parametrize("repetitions", [2, 3, 4, 10, 50])
def test_the_reliability_is_unbiased(stimuli, repetitions):
    """Mean error over many sites; three standard errors of it are allowed."""
    sites = 8000 if stimuli < 100 else 600
    rho = components(simulate(repetitions, repetitions, stimuli, sites)).reliability
    assert abs(rho.mean() - 0.5) < 3 * rho.std() / np.sqrt(sites)


def test_split_halves_are_too_low_with_few_stimuli():
    """Why they are not the default: their bias is far beyond its own uncertainty where the components have none."""
    trials = simulate(4, 4, stimuli=21, sites=1000)
    r = split_half_correlations(trials, random_splits=10)
    of_mean = 2 * r.mean(axis=0) / (1 + r.mean(axis=0))
    assert split_half_reliability(trials, random_splits=10).mean() < of_mean.mean() < 0.5 - 0.02
    assert components(trials).reliability.mean() == pytest.approx(0.5, abs=0.02)


def test_unequal_repetitions_bias_nothing():
    counts = np.array([2, 3, 4, 9] * 10)
    rho = components(drop(simulate(9, 4, stimuli=40, sites=4000), counts)).reliability
    expected = 1 / (1 + 4 * np.mean(1 / counts))
    assert rho.mean() == pytest.approx(expected, abs=4 * rho.std() / np.sqrt(len(rho)) + 0.002)


def test_the_simulated_recording_has_its_true_reliability():
    recording = Simulated(stimuli=256, sites=40, repetitions=8, image_size=32).open()
    trials = np.stack([stimulus.trials for stimulus in recording.read(range(256))])
    estimate = components(trials)
    truth = np.array(recording.truth["reliability"])
    assert estimate.reliability.mean() == pytest.approx(truth.mean(), abs=0.015)
    # Closed forms: rho = ncsnr^2 / (ncsnr^2 + 1 / n), and the share of single trials is that of n = 1.
    ncsnr2 = truth / (1 - truth) / 8
    np.testing.assert_allclose(estimate.noise_ceiling.mean(), truth.mean(), atol=0.015)
    np.testing.assert_allclose((estimate.ncsnr**2).mean(), ncsnr2.mean(), rtol=0.08)
    np.testing.assert_allclose(estimate.explainable_share.mean(), (ncsnr2 / (ncsnr2 + 1)).mean(), atol=0.015)


def test_nsds_formula():
    """Allen et al. 2022, as written there for equal repetitions, on responses whose total variance is known."""
    estimate = components(simulate(3, 4, stimuli=4000))
    assert estimate.ncsnr.mean() == pytest.approx(0.5, abs=0.01)  # signal sd 1, noise sd 2
    np.testing.assert_allclose(estimate.noise_ceiling, estimate.ncsnr**2 / (estimate.ncsnr**2 + 1 / 3), rtol=1e-12)


def test_components_of_too_little_data_are_not_invented():
    trials = simulate(4, 1, stimuli=20, sites=5)
    trials[:, :, 1] = np.nan  # never recorded
    trials[:, 1:, 2] = np.nan  # one repetition of each stimulus
    trials[3:, :, 3] = np.nan  # three stimuli
    trials[:, :, 4] = 0.1  # always the same
    estimate = components(trials)
    assert np.isnan(estimate.reliability).tolist() == [False, True, True, True, True]
    ceiling = estimate_ceiling([trials])
    assert np.isnan(ceiling.reliability).tolist() == [False, True, True, True, True]
    assert [value is None for value in ceiling.ci95] == [False, True, True, True, True]


def test_blocks_of_sites_have_the_ceilings_that_all_sites_have_at_once():
    trials = simulate(4, 2, stimuli=40, sites=7)
    trials[::3, -1] = np.nan
    trials[:, 1:, 2] = np.nan
    blocks = (trials[:, :, first : first + 3] for first in range(0, 7, 3))
    at_once, in_blocks = estimate_ceiling([trials]), estimate_ceiling(blocks)
    for name in ("repetitions", "reliability", "split_half", "ncsnr", "noise_ceiling", "explainable_share"):
        np.testing.assert_allclose(getattr(in_blocks, name), getattr(at_once, name), rtol=1e-9, err_msg=name)
    np.testing.assert_allclose(in_blocks.mean_ci95, at_once.mean_ci95, rtol=1e-9)
    assert [interval is None for interval in in_blocks.ci95] == [k == 2 for k in range(7)]


def test_noise_free_and_pure_noise_components():
    assert components(np.repeat(simulate(2, 1, stimuli=50)[:, :1], 5, axis=1)).reliability == pytest.approx(1)
    noise = np.random.default_rng(0).normal(size=(60, 6, 2000))
    assert abs(components(noise).reliability.mean()) < 0.02
    assert components(noise).noise_ceiling.min() == 0


def test_the_interval_holds_the_truth_as_often_as_it_says():
    held = []
    for seed in range(40):
        intervals = estimate_ceiling([simulate(4, 4, 100, 5, seed)]).ci95
        held += [low <= 0.5 <= high for low, high in intervals]
    assert 0.88 < np.mean(held) < 0.99


@pytest.mark.parametrize("stimuli", [4, 6, 8, 12, 30])
def test_an_interval_of_few_stimuli_holds_its_estimate_and_ends_at_1(stimuli):
    ceiling = estimate_ceiling([simulate(40, 4, stimuli, 200, seed=1)])
    for reliability, interval in zip(ceiling.reliability, ceiling.ci95, strict=True):
        assert interval is None or interval[0] <= reliability <= interval[1] <= 1
    if stimuli >= 12:
        assert None not in ceiling.ci95


def test_the_noise_of_an_average_seen_once_is_that_of_the_others():
    trials = simulate(4, 2, stimuli=50, sites=3)
    trials[0, 1:] = np.nan
    noise = TrialStatistics.from_trials(trials).noise_of_average()
    rest = np.nanvar(trials[1:], axis=1, ddof=1)
    np.testing.assert_allclose(noise[1:], rest / 4)
    np.testing.assert_allclose(noise[0], rest.mean(axis=0))


@pytest.mark.skipif(not (DATA / "v4_hvm640").is_dir(), reason="the real recordings are not here")
def test_the_known_reliability_of_a_real_recording():
    rho = split_half_reliability(np.load(DATA / "v4_hvm640" / "trials.npy"), random_splits=20)
    assert rho.shape == (50,)
    assert np.median(rho) == pytest.approx(0.75, abs=0.02)
    assert rho.max() < 1
    unbiased = components(np.load(DATA / "v4_hvm640" / "trials.npy")).reliability
    assert np.median(unbiased) == pytest.approx(0.75, abs=0.02)


@pytest.mark.skipif(not (DATA / "it_rasters_zd.npz").is_file(), reason="the real recordings are not here")
def test_the_known_reliabilities_of_real_it_units_in_four_windows():
    """A reference, of halves that take the same repetitions of all stimuli, has 0.07, 0.50, 0.66 and 0.72."""
    with np.load(DATA / "it_rasters_zd.npz", allow_pickle=False) as file:
        rasters, first = file["rasters"], file["t_ms"][0]
    windows, known = [(0, 70), (70, 170), (100, 200), (170, 270)], (0.07, 0.50, 0.66, 0.72)
    trials = [raster_counts(rasters, first, window).transpose(1, 2, 0) for window in windows]
    medians = [np.nanmedian(components(counts).reliability) for counts in trials]
    np.testing.assert_allclose(medians, known, atol=0.035)
    correlations = [split_half_correlations(counts, 100).mean(axis=0) for counts in trials]
    np.testing.assert_allclose([np.nanmedian(2 * r / (1 + r)) for r in correlations], known, atol=0.035)
