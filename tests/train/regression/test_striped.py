"""Regressions whose matrices lie in rows on disk, or on several ranks, are those on matrices in memory."""

import os
from dataclasses import fields, replace

import numpy as np
import pytest
from helpers import ROOT, slow
from launching import succeed
from striped_problems import (
    HELD_OUT,
    LEAST_STIMULI,
    METHODS,
    STIMULI,
    copies_of,
    features_of,
    fits_of,
    predictors_on_disk,
    write_problem,
)

from data_prep.common.errors import RunFailed
from train.regression import krylov
from train.regression.fit import Fit
from train.regression.gram import FeatureMatrix, centred_gram
from train.regression.krylov import TOLERANCE, leading_eigen
from train.regression.methods import regress
from train.regression.rows import ON_CPU, RowFile, RowReader
from train.regression.striped_features import StripedFeatures
from train.regression.symmetric_rows import SymmetricRows


@pytest.fixture
def searching(monkeypatch):
    """As for large recordings."""
    monkeypatch.setattr(krylov, "LEAST_STIMULI", LEAST_STIMULI)


def arrays_of(fit: Fit) -> dict[str, np.ndarray]:
    return {field.name: getattr(fit, field.name) for field in fields(fit) if field.name != "spectra"}


def assert_close(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    for name, value in expected.items():
        scale = np.nanmax(np.abs(value))
        np.testing.assert_allclose(actual[name] / scale, value / scale, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("memory", [2**30, 1], ids=["large basis", "small basis"])
@pytest.mark.parametrize("kind", ["noisy", "steep", "degenerate", "low rank"])
def test_leading_components_are_those_of_the_full_decomposition(kind, memory):
    features, components = features_of(kind), 40
    products, everything = features @ features.T, np.arange(STIMULI)
    exact = centred_gram(products, everything, everything[:0]).leading(components)
    matrix = SymmetricRows(products, 0, everything, ON_CPU, True, 2**20)
    found = leading_eigen(matrix, components, memory)
    assert found is not None
    assert len(found.values) == len(exact.values) == (30 if kind == "low rank" else components)
    np.testing.assert_allclose(found.values, exact.values, rtol=1e-7)
    vectors = found.vectors.numpy()
    outside = vectors - exact.vectors @ (exact.vectors.T @ vectors)
    assert np.linalg.norm(outside) <= found.error <= TOLERANCE
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(len(found.values)), atol=1e-12)


def test_no_components_are_found_where_the_spectrum_is_flat_at_the_cut():
    """All eigenvalues are equal, so the leading ones are arbitrary."""
    matrix = SymmetricRows(np.eye(400), 0, np.arange(400), ON_CPU, False, 2**20)
    assert leading_eigen(matrix, 20, 2**30) is None


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """Products and features in files."""
    folder = tmp_path_factory.mktemp("striped")
    write_problem(folder, np.float32)
    return folder


def alone(folder, rounding=2e-7) -> dict[str, Fit]:
    return dict(fits_of(predictors_on_disk(folder, ON_CPU, rounding), np.load(folder / "rates.npy")))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_on_disk_are_fitted_as_a_matrix_in_memory(monkeypatch, tmp_path, dtype):
    """Also with sites that lack responses, copies of images, and stimuli held out from among the others."""
    write_problem(tmp_path, dtype)
    rounding = 2e-7 if dtype == np.float32 else 0.0
    fit = np.setdiff1d(np.arange(STIMULI + len(HELD_OUT)), HELD_OUT)
    copies, rates = copies_of(len(fit)), np.load(tmp_path / "rates.npy")
    products = np.load(tmp_path / "products.npy").astype(np.float64)
    features = np.load(tmp_path / "features.npy")
    gram = replace(centred_gram(products, fit, HELD_OUT, rounding), copies=copies)
    few = replace(FeatureMatrix.centred(features[fit], features[HELD_OUT]), copies=copies)
    expected = {title: regress(gram, rates, method) for title, method in METHODS.items()}
    monkeypatch.setattr(krylov, "LEAST_STIMULI", LEAST_STIMULI)
    fits = alone(tmp_path, rounding)
    for title, method in METHODS.items():
        assert_close(arrays_of(fits[f"{title} on gram"]), arrays_of(expected[title]), 1e-5)
        assert_close(arrays_of(fits[f"{title} on features"]), arrays_of(regress(few, rates, method)), 1e-6)
    used = {name: {facts.method for facts in fit.spectra} for name, fit in fits.items()}
    assert used["ridge on gram"] == used["ols on gram"] == {"krylov"}
    assert used["ridge on all on gram"] == {"full"}
    assert used["ridge on features"] == {"features"}
    assert all(facts.error <= TOLERANCE for fit in fits.values() for facts in fit.spectra)


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=slow)])
def test_fits_do_not_depend_on_the_number_of_processes(searching, on_disk, processes):
    """Each holds its own rows of the products, and the features of its own stimuli; all get the same result."""
    succeed(processes, ROOT / "tests" / "support" / "striped_problems.py", on_disk, PYTHONPATH=str(ROOT))
    together = np.load(on_disk / f"fits_{processes}.npz")
    for name, fit in alone(on_disk).items():
        assert together[f"{name}: used"].tolist() == [facts.method for facts in fit.spectra]
        arrays = arrays_of(fit)
        assert_close({key: together[f"{name}: {key}"] for key in arrays}, arrays, 1e-7)


def test_a_site_with_few_responses_has_no_components_that_are_rounding_errors():
    """Centred features of n stimuli have n - 1 components at most, however many features there are."""
    for seed in range(12):
        features = (np.random.default_rng(seed).normal(size=(3, 1000)) * np.arange(1, 1001) ** -0.5 + 5).astype(
            np.float32
        )
        everyone = np.arange(3)
        of_few = StripedFeatures(features, everyone, everyone, everyone[:0], ON_CPU)
        assert len(of_few.leading(None).values) == 2


def test_a_file_of_rows_is_read_and_not_mapped(tmp_path):
    matrix = np.arange(20.0).reshape(5, 4)
    np.save(tmp_path / "matrix.npy", matrix)
    rows = RowFile(tmp_path / "matrix.npy")
    assert (rows.shape, rows.dtype) == ((5, 4), np.float64)
    np.testing.assert_array_equal(rows[1:3], matrix[1:3])
    assert rows[5:].shape == (0, 4)
    read = RowReader(rows)
    np.testing.assert_array_equal(read(0, 4), matrix[:4])
    np.testing.assert_array_equal(read(3, 5), matrix[3:])
    os.truncate(tmp_path / "matrix.npy", (tmp_path / "matrix.npy").stat().st_size - 8)
    with pytest.raises(RunFailed, match=r"matrix\.npy has changed or was cut"):
        read(3, 5)
    np.save(tmp_path / "integers.npy", matrix.astype(int))
    with pytest.raises(ValueError, match="not a matrix of floats"):
        RowFile(tmp_path / "integers.npy")
