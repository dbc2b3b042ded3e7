"""The metrics: equal to scikit-learn's, to the last digits, however the stimuli are dealt out to ranks."""

import json
from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    explained_variance_score,
    mean_squared_error,
    r2_score,
    recall_score,
    top_k_accuracy_score,
)

from data_prep.ceiling import percentile_interval
from data_prep.common.errors import RunFailed
from train.evaluation.classification import ClassCounts, classification_report
from train.evaluation.confidence_intervals import bootstrap_means
from train.evaluation.metrics import fraction_of_explainable_variance, site_scores
from train.evaluation.metrics_report import regression_report
from train.evaluation.moments import SiteMoments

settings.register_profile("unhurried", deadline=None)  # the machine may be busy
settings.load_profile("unhurried")

STIMULI, SITES = 90, 6
SITE_IDS = [f"n{k}" for k in range(SITES)]


def made(stimuli=STIMULI, sites=SITES, missing=0.2, seed=0):
    """Predictions and responses, float32 (stimuli, sites); a share of the responses is NaN, but for site 0."""
    rng = np.random.default_rng(seed)
    target = rng.normal(10, 2, (stimuli, sites))
    prediction = 0.6 * target + rng.normal(3, 1.2, (stimuli, sites))
    gone = rng.uniform(size=target.shape) < missing
    gone[:, 0] = False
    target[gone] = np.nan
    return prediction.astype(np.float32), target.astype(np.float32)


def moments(prediction, target, weight=None):
    """All stimuli taken in at once by one rank."""
    weight = None if weight is None else torch.from_numpy(weight)
    return SiteMoments.of(torch.from_numpy(prediction), torch.from_numpy(target), weight)


def scores(prediction, target):
    return site_scores(moments(prediction, target))


def report(prediction, target, ceiling=None):
    block = regression_report(moments(prediction, target), prediction, target, SITE_IDS, ceiling)
    json.dumps(block, allow_nan=False)
    return block


def by_sklearn(prediction, target):
    """The same four scores per site from scikit-learn and numpy."""
    expected = {"r2": [], "explained_variance": [], "mse": [], "pearson_r": []}
    for p, y in zip(prediction.T.astype(np.float64), target.T.astype(np.float64), strict=True):
        p, y = p[~np.isnan(y)], y[~np.isnan(y)]
        expected["r2"].append(r2_score(y, p))
        expected["explained_variance"].append(explained_variance_score(y, p))
        expected["mse"].append(mean_squared_error(y, p))
        expected["pearson_r"].append(np.corrcoef(y, p)[0, 1])
    return expected


def assert_same_scores(one, other, rtol=1e-9):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=rtol, atol=1e-12, err_msg=name)


# ---- per site ------------------------------------------------------------------------------------------------------


def test_scores_are_scikit_learns():
    prediction, target = made(missing=0)
    mine = scores(prediction, target)
    y, p = target.astype(np.float64), prediction.astype(np.float64)
    np.testing.assert_allclose(mine["r2"], r2_score(y, p, multioutput="raw_values"), rtol=1e-10)
    np.testing.assert_allclose(
        mine["explained_variance"], explained_variance_score(y, p, multioutput="raw_values"), rtol=1e-10
    )
    np.testing.assert_allclose(mine["mse"], mean_squared_error(y, p, multioutput="raw_values"), rtol=1e-10)
    r = [np.corrcoef(y[:, k], p[:, k])[0, 1] for k in range(SITES)]
    np.testing.assert_allclose(mine["pearson_r"], r, rtol=1e-10)


def test_responses_that_are_missing_are_left_out_per_site():
    prediction, target = made(missing=0.4)
    assert_same_scores(scores(prediction, target), by_sklearn(prediction, target))


def test_the_mean_is_scikit_learns_uniform_average():
    prediction, target = made(missing=0)
    block = report(prediction, target)
    expected = r2_score(target.astype(np.float64), prediction.astype(np.float64), multioutput="uniform_average")
    assert block["r2"]["mean"] == pytest.approx(expected, rel=1e-10)
    assert block["r2"]["median"] == pytest.approx(np.median(block["r2"]["per_site"]), rel=1e-12)


def test_a_large_offset_does_not_cancel():
    """Multiples of 1/1024 stay exact when a million is added, so that nothing but the arithmetic can differ."""
    prediction, target = (np.round(x.astype(np.float64) * 1024) / 1024 for x in made())
    near = scores(prediction, target)
    assert_same_scores(scores(prediction + 1e6, target + 1e6), near)
    parts = [moments(prediction[i::7] + 1e6, target[i::7] + 1e6) for i in range(7)]
    assert_same_scores(site_scores(reduce(SiteMoments.merge, parts)), near)
    sites_far_apart = 1e6 * np.arange(SITES)
    assert_same_scores(scores(prediction + sites_far_apart, target + sites_far_apart), near)


def test_a_prediction_far_off_is_scored_as_such():
    prediction, target = made(missing=0)
    near, far = scores(prediction, target), scores(prediction + np.float32(4096), target)
    np.testing.assert_allclose(far["explained_variance"], near["explained_variance"], rtol=1e-3)
    np.testing.assert_allclose(far["mse"], np.full(SITES, 4096.0**2), rtol=1e-2)
    assert far["r2"].max() < -1e5


def test_constant_responses_have_no_r2():
    prediction, target = made()
    for site, value in ((2, 0.0), (3, 0.1), (4, 1234.5)):
        target[:, site] = value
    block = report(prediction, target)
    for name in ("r2", "explained_variance", "pearson_r"):
        assert [score is None for score in block[name]["per_site"]] == [False, False, True, True, True, False]
        rest = [score for score in block[name]["per_site"] if score is not None]
        assert block[name]["mean"] == pytest.approx(np.mean(rest), rel=1e-12)
        low, high = block[name]["ci95"]
        assert low < block[name]["mean"] < high
    assert None not in block["mse"]["per_site"]
    assert block["sites_without_r2"] == ["n2", "n3", "n4"]


def test_responses_constant_but_for_rounding_have_no_r2_and_do_not_spoil_the_interval():
    prediction, target = made()
    target[:, 2] = np.float32(10.3)
    target[::49, 2] = np.nextafter(np.float32(10.3), np.float32(11))
    block = report(prediction, target)
    assert block["sites_without_r2"] == ["n2"]
    low, high = block["r2"]["ci95"]
    assert low < block["r2"]["mean"] < high
    assert low > -10


def test_a_site_never_recorded_has_no_score():
    prediction, target = made()
    target[:, 1] = np.nan
    block = report(prediction, target)
    assert all(block[name]["per_site"][1] is None for name in ("r2", "explained_variance", "mse", "pearson_r"))
    assert block["sites_without_r2"] == ["n1"]


def test_no_list_of_sites_without_r2_where_all_have_one():
    assert "sites_without_r2" not in report(*made())


@pytest.mark.parametrize("value", [0.1, 9.7])
def test_constant_predictions_have_no_pearson_r(value):
    _, target = made()
    block = report(np.full_like(target, value), target)
    assert block["pearson_r"]["per_site"] == [None] * SITES
    assert block["pearson_r"]["mean"] is None
    assert block["pearson_r"]["ci95"] is None
    assert max(block["r2"]["per_site"]) <= 0


def test_a_prediction_that_is_not_a_number_does_not_flatter_the_mean():
    """To leave the site out, as if its responses were constant, could raise the score of a model that diverged."""
    prediction, target = made()
    prediction[3, 0] = np.nan
    with pytest.raises(RunFailed, match="NaN"):
        report(prediction, target)


# ---- ranks ---------------------------------------------------------------------------------------------------------


@st.composite
def partitions(draw):
    """Which of 1, 2, 3, 7 or 64 ranks sees each stimulus, and in batches of how many; ranks may see none."""
    ranks = draw(st.sampled_from([1, 2, 3, 7, 64]))
    used = draw(st.lists(st.integers(0, ranks - 1), min_size=1, max_size=ranks))
    return ranks, draw(st.lists(st.sampled_from(used), min_size=STIMULI, max_size=STIMULI)), draw(st.integers(1, 40))


@settings(max_examples=60)
@given(partitions(), st.sampled_from([0.0, 5000.0]))
def test_any_partition_over_ranks_gives_the_same(partition, offset):
    ranks, rank_of, size = partition
    prediction, target = made(missing=0.3)
    target += np.float32(offset)
    prediction += np.float32(offset)
    per_rank = []
    for rank in range(ranks):
        mine = np.flatnonzero(np.array(rank_of) == rank)
        merged = SiteMoments.zeros(SITES)
        for start in range(0, len(mine), size):
            batch = mine[start : start + size]
            merged = merged.merge(moments(prediction[batch], target[batch]))
        per_rank.append(merged)
    assert_same_scores(site_scores(reduce(SiteMoments.merge, per_rank)), scores(prediction, target))


def test_weight_zero_leaves_a_stimulus_out_whatever_it_holds():
    prediction, target = made()
    padded_p = np.concatenate([prediction, np.full((5, SITES), np.nan, np.float32)])
    padded_y = np.concatenate([target, np.full((5, SITES), 1e30, np.float32)])
    weight = np.repeat(np.array([1, 0], np.float32), [STIMULI, 5])
    assert_same_scores(site_scores(moments(padded_p, padded_y, weight)), scores(prediction, target), rtol=1e-12)


def test_no_stimuli_give_no_scores_and_change_nothing():
    prediction, target = made()
    nothing = SiteMoments.zeros(SITES)
    assert all(np.isnan(values).all() for values in site_scores(nothing).values())
    joined = nothing.merge(moments(prediction, target)).merge(nothing)
    assert_same_scores(site_scores(joined), scores(prediction, target), rtol=1e-14)


# ---- intervals -----------------------------------------------------------------------------------------------------


def test_intervals_hold_the_point_estimates():
    block = report(*made())
    for name in ("r2", "explained_variance", "mse", "pearson_r"):
        low, high = block[name]["ci95"]
        assert low < block[name]["mean"] < high


def test_what_is_the_same_on_every_resample_has_no_spread():
    """A prediction that is off by a constant: EV and r are 1 and MSE the square, whichever stimuli are drawn."""
    _, target = made()
    resampled = bootstrap_means(target.astype(np.float64) + 3, target, resamples=100)
    for name, value in (("explained_variance", 1), ("pearson_r", 1), ("mse", 9)):
        np.testing.assert_allclose(resampled[name], value, rtol=1e-9)
    assert np.ptp(resampled["r2"]) > 0.1


def test_resampled_means_are_those_of_an_explicit_resampling():
    prediction, target = made(stimuli=120)
    mine = bootstrap_means(prediction, target, resamples=2000)
    rng = np.random.default_rng(1)
    explicit = {name: [] for name in mine}
    for _ in range(600):
        rows = rng.integers(0, len(target), len(target))
        for name, values in scores(prediction[rows], target[rows]).items():
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
        low, high = percentile_interval(resampled[name])
        assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15), name


def test_sites_that_share_their_noise_do_not_narrow_the_interval():
    prediction, target = made(sites=1)
    one = np.std(bootstrap_means(prediction, target)["r2"])
    copies = np.std(bootstrap_means(np.repeat(prediction, 9, 1), np.repeat(target, 9, 1))["r2"])
    independent = np.std(bootstrap_means(*made(sites=9, missing=0))["r2"])
    assert copies == pytest.approx(one, rel=1e-9)
    assert independent < 0.6 * one


def test_intervals_are_the_same_every_time():
    prediction, target = made()
    assert report(prediction, target) == report(prediction, target)


# ---- ceilings ------------------------------------------------------------------------------------------------------


def test_scores_are_divided_by_the_ceiling_that_bounds_them():
    prediction, target = made()
    ceiling = np.array([0.9, 0.5, 0.05, np.nan, 0.1, -0.2])
    block = report(prediction, target, ceiling)
    reliable = [0, 1, 4]
    for name, raw, bound in (
        ("ceiled_explained_variance", "explained_variance", ceiling),
        ("ceiled_pearson_r", "pearson_r", np.sqrt(np.abs(ceiling))),
    ):
        per_site = block[name]["per_site"]
        assert [k for k in range(SITES) if per_site[k] is not None] == reliable
        expected = [block[raw]["per_site"][k] / bound[k] for k in reliable]
        np.testing.assert_allclose([per_site[k] for k in reliable], expected, rtol=1e-12)
        assert block[name]["mean"] == pytest.approx(np.mean(expected), rel=1e-12)
    assert block["unreliable_sites"] == ["n2", "n3", "n5"]
    assert block["ceiling"]["per_site"] == [0.9, 0.5, 0.05, None, 0.1, -0.2]
    assert None not in block["explained_variance"]["per_site"]  # the plain scores keep every site


def test_without_a_ceiling_nothing_is_ceiled():
    assert not [name for name in report(*made()) if "ceil" in name or "reliab" in name]


def test_a_perfect_model_of_noisy_responses_reaches_its_ceiling():
    """The mean rates themselves as prediction: ceiled EV and ceiled r are 1, up to sampling."""
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 1, (4000, SITES))
    responses = truth + rng.normal(0, 1, truth.shape)
    block = report(truth, responses, np.full(SITES, 0.5))
    assert block["ceiled_explained_variance"]["mean"] == pytest.approx(1, abs=0.03)
    assert block["ceiled_pearson_r"]["mean"] == pytest.approx(1, abs=0.02)


def test_feve_of_single_trials_and_of_averages_are_the_same():
    """Cadena et al. 2019 define it on single trials: 1 - (MSE - noise) / (Var - noise), noise within stimuli."""
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 1, (500, SITES))
    trials = truth[:, None] + rng.normal(0, 2, (500, 6, SITES))
    prediction = (0.8 * truth + 0.1).astype(np.float32)
    target = trials.mean(axis=1).astype(np.float32)
    noise = trials.var(axis=1, ddof=1) / 6
    block = regression_report(moments(prediction, target), prediction, target, SITE_IDS, None, noise=noise)
    within = trials.var(axis=1, ddof=1).mean(axis=0)
    error = np.square(trials - prediction[:, None]).mean(axis=(0, 1))
    explainable = target.astype(np.float64).var(axis=0, ddof=1) - within / 6
    np.testing.assert_allclose(block["feve"]["per_site"], 1 - (error - within) / explainable, rtol=1e-5)
    low, high = block["feve"]["ci95"]
    assert low < block["feve"]["mean"] < high
    perfect = fraction_of_explainable_variance(moments(truth.astype(np.float32), target), noise.mean(axis=0))
    assert perfect.mean() == pytest.approx(1, abs=0.03)


def test_sites_without_explainable_variance_have_no_feve():
    rng = np.random.default_rng(0)
    target = rng.normal(0, 1, (200, 2)).astype(np.float32)
    found = fraction_of_explainable_variance(moments(0 * target, target), np.array([0.5, 0.99]))
    assert np.isnan(found).tolist() == [False, True]


# ---- classification ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_classification_is_scikit_learns(ranks):
    rng = np.random.default_rng(0)
    classes, n = 12, 101
    names = [f"object {k}" for k in range(classes)]
    labels = rng.integers(0, classes - 1, n)  # the last class is never shown
    logits = rng.normal(size=(n, classes)).astype(np.float32)
    logits[np.arange(n), labels] += 1.5
    counts = ClassCounts.zeros(classes)
    for rank in range(ranks):
        mine = np.arange(n)[rank::ranks]
        padded = np.concatenate([mine, np.zeros(3, int)])
        weight = torch.tensor([1.0] * len(mine) + [0.0] * 3)
        half = len(padded) // 2
        for part in (slice(None, half), slice(half, None)):
            counts.add(torch.from_numpy(logits[padded[part]]), torch.from_numpy(labels[padded[part]]), weight[part])
    block = classification_report(counts, names)
    guess = logits.argmax(axis=1)
    assert block["top1"] == pytest.approx(accuracy_score(labels, guess))
    assert block["top5"] == pytest.approx(top_k_accuracy_score(labels, logits, k=5, labels=range(classes)))
    assert block["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, guess))
    recall = recall_score(labels, guess, labels=range(classes - 1), average=None)
    assert block["per_class"] == pytest.approx(dict(zip(names, recall, strict=False)))
    json.dumps(block, allow_nan=False)


def test_fewer_classes_than_five():
    counts = ClassCounts.zeros(3)
    counts.add(torch.tensor([[3.0, 1, 2], [1, 3, 2]]), torch.tensor([0, 0]), torch.ones(2))
    block = classification_report(counts, ["a", "b", "c"])
    assert (block["top1"], block["top5"], block["per_class"]) == (0.5, 1.0, {"a": 0.5})
