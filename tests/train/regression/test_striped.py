"""Regressions whose matrices lie in rows on disk are those on matrices in memory."""

from dataclasses import fields, replace

import numpy as np
import pytest

from train.regression import krylov
from train.regression.fit import Fit
from train.regression.gram import FeatureMatrix, centred_gram
from train.regression.krylov import TOLERANCE, leading_eigen
from train.regression.methods import Method, regress
from train.regression.rows import ON_CPU, RowFile
from train.regression.striped_features import StripedFeatures
from train.regression.striped_gram import StripedGram
from train.regression.symmetric_rows import SymmetricRows

STIMULI, SITES = 900, 5
METHODS = [Method("ridge", 60), Method("ols", 60), Method("pls", 6), Method("ridge")]


@pytest.fixture
def searching(monkeypatch):
    """As for large recordings."""
    monkeypatch.setattr(krylov, "LEAST_STIMULI", 100)


def features_of(kind: str, stimuli: int = STIMULI, width: int = 1200) -> np.ndarray:
    """Features with variances as they are in a layer of a network, or that are difficult at the cut."""
    generator = np.random.default_rng(0)
    rank = min(stimuli, width)
    strengths = np.arange(1, rank + 1) ** -0.5
    if kind == "steep":
        strengths = np.arange(1, rank + 1) ** -2.0
    if kind == "degenerate":
        strengths[2:40] = strengths[2]  # more equal ones than vectors in a block
    if kind == "low rank":
        strengths[30:] = 0
    features = (generator.normal(size=(stimuli, rank)) * strengths) @ generator.normal(size=(rank, width)) + 0.1
    if kind == "noisy":
        features += generator.normal(size=(stimuli, width))
    if kind == "degenerate":
        left, _, right = np.linalg.svd(features - features.mean(0), full_matrices=False)
        features = (left * strengths) @ right
    return features


def responses_to(features: np.ndarray, fit: int) -> np.ndarray:
    """Responses of sites, some of them missing."""
    generator = np.random.default_rng(1)
    signal = features[:fit, :40] @ generator.normal(size=(40, SITES))
    rates = signal + signal.std() * generator.normal(size=(fit, SITES))
    rates[11:60, 1] = rates[2:5, 3] = np.nan
    return rates.astype(np.float32)


def assert_equal_fits(fit: Fit, expected: Fit, tolerance: float) -> None:
    for name in {field.name for field in fields(expected)} - {"spectra"}:
        value, other = getattr(fit, name), getattr(expected, name)
        scale = np.nanmax(np.abs(other))
        np.testing.assert_allclose(value / scale, other / scale, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("kind", ["noisy", "steep", "degenerate", "low rank"])
def test_leading_components_are_those_of_the_full_decomposition(kind):
    features = features_of(kind)
    products = features @ features.T
    everything = np.arange(STIMULI)
    gram = centred_gram(products, everything, everything[:0])
    matrix = SymmetricRows(products, 0, everything, ON_CPU, True, 2**20)
    for memory in (2**30, 1):
        found = leading_eigen(matrix, 60, memory)
        assert found is not None
        exact = gram.spectrum.leading(60)
        assert len(found.values) == len(exact.values) == (30 if kind == "low rank" else 60)
        np.testing.assert_allclose(found.values, exact.values, rtol=1e-7)
        vectors = found.vectors.numpy()
        outside = vectors - exact.vectors @ (exact.vectors.T @ vectors)
        assert np.linalg.norm(outside) <= found.error <= TOLERANCE
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(len(found.values)), atol=1e-12)


def test_no_components_are_found_where_the_spectrum_is_flat_at_the_cut():
    """All eigenvalues are equal, so the leading ones are arbitrary."""
    matrix = SymmetricRows(np.eye(400), 0, np.arange(400), ON_CPU, False, 2**20)
    assert leading_eigen(matrix, 20, 2**30) is None


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_matrix_on_disk_is_fitted_as_one_in_memory(searching, tmp_path, method, dtype):
    """Also with sites that lack responses, copies of images, and stimuli held out from among the others."""
    features = features_of("noisy", STIMULI + 60)
    held_out = np.arange(100, 160)
    fit = np.setdiff1d(np.arange(len(features)), held_out)
    products = (features @ features.T).astype(dtype)
    rates = responses_to(features[fit], len(fit))
    copies = np.arange(len(fit))
    copies[[7, 500]] = 3
    rounding = 2e-7 if dtype == np.float32 else 0.0
    dense = replace(centred_gram(products.astype(np.float64), fit, held_out, rounding), copies=copies)
    np.save(tmp_path / "products.npy", products)
    rows = RowFile(tmp_path / "products.npy")
    striped = StripedGram(rows, 0, fit, held_out, ON_CPU, rounding=rounding, copies=copies)
    actual, expected = regress(striped, rates, method), regress(dense, rates, method)
    assert_equal_fits(actual, expected, 1e-5)
    used = {facts.method for facts in actual.spectra}
    assert (
        used == {"ridge": {"krylov"} if method.components else {"full"}, "ols": {"krylov"}, "pls": set()}[method.kind]
    )
    assert all(facts.error <= TOLERANCE for facts in actual.spectra)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_few_features_on_disk_are_fitted_as_in_memory(tmp_path, method):
    features = features_of("noisy", STIMULI + 60, 80).astype(np.float32)
    held_out = np.arange(100, 160)
    fit = np.setdiff1d(np.arange(len(features)), held_out)
    rates = responses_to(features[fit], len(fit))
    copies = np.arange(len(fit))
    copies[[7, 500]] = 3
    dense = replace(FeatureMatrix.centred(features[fit], features[held_out]), copies=copies)
    np.save(tmp_path / "features.npy", features)
    rows, everything = RowFile(tmp_path / "features.npy"), np.arange(len(features))
    striped = StripedFeatures(rows, everything, fit, held_out, ON_CPU, copies=copies)
    actual = regress(striped, rates, method)
    assert_equal_fits(actual, regress(dense, rates, method), 1e-6)
    assert {facts.method for facts in actual.spectra} == (set() if method.kind == "pls" else {"features"})
