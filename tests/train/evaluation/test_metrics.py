"""The metrics of responses equal scikit-learn's to the last digits; those with a ceiling are divided by their bound."""

import numpy as np
import pytest
from site_scores import SITE_IDS, SITES, assert_same_scores, by_sklearn, make_predictions, moments, report, scores
from sklearn.metrics import explained_variance_score, mean_squared_error, r2_score

from data_prep.common.errors import RunFailed
from train.evaluation.metrics import fraction_of_explainable_variance
from train.evaluation.metrics_report import regression_report


def test_scores_are_scikit_learns():
    prediction, target = make_predictions(missing=0)
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
    prediction, target = make_predictions(missing=0.4)
    assert_same_scores(scores(prediction, target), by_sklearn(prediction, target))


def test_the_mean_is_scikit_learns_uniform_average():
    prediction, target = make_predictions(missing=0)
    block = report(prediction, target)
    expected = r2_score(target.astype(np.float64), prediction.astype(np.float64), multioutput="uniform_average")
    assert block["r2"]["mean"] == pytest.approx(expected, rel=1e-10)
    assert block["r2"]["median"] == pytest.approx(np.median(block["r2"]["per_site"]), rel=1e-12)


def test_a_large_offset_does_not_cancel():
    """Multiples of 1/1024 stay exact when a million is added, so that nothing but the arithmetic can differ."""
    prediction, target = (np.round(x.astype(np.float64) * 1024) / 1024 for x in make_predictions())
    near = scores(prediction, target)
    assert_same_scores(scores(prediction + 1e6, target + 1e6), near)
    sites_far_apart = 1e6 * np.arange(SITES)
    assert_same_scores(scores(prediction + sites_far_apart, target + sites_far_apart), near)


def test_a_prediction_far_off_is_scored_as_such():
    prediction, target = make_predictions(missing=0)
    near, far = scores(prediction, target), scores(prediction + np.float32(4096), target)
    np.testing.assert_allclose(far["explained_variance"], near["explained_variance"], rtol=1e-3)
    np.testing.assert_allclose(far["mse"], np.full(SITES, 4096.0**2), rtol=1e-2)
    assert far["r2"].max() < -1e5


def test_constant_responses_have_no_r2():
    prediction, target = make_predictions()
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
    prediction, target = make_predictions()
    target[:, 2] = np.float32(10.3)
    target[::49, 2] = np.nextafter(np.float32(10.3), np.float32(11))
    block = report(prediction, target)
    assert block["sites_without_r2"] == ["n2"]
    low, high = block["r2"]["ci95"]
    assert low < block["r2"]["mean"] < high
    assert low > -10


def test_a_site_never_recorded_has_no_score():
    prediction, target = make_predictions()
    target[:, 1] = np.nan
    block = report(prediction, target)
    assert all(block[name]["per_site"][1] is None for name in ("r2", "explained_variance", "mse", "pearson_r"))
    assert block["sites_without_r2"] == ["n1"]


def test_no_list_of_sites_without_r2_where_all_have_one():
    assert "sites_without_r2" not in report(*make_predictions())


@pytest.mark.parametrize("value", [0.1, 9.7])
def test_constant_predictions_have_no_pearson_r(value):
    _, target = make_predictions()
    block = report(np.full_like(target, value), target)
    assert block["pearson_r"]["per_site"] == [None] * SITES
    assert block["pearson_r"]["mean"] is None
    assert block["pearson_r"]["ci95"] is None
    assert max(block["r2"]["per_site"]) <= 0


def test_a_prediction_that_is_not_a_number_does_not_flatter_the_mean():
    """Leaving the site out could raise the score of a model that diverged."""
    prediction, target = make_predictions()
    prediction[3, 0] = np.nan
    with pytest.raises(RunFailed, match="NaN"):
        report(prediction, target)


# ---- ceilings ------------------------------------------------------------------------------------------------------


def test_scores_are_divided_by_the_ceiling_that_bounds_them():
    prediction, target = make_predictions()
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
    assert not [name for name in report(*make_predictions()) if "ceil" in name or "reliab" in name]


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
    feve = fraction_of_explainable_variance(moments(0 * target, target), np.array([0.5, 0.99]))
    assert np.isnan(feve).tolist() == [False, True]
