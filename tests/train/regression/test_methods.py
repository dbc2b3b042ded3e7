"""Regression through Gram matrices against scikit-learn on the features."""

from dataclasses import fields, replace
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.cross_decomposition import PLSRegression
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression, Ridge, RidgeCV

from data_prep.splits import folds
from train.planning.step_cost import LiveBytes
from train.regression import ridge as ridge_module
from train.regression.gram import FeatureMatrix, GramMatrix, Predictors, centred_gram
from train.regression.methods import Method, folded_r2, regress
from train.regression.precision import ROUNDING, ProductPrecision, SymmetricSum
from train.regression.ridge import PENALTIES, ridge
from train.regression.rows import ON_CPU
from train.regression.striped_features import StripedFeatures

FIT, HELD_OUT, FEATURES, SITES = 90, 31, 400, 6


@pytest.fixture(params=["random", "badly conditioned"])
def problem(request):
    """Features with a duplicated stimulus and a constant feature, responses, and the Gram matrices."""
    generator = np.random.default_rng(0)
    scale = np.ones(FEATURES) if request.param == "random" else np.logspace(0, -4, FEATURES)
    features = generator.normal(size=(FIT + HELD_OUT, FEATURES)) * scale + 5
    features[7], features[:, 11] = features[3], 2.5
    rates = features[:, :20] @ generator.normal(size=(20, SITES)) + generator.normal(size=(FIT + HELD_OUT, SITES))
    products = features @ features.T - 3  # shifted, which centring undoes
    return features, rates, centred_gram(products, np.arange(FIT), np.arange(FIT, FIT + HELD_OUT))


def predicted(gram: GramMatrix, rates: np.ndarray, method: Method) -> np.ndarray:
    """In float64, which `Fit.prediction` is not."""
    fit = regress(gram, rates, method)
    return gram.cross @ fit.dual + fit.mean


def assert_close(actual: np.ndarray, expected: np.ndarray, relative: float = 1e-6) -> None:
    assert np.abs(actual - expected).max() <= relative * np.abs(expected).max()


@pytest.mark.parametrize("components", [1, 20, 60])
def test_least_squares_on_components(problem, components):
    features, rates, gram = problem
    pca = PCA(components, svd_solver="full").fit(features[:FIT])
    reference = LinearRegression().fit(pca.transform(features[:FIT]), rates[:FIT])
    expected = reference.predict(pca.transform(features[FIT:]))
    assert_close(predicted(gram, rates[:FIT], Method("ols", components)), expected)


def test_least_squares_on_all_components_is_the_least_norm_solution(problem):
    features, rates, gram = problem
    mean = features[:FIT].mean(0)
    weights = np.linalg.lstsq(features[:FIT] - mean, rates[:FIT] - rates[:FIT].mean(0), rcond=1e-7)[0]
    expected = (features[FIT:] - mean) @ weights + rates[:FIT].mean(0)
    assert_close(predicted(gram, rates[:FIT], Method("ols")), expected)


@pytest.mark.parametrize("components", [15, None])
def test_ridge_on_components_with_a_penalty_per_site(problem, components):
    features, rates, gram = problem
    pca = PCA(components or FIT - 2, svd_solver="full").fit(features[:FIT])
    scores, new_scores = pca.transform(features[:FIT]), pca.transform(features[FIT:])
    fit = ridge(gram, rates[:FIT], components)
    unit = np.trace(gram.fit) / FIT
    for site in range(SITES):
        choice = RidgeCV(alphas=PENALTIES * unit, gcv_mode="eigen").fit(scores, rates[:FIT, site])
        assert fit.penalty[site] * unit == pytest.approx(choice.alpha_)
        reference = Ridge(alpha=choice.alpha_, solver="svd").fit(scores, rates[:FIT, site]).predict(new_scores)
        assert_close(gram.cross @ fit.dual[:, site] + fit.mean[site], reference)


def test_left_out_predictions_are_those_of_fits_without_the_stimulus():
    generator = np.random.default_rng(1)
    features = generator.normal(size=(25, 60))
    rates = features[:, :3] @ generator.normal(size=(3, 2)) + generator.normal(size=(25, 2))
    products = features @ features.T
    fit = ridge(centred_gram(products, np.arange(25), np.arange(25)), rates)
    unit = np.square(features - features.mean(0)).sum() / 25
    for left in (0, 13):
        others = np.delete(np.arange(25), left)
        for site in range(2):
            model = Ridge(alpha=fit.penalty[site] * unit, solver="svd").fit(features[others], rates[others, site])
            assert fit.left_out[left, site] == pytest.approx(model.predict(features[[left]])[0], rel=1e-4)


def sum_of_products(features: torch.Tensor, precision: ProductPrecision) -> torch.Tensor:
    products = SymmetricSum(len(features), precision, features.device)
    products.add(features)
    return products.total()


@pytest.mark.parametrize("stimuli", [7, 300, 2100])
def test_products_add_up_to_a_symmetric_matrix(stimuli):
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.randn(stimuli, 9, generator=generator) for _ in range(3)]
    products = SymmetricSum(stimuli, "float64", torch.device("cpu"))
    for block in blocks:
        products.add(block)
    features = torch.cat(blocks, dim=1).double()
    torch.testing.assert_close(products.total(), features @ features.T, rtol=1e-12, atol=1e-12)


def test_products_take_no_second_matrix():
    """What is allocated while a block is added is a fraction of the sum."""
    features = torch.zeros(2048, 16)
    for precision in ("float64", "float32"):
        products = SymmetricSum(len(features), precision, features.device)
        with LiveBytes([features, products.total()]) as counted:
            products.add(features)
            products.total()
        assert 0 < counted.peak < 0.3 * products.total().nbytes


@pytest.mark.parametrize(("precision", "bits_dropped"), [("tf32", 13), ("bf16", 16)])
def test_hardware_that_rounds_factors_makes_no_larger_error_than_regressions_expect(precision, bits_dropped):
    """Rounded by hand, to the nearest number with fewer bits; the fewer features, the larger the error."""
    generator = torch.Generator().manual_seed(0)
    rank, stimuli, count = 200, 400, 2000
    strengths = torch.arange(1, rank + 1) ** -0.5  # variances fall off as in a layer of a network
    features = (torch.randn(stimuli, rank, generator=generator) * strengths) @ torch.randn(
        rank, count, generator=generator
    )
    features += 0.3 * torch.randn(stimuli, count, generator=generator)
    features -= features.mean(0)
    half, kept = 1 << (bits_dropped - 1), -1 << bits_dropped
    rounded = ((features.view(torch.int32) + half) & kept).view(torch.float32)
    exact = sum_of_products(features, "float64")
    error = torch.linalg.matrix_norm(sum_of_products(rounded, "float64") - exact, 2) / torch.linalg.matrix_norm(
        exact, 2
    )
    assert 0.1 * ROUNDING[precision] < error < ROUNDING[precision]


def test_rounding_errors_of_float32_products_are_not_components():
    """Fewer features than stimuli: components beyond their number are rounding errors, whatever they predict."""
    generator = np.random.default_rng(0)
    features = (generator.normal(size=(120, 15)) + 3).astype(np.float32)
    rates = features @ generator.normal(size=(15, 4)) + 0.01 * generator.normal(size=(120, 4))
    centred_features = torch.from_numpy(features - features.mean(0, dtype=np.float64).astype(np.float32))
    all_stimuli = np.arange(120)
    exact, rounded = (
        ridge(
            centred_gram(
                sum_of_products(centred_features, precision).numpy(), all_stimuli, all_stimuli, ROUNDING[precision]
            ),
            rates,
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
    fit = predicted(gram, rates[:FIT], Method("pls", latent))
    assert_close(fit, reference.predict(features[FIT:]))


@pytest.mark.parametrize("kind", ["ridge", "ols", "pls"])
def test_sites_recorded_for_other_stimuli_are_fitted_on_theirs(kind):
    generator = np.random.default_rng(0)
    features = generator.normal(size=(47, 90)) * np.linspace(3, 0.1, 90)
    rates = features[:40, :5] @ generator.normal(size=(5, 4)) + 2 * generator.normal(size=(40, 4))
    rates[3:9, 1] = np.nan
    rates[:, 3] = np.nan
    method, all_stimuli = Method(kind, 5), np.arange(40)
    products = features @ features.T
    fit = regress(centred_gram(products, all_stimuli, np.arange(40, 47)), rates, method)
    recorded = np.flatnonzero(~np.isnan(rates[:, 1]))
    alone = regress(centred_gram(products, recorded, np.arange(40, 47)), rates[recorded][:, [1]], method)
    np.testing.assert_allclose(fit.prediction[:, 1], alone.prediction[:, 0], rtol=1e-5)
    assert (fit.dual[3:9, 1] == 0).all()
    assert np.isnan(fit.prediction[:, 3]).all()


@pytest.mark.parametrize("method", [Method("ridge"), Method("ridge", 9), Method("ols", 9)], ids=str)
def test_few_features_are_fitted_as_through_their_gram_matrix(method):
    """With a constant feature, two identical ones, and sites that lack responses to different stimuli."""
    generator = np.random.default_rng(3)
    features = generator.normal(size=(FIT + HELD_OUT, 20)) * np.logspace(0, -2, 20) + 3
    features[:, 4], features[:, 5] = 1.5, features[:, 6]
    rates = features[:FIT] @ generator.normal(size=(20, SITES)) + generator.normal(size=(FIT, SITES))
    rates[:9, 0] = rates[5:30, 1] = np.nan
    gram = centred_gram(features @ features.T, np.arange(FIT), np.arange(FIT, FIT + HELD_OUT), 1e-12)
    expected = regress(gram, rates, method)
    fit = regress(FeatureMatrix.centred(features[:FIT], features[FIT:]), rates, method)
    for name in {field.name for field in fields(expected)} - {"spectra"}:
        np.testing.assert_allclose(getattr(fit, name), getattr(expected, name), rtol=1e-5, atol=1e-6, err_msg=name)


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
    fit = folded_r2(partial(centred_gram, features @ features.T), rates, Method("ols"), parts)
    r2 = 1 - np.square(rates - expected).sum(0) / np.square(rates - rates.mean(0)).sum(0)
    np.testing.assert_allclose(fit, r2, rtol=1e-5)


@pytest.mark.parametrize("predictors", ["gram", "features", "rows of features"])
def test_stimuli_with_the_same_image_are_left_out_together(predictors):
    """Otherwise a copy tells the response: on v4_we_190925 a ridge on pixels took too small penalties.

    Its inner R2 was 0.287 and that on val 0.104; with copies left out together they are 0.202 and 0.234.
    """
    generator = np.random.default_rng(1)
    copies = np.arange(FIT)
    copies[[8, 30]], copies[50] = 4, 49
    features = generator.normal(size=(FIT, 300 if predictors == "gram" else 30))[copies]
    rates = features[:, :20] @ generator.normal(size=(20, 3)) + generator.normal(size=(FIT, 3)) * 3
    rates[:10, 2] = np.nan  # a site of its own group, and half of the first image's copies
    everyone = np.arange(FIT)
    of_all: Predictors
    if predictors == "gram":
        of_all = replace(centred_gram(features @ features.T, everyone, everyone[:0]), copies=copies)
    elif predictors == "features":
        of_all = replace(FeatureMatrix.centred(features, features[:0]), copies=copies)
    else:
        of_all = StripedFeatures(features, everyone, everyone, everyone[:0], ON_CPU, copies=copies)
    fit = ridge(of_all, rates)
    for site in range(3):
        recorded = np.flatnonzero(~np.isnan(rates[:, site]))
        centred = features[recorded] - features[recorded].mean(0)
        alpha = fit.penalty[site] * np.square(centred).sum() / len(recorded)
        expected = np.full(FIT, np.nan)
        for image in np.unique(copies[recorded]):
            others = recorded[copies[recorded] != image]
            of_image = recorded[copies[recorded] == image]
            expected[of_image] = Ridge(alpha).fit(features[others], rates[others, site]).predict(features[of_image])
        np.testing.assert_allclose(fit.left_out[:, site], expected, rtol=1e-4, atol=1e-4)
        error = np.square(rates[recorded, site] - expected[recorded]).sum()
        variance = np.square(rates[recorded, site] - rates[recorded, site].mean()).sum()
        assert fit.inner_r2[site] == pytest.approx(1 - error / variance, rel=1e-6)


def test_many_sites_are_fitted_in_blocks_as_all_at_once(problem, monkeypatch):
    _, rates, gram = problem
    expected = ridge(gram, rates[:FIT])
    monkeypatch.setattr(ridge_module, "LEAST_STIMULI", FIT)
    monkeypatch.setattr(ridge_module, "SITES_BYTES", 4 * 8 * FIT)  # four sites, then the other two
    fit = ridge(gram, rates[:FIT])
    for name in ("prediction", "dual", "mean", "inner_r2", "left_out"):
        assert_close(getattr(fit, name), getattr(expected, name))
    assert (fit.penalty == expected.penalty).all()


def test_copies_do_not_change_the_estimate_of_stimuli_without_any(problem):
    _, rates, gram = problem
    fit, other = ridge(gram, rates[:FIT]), ridge(replace(gram, copies=np.arange(FIT)), rates[:FIT])
    np.testing.assert_allclose(other.left_out, fit.left_out, rtol=1e-5)
    np.testing.assert_array_equal(other.penalty, fit.penalty)
