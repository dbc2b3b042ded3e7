"""Metrics of other papers equal independent implementations, and hold the truth of simulated sites."""

import numpy as np
import pytest
import torch
from scipy import stats
from site_scores import SITE_IDS, SITES, assert_same_scores, make_predictions, moments, report

from data_prep.ceiling import TrialStatistics, split_half_reliability
from data_prep.confidence_interval import percentile_interval
from train.evaluation.confidence_intervals import bootstrap_scores
from train.evaluation.metrics import all_scores
from train.evaluation.metrics_report import regression_report
from train.evaluation.moments import SiteMoments

# ------------------------------------------------------------------------------------------------ squared correlation


def test_the_squared_correlation_is_scipys():
    prediction, target = make_predictions(missing=0.3)
    expected = []
    for p, y in zip(prediction.T.astype(np.float64), target.T.astype(np.float64), strict=True):
        expected.append(stats.pearsonr(p[~np.isnan(y)], y[~np.isnan(y)]).statistic ** 2)
    block = report(prediction, target)["squared_pearson_r"]
    np.testing.assert_allclose(block["per_site"], expected, rtol=1e-10)
    assert block["mean"] == pytest.approx(np.mean(expected), rel=1e-10)
    assert block["median"] == pytest.approx(np.median(expected), rel=1e-10)


def test_the_interval_of_the_median_is_that_of_an_explicit_resampling():
    prediction, target = make_predictions(stimuli=120, sites=7)
    resampled = bootstrap_scores(prediction, target).medians["squared_pearson_r"]
    rng, explicit = np.random.default_rng(1), []
    for _ in range(600):
        rows = rng.integers(0, len(target), len(target))
        per_site = []
        for p, y in zip(prediction[rows].T.astype(np.float64), target[rows].T.astype(np.float64), strict=True):
            per_site.append(np.corrcoef(p[~np.isnan(y)], y[~np.isnan(y)])[0, 1] ** 2)
        explicit.append(np.median(per_site))
    assert np.mean(resampled) == pytest.approx(np.mean(explicit), abs=4 * np.std(explicit) / np.sqrt(600))
    assert np.std(resampled) == pytest.approx(np.std(explicit), rel=0.15)


def test_medians_and_their_intervals_leave_out_sites_without_a_score():
    prediction, target = make_predictions()
    target[:, 1] = np.nan
    target[:, 2] = 3.0
    block = report(prediction, target)
    without = report(*(np.delete(values, [1, 2], axis=1) for values in (prediction, target)))
    for name in ("pearson_r", "squared_pearson_r"):
        assert block[name]["median"] == pytest.approx(without[name]["median"], rel=1e-12)
        assert block[name]["median_ci95"] == pytest.approx(without[name]["median_ci95"], rel=1e-9)
    constant = report(np.full_like(target, 2.0), target)["squared_pearson_r"]
    assert (constant["median"], constant["median_ci95"]) == (None, None)


@pytest.mark.parametrize(("stimuli", "strongest"), [(50, 1.5), (150, 1.5), (150, 0.1)])
def test_the_intervals_of_medians_hold_the_truth_as_often_as_they_say_or_more(stimuli, strongest):
    """Sites with signals of different strength, a fifth of a unit that is not predicted, and four trials."""
    draws, sites, rng = 100, 25, np.random.default_rng(3)
    weights = np.sqrt(np.linspace(strongest / 15, strongest, sites))
    truth = {
        "squared_pearson_r": np.median(weights**2 / (weights**2 + 0.7)),
        "r2_er": np.median(weights**2 / (weights**2 + 0.2)),
    }
    held = dict.fromkeys(truth, 0)
    for _ in range(draws):
        signal = rng.normal(size=(stimuli, sites)) * weights
        rate = signal + rng.normal(0, np.sqrt(0.2), signal.shape)
        statistics = TrialStatistics.from_trials(rate[:, None] + rng.normal(0, np.sqrt(2), (stimuli, 4, sites)))
        resampled = bootstrap_scores(signal, statistics.average, noise=statistics.noise_of_average())
        for metric, median in truth.items():
            low, high = percentile_interval(resampled.medians[metric], stimuli)
            held[metric] += low <= median <= high
    assert min(held.values()) >= 89  # of 100, with three standard deviations of a share of 95 %


# -------------------------------------------------------------------------------------------------------------- r2_ER


def published_r2_er(prediction, trials):
    """r2_ER of one site as the paper states it: prediction (stimuli,), trials (stimuli, repetitions)."""
    stimuli, repetitions = trials.shape
    sigma2 = np.mean([np.var(of_stimulus, ddof=1) for of_stimulus in trials])
    x = prediction - prediction.mean()
    y = trials.mean(axis=1) - trials.mean()
    numerator = (x @ y) ** 2 - sigma2 / repetitions * (x @ x)
    return numerator / ((x @ x) * (y @ y) - (stimuli - 1) * sigma2 / repetitions * (x @ x))


def simulated(share, stimuli=1000, repetitions=4, sites=300, noise="normal", seed=0):
    """A prediction whose squared correlation with the noise-free rates is exactly `share` at each site, and trials.

    Each site is a draw of the same experiment: the signal's variance is 1, the noise of a trial 2.

    Returns:
        prediction (stimuli, sites), trials (stimuli, repetitions, sites).
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(size=stimuli)
    x = (x - x.mean()) / x.std()
    other = rng.normal(size=(stimuli, sites))
    other -= other.mean(axis=0) + np.outer(x, x @ other) / stimuli
    rate = np.sqrt(share) * x[:, None] + np.sqrt(1 - share) * other / other.std(axis=0)
    if noise == "poisson":  # the variance of a count is its mean, so stimuli differ in noise
        counts = rng.poisson((18 + 3 * rate)[:, None].repeat(repetitions, 1)).astype(np.float64)
        return np.repeat(x[:, None], sites, 1), counts
    return np.repeat(x[:, None], sites, 1), rate[:, None] + rng.normal(0, np.sqrt(2), (stimuli, repetitions, sites))


def scored(prediction, trials):
    statistics = TrialStatistics.from_trials(trials)
    return all_scores(moments(prediction, statistics.average), None, statistics.noise_of_average().mean(axis=0))


def test_r2_er_is_that_of_the_paper():
    prediction, trials = simulated(0.4, stimuli=50, repetitions=5, sites=8)
    expected = [published_r2_er(prediction[:, site], trials[..., site]) for site in range(8)]
    np.testing.assert_allclose(scored(prediction, trials)["r2_er"], expected, rtol=1e-10)


@pytest.mark.parametrize("noise", ["normal", "poisson"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
def test_r2_er_is_unbiased_where_the_plain_one_is_not(share, noise):
    mine = scored(*simulated(share, noise=noise))
    error = mine["r2_er"].std() / np.sqrt(300)
    assert mine["r2_er"].mean() == pytest.approx(share, abs=2 * error)
    assert error < 0.003
    plain = mine["squared_pearson_r"]
    expected = share / 1.5  # the noise of the average of four trials is half the signal
    assert plain.mean() == pytest.approx(expected, abs=0.005)
    if share:
        assert plain.mean() < share - 20 * error


def test_r2_er_is_unbiased_with_unequal_numbers_of_repetitions():
    prediction, trials = simulated(0.6, repetitions=6)
    for stimulus in range(0, len(trials), 2):
        trials[stimulus, 2:] = np.nan
    r2_er = scored(prediction, trials)["r2_er"]
    assert r2_er.mean() == pytest.approx(0.6, abs=2 * r2_er.std() / np.sqrt(300))


def test_r2_er_ignores_mean_and_scale_of_the_prediction_unlike_feve():
    prediction, trials = simulated(0.6, stimuli=200, sites=4)
    near, far = scored(prediction, trials), scored(-3 * prediction + 50, trials)
    np.testing.assert_allclose(far["r2_er"], near["r2_er"], rtol=1e-9)
    assert (far["feve"] < -100).all()


def test_sites_without_explainable_variance_or_with_a_constant_prediction_have_no_r2_er():
    prediction, trials = simulated(0.5, stimuli=200, sites=3)
    prediction[:, 0] = 1.0
    trials[..., 1] = np.random.default_rng(0).normal(size=trials.shape[:2])
    assert np.isnan(scored(prediction, trials)["r2_er"]).tolist() == [True, True, False]


@pytest.mark.parametrize("constant", [0.1, 7.3])
def test_sites_without_r2_have_no_score_relative_to_a_ceiling_either(constant):
    """Those that a model cannot be fitted to, and those whose responses are the same but for rounding."""
    prediction, trials = simulated(0.5, stimuli=200, sites=3)
    trials[..., 1] = constant
    statistics = TrialStatistics.from_trials(trials)
    noise = statistics.noise_of_average()
    block = regression_report(
        moments(prediction, statistics.average),
        prediction,
        statistics.average,
        ["untrained", "constant", "fine"],
        np.full(3, 0.7),
        trained=np.array([False, True, True]),
        noise=noise,
        split_half=np.full(3, 0.7),
    )
    assert block["sites_without_r2"] == ["untrained", "constant"]
    for name in ("squared_pearson_r", "ceiled_pearson_r", "feve", "r2_er"):
        assert [score is None for score in block[name]["per_site"]] == [True, True, False], name
        assert block[name]["mean"] == block[name]["per_site"][2]


def test_the_metrics_do_not_depend_on_how_ranks_share_the_stimuli():
    prediction, target = make_predictions(stimuli=101)
    reliability, noise = np.full(SITES, 0.7), np.full(SITES, 0.4)
    at_once = all_scores(moments(prediction, target), reliability, noise)
    for ranks in (2, 3):
        merged = SiteMoments.zeros(SITES)
        for rank in range(ranks):
            share = slice(rank, None, ranks)
            merged = merged.merge(SiteMoments.of(torch.from_numpy(prediction[share]), torch.from_numpy(target[share])))
        assert_same_scores(all_scores(merged, reliability, noise), at_once)


# -------------------------------------------------------------------------------------------------------- Brain-Score


def brain_score_by_hand(prediction, trials, splits=200):
    """r and the ceiling as Brain-Score computes them: repetitions halved, medians over sites, mean over splits."""
    rng, repetitions = np.random.default_rng(5), trials.shape[1]
    average = trials.mean(axis=1)
    sites = range(average.shape[1])
    r = np.median([stats.pearsonr(prediction[:, site], average[:, site]).statistic for site in sites])
    ceilings = []
    for _ in range(splits):
        order = rng.permutation(repetitions)
        first = trials[:, order[: repetitions // 2]].mean(axis=1)
        second = trials[:, order[repetitions // 2 :]].mean(axis=1)
        halves = np.array([stats.pearsonr(first[:, site], second[:, site]).statistic for site in sites])
        ceilings.append(np.median(2 * halves / (1 + halves)))
    return r, np.mean(ceilings)


def brain_score_of(prediction, trials):
    average = trials.mean(axis=1)
    site_ids = [f"n{site}" for site in range(average.shape[1])]
    split_half = split_half_reliability(trials)
    block = regression_report(
        moments(prediction, average), prediction, average, site_ids, split_half, split_half=split_half
    )
    return block["brain_score"]


def test_brain_scores_are_those_of_brain_score():
    prediction, trials = simulated(0.5, stimuli=300, repetitions=8, sites=15)
    mine = brain_score_of(prediction, trials)
    r, ceiling = brain_score_by_hand(prediction, trials)
    assert mine["median_pearson_r"] == pytest.approx(r, rel=1e-10)
    assert mine["median_ceiling"] == pytest.approx(ceiling, abs=0.005)
    assert mine["score"] == pytest.approx(r**2 / ceiling, rel=0.01)
    assert mine["before_2026_01"]["score"] == pytest.approx((r / ceiling) ** 2, rel=0.02)
    assert mine["before_2019_07"]["score"] == pytest.approx(r / ceiling, rel=0.01)
    for form in (mine, mine["before_2026_01"], mine["before_2019_07"]):
        low, high = form["ci95"]
        assert low < form["score"] < high


def test_only_the_current_brain_score_of_a_perfect_model_is_one():
    """Signal 1, noise of the average 0.5: rho is 2/3, and r of the true rates is its square root."""
    mine = brain_score_of(*simulated(1.0, sites=40))
    assert mine["score"] == pytest.approx(1, abs=0.02)
    assert mine["before_2026_01"]["score"] == pytest.approx(1.5, abs=0.05)
    assert mine["before_2019_07"]["score"] == pytest.approx(np.sqrt(1.5), abs=0.03)


def test_a_brain_score_leaves_out_sites_without_a_correlation_and_needs_a_ceiling():
    prediction, target = make_predictions()
    target[:, 1] = np.nan
    split_half = np.array([0.9, 0.1, 0.8, 0.7, np.nan, 0.6])
    block = regression_report(moments(prediction, target), prediction, target, SITE_IDS, None, split_half=split_half)
    assert block["brain_score"]["median_ceiling"] == pytest.approx(0.75)
    assert block["brain_score"]["median_pearson_r"] == block["pearson_r"]["median"]
    noise_only = np.full(SITES, -0.1)
    block = regression_report(moments(prediction, target), prediction, target, SITE_IDS, None, split_half=noise_only)
    assert (block["brain_score"]["score"], block["brain_score"]["ci95"]) == (None, None)
    assert "brain_score" not in report(prediction, target)
