"""Regression through Gram matrices against scikit-learn on the features; RSA and CKA against plain formulas."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.cross_decomposition import PLSRegression
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression, Ridge, RidgeCV

from data_prep.splits import folds
from train.evaluation.similarity import cka, dissimilarities, rsa
from train.regression.gram import ROUNDING, multiplied
from train.regression.kernel_regression import PENALTIES, FewFeatures, Gram, Method, centred, folded_r2, regress

FIT, HELD_OUT, FEATURES, SITES = 90, 31, 400, 6


@pytest.fixture(params=["random", "badly conditioned"])
def problem(request):
    """Features with a duplicated stimulus and a constant feature, responses, and the Gram matrices."""
    generator = np.random.default_rng(0)
    scale = np.ones(FEATURES) if request.param == "random" else np.logspace(0, -4, FEATURES)
    features = generator.normal(size=(FIT + HELD_OUT, FEATURES)) * scale + 5
    features[7], features[:, 11] = features[3], 2.5
    rates = features[:, :20] @ generator.normal(size=(20, SITES)) + generator.normal(size=(FIT + HELD_OUT, SITES))
    products = features @ features.T - 3  # shifted: centring must not mind
    return features, rates, centred(products, np.arange(FIT), np.arange(FIT, FIT + HELD_OUT))


def predicted(gram: Gram, rates: np.ndarray, method: Method) -> np.ndarray:
    """In float64, which `Fit.prediction` is not."""
    fit = regress(gram, rates, method)
    return gram.cross @ fit.dual + fit.mean


def assert_equal(found: np.ndarray, expected: np.ndarray, relative: float = 1e-6) -> None:
    assert np.abs(found - expected).max() <= relative * np.abs(expected).max()


@pytest.mark.parametrize("components", [1, 20, 60])
def test_least_squares_on_components(problem, components):
    features, rates, gram = problem
    pca = PCA(components, svd_solver="full").fit(features[:FIT])
    reference = LinearRegression().fit(pca.transform(features[:FIT]), rates[:FIT])
    expected = reference.predict(pca.transform(features[FIT:]))
    assert_equal(predicted(gram, rates[:FIT], Method("ols", components)), expected)


def test_least_squares_on_all_components_is_the_least_norm_solution(problem):
    features, rates, gram = problem
    mean = features[:FIT].mean(0)
    weights = np.linalg.lstsq(features[:FIT] - mean, rates[:FIT] - rates[:FIT].mean(0), rcond=1e-7)[0]
    expected = (features[FIT:] - mean) @ weights + rates[:FIT].mean(0)
    assert_equal(predicted(gram, rates[:FIT], Method("ols")), expected)


@pytest.mark.parametrize("components", [15, None])
def test_ridge_on_components_with_a_penalty_per_site(problem, components):
    features, rates, gram = problem
    pca = PCA(components or FIT - 2, svd_solver="full").fit(features[:FIT])
    fit, held_out = pca.transform(features[:FIT]), pca.transform(features[FIT:])
    found = regress(gram, rates[:FIT], Method("ridge", components))
    unit = np.trace(gram.fit) / FIT
    for site in range(SITES):
        choice = RidgeCV(alphas=PENALTIES * unit, gcv_mode="eigen").fit(fit, rates[:FIT, site])
        assert found.penalty[site] * unit == pytest.approx(choice.alpha_)
        reference = Ridge(alpha=choice.alpha_, solver="svd").fit(fit, rates[:FIT, site]).predict(held_out)
        assert_equal(gram.cross @ found.dual[:, site] + found.mean[site], reference)


def test_left_out_predictions_are_those_of_fits_without_the_stimulus():
    generator = np.random.default_rng(1)
    features = generator.normal(size=(25, 60))
    rates = features[:, :3] @ generator.normal(size=(3, 2)) + generator.normal(size=(25, 2))
    products = features @ features.T
    found = regress(centred(products, np.arange(25), np.arange(25)), rates, Method("ridge"))
    unit = np.square(features - features.mean(0)).sum() / 25
    for left in (0, 13):
        others = np.delete(np.arange(25), left)
        for site in range(2):
            model = Ridge(alpha=found.penalty[site] * unit, solver="svd").fit(features[others], rates[others, site])
            assert found.left_out[left, site] == pytest.approx(model.predict(features[[left]])[0], rel=1e-4)


def test_rounding_errors_of_float32_products_are_no_components():
    """Fewer features than stimuli: what lies beyond their number in the matrix is rounding, whatever it predicts."""
    generator = np.random.default_rng(0)
    features = (generator.normal(size=(120, 15)) + 3).astype(np.float32)
    rates = features @ generator.normal(size=(15, 4)) + 0.01 * generator.normal(size=(120, 4))
    centred_features = torch.from_numpy(features - features.mean(0, dtype=np.float64).astype(np.float32))
    everyone = np.arange(120)
    exact, rounded = (
        regress(
            centred(multiplied(centred_features, precision).numpy(), everyone, everyone, ROUNDING[precision]),
            rates,
            Method("ridge"),
        )
        for precision in ("float64", "float32")
    )
    np.testing.assert_allclose(rounded.inner_r2, exact.inner_r2, rtol=1e-5)
    np.testing.assert_allclose(rounded.penalty, exact.penalty)
    np.testing.assert_allclose(rounded.left_out, exact.left_out, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("latent", [2, 25])
def test_partial_least_squares(problem, latent):
    features, rates, gram = problem
    reference = PLSRegression(latent, scale=False, tol=1e-14, max_iter=10_000).fit(features[:FIT], rates[:FIT])
    found = predicted(gram, rates[:FIT], Method("pls", latent))
    assert_equal(found, reference.predict(features[FIT:]))


@pytest.mark.parametrize("kind", ["ridge", "ols", "pls"])
def test_sites_recorded_for_other_stimuli_are_fitted_on_theirs(kind):
    generator = np.random.default_rng(0)
    features = generator.normal(size=(47, 90)) * np.linspace(3, 0.1, 90)
    rates = features[:40, :5] @ generator.normal(size=(5, 4)) + 2 * generator.normal(size=(40, 4))
    rates[3:9, 1] = np.nan
    rates[:, 3] = np.nan
    method, everyone = Method(kind, 5), np.arange(40)
    products = features @ features.T
    found = regress(centred(products, everyone, np.arange(40, 47)), rates, method)
    there = np.flatnonzero(~np.isnan(rates[:, 1]))
    alone = regress(centred(products, there, np.arange(40, 47)), rates[there][:, [1]], method)
    np.testing.assert_allclose(found.prediction[:, 1], alone.prediction[:, 0], rtol=1e-5)
    assert (found.dual[3:9, 1] == 0).all()
    assert np.isnan(found.prediction[:, 3]).all()


@pytest.mark.parametrize("method", [Method("ridge"), Method("ridge", 9), Method("ols", 9)], ids=str)
def test_few_features_are_solved_as_their_gram_matrix_is(method):
    """A constant feature and two that are alike among them; sites that lack responses to different stimuli."""
    generator = np.random.default_rng(3)
    features = generator.normal(size=(FIT + HELD_OUT, 20)) * np.logspace(0, -2, 20) + 3
    features[:, 4], features[:, 5] = 1.5, features[:, 6]
    rates = features[:FIT] @ generator.normal(size=(20, SITES)) + generator.normal(size=(FIT, SITES))
    rates[:9, 0] = rates[5:30, 1] = np.nan
    gram = centred(features @ features.T, np.arange(FIT), np.arange(FIT, FIT + HELD_OUT), 1e-12)
    expected, found = (
        regress(gram, rates, method),
        regress(FewFeatures.centred(*np.split(features, [FIT])), rates, method),
    )
    for name, value in vars(expected).items():
        if value is not None:
            np.testing.assert_allclose(getattr(found, name), value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_folded_r2_is_that_of_predictions_from_the_other_folds():
    generator = np.random.default_rng(3)
    features = generator.normal(size=(30, 12))
    rates = features @ generator.normal(size=(12, 3)) + generator.normal(size=(30, 3))
    parts = folds(np.arange(30), 4, seed=0)
    assert sorted(np.concatenate(parts)) == list(range(30))
    expected = np.empty_like(rates)
    for part in parts:
        others = np.setdiff1d(np.arange(30), part)
        expected[part] = LinearRegression().fit(features[others], rates[others]).predict(features[part])
    found = folded_r2(features @ features.T, np.arange(30), rates, Method("ols"), parts)
    r2 = 1 - np.square(rates - expected).sum(0) / np.square(rates - rates.mean(0)).sum(0)
    np.testing.assert_allclose(found, r2, rtol=1e-5)


def test_folds_keep_groups_together_or_deal_them_out():
    groups = np.repeat(np.arange(12), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12])
    together = folds(groups, 3, seed=1)
    assert sorted(np.concatenate(together)) == list(range(len(groups)))
    owners = [set(groups[part]) for part in together]
    assert sum(map(len, owners)) == 12
    assert max(map(len, together)) - min(map(len, together)) <= 12
    dealt = folds(groups, 3, seed=1, stratified=True)
    for group in range(12):
        counts = [(groups[part] == group).sum() for part in dealt]
        assert max(counts) - min(counts) <= 1


def plain_hsic(a: np.ndarray, b: np.ndarray) -> float:
    """Equation 5 of Song et al. (2012), written out over ordered tuples of different stimuli."""
    n = len(a)
    index = np.arange(n)
    i, j, q, r = np.meshgrid(index, index, index, index, indexing="ij")
    different = (i != j) & (i != q) & (i != r) & (j != q) & (j != r) & (q != r)
    i, j, q, r = i[different], j[different], q[different], r[different]
    return float(np.mean(a[i, j] * (b[i, j] + b[q, r] - 2 * b[i, q])))


def test_cka_equals_its_definition_over_tuples():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(9, 5)), generator.normal(size=(9, 3))
    a, b = x @ x.T, y @ y.T
    expected = plain_hsic(a, b) / np.sqrt(plain_hsic(a, a) * plain_hsic(b, b))
    assert cka(a, b) == pytest.approx(expected)
    shifted = x + generator.normal(size=5)
    assert cka(shifted @ shifted.T, b) == pytest.approx(expected)
    assert cka(a, a) == pytest.approx(1)


def test_cka_of_unrelated_representations_is_about_zero_however_many_features():
    generator = np.random.default_rng(0)
    values = []
    for _ in range(30):
        x, y = generator.normal(size=(40, 2000)), generator.normal(size=(40, 30))
        values.append(cka(x @ x.T, y @ y.T))
    assert abs(np.mean(values)) < 0.02


def test_rsa_is_the_rank_correlation_of_cosine_distances():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(20, 50)), np.round(generator.normal(size=(20, 7)))
    pairs = np.triu_indices(20, k=1)

    def distances(patterns):
        patterns = patterns - patterns.mean(0)
        unit = patterns / np.linalg.norm(patterns, axis=1, keepdims=True)
        return np.round(1 - (unit @ unit.T)[pairs], 10)

    np.testing.assert_allclose(dissimilarities(x @ x.T), distances(x), atol=1e-9)
    assert rsa(x @ x.T, y @ y.T) == pytest.approx(spearmanr(distances(x), distances(y)).statistic, abs=1e-9)
    assert rsa(x @ x.T, x @ x.T) == pytest.approx(1)
