"""Regressions on matrices on disk take the memory that is stated, and not that of the matrix."""

from pathlib import Path

import numpy as np
import pytest
from helpers import slow
from peak_memory import peak_of

from train.regression import krylov
from train.regression.methods import Method, regress
from train.regression.rows import BLOCK_BYTES, ON_CPU, RowFile
from train.regression.striped_features import StripedFeatures
from train.regression.striped_gram import StripedGram

STIMULI, HELD_OUT, COMPONENTS, SITES = 5300, 100, 100, 40
LIBRARIES = 2**24  # work space of BLAS and small pieces of memory that malloc keeps


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    """Products, 112 MB of float32, features, and responses."""
    folder, generator = tmp_path_factory.mktemp("memory"), np.random.default_rng(0)
    strengths = np.arange(1, 401, dtype=np.float32) ** -0.5
    features = generator.standard_normal((STIMULI, 400), np.float32) * strengths
    np.save(folder / "products.npy", features @ features.T)
    np.save(folder / "features.npy", features)
    rates = features[: STIMULI - HELD_OUT, :SITES] + generator.standard_normal((STIMULI - HELD_OUT, SITES))
    np.save(folder / "rates.npy", rates)
    return str(folder)


def regression_on_products(folder, kind, components, memory):
    """Work that regresses on the products of all stimuli."""
    rows, rates = RowFile(Path(folder) / "products.npy"), np.load(Path(folder) / "rates.npy")
    method = Method(kind, components)
    few = np.arange(500)  # now the libraries take what they keep
    regress(StripedGram(rows, 0, few, few[:0], ON_CPU, rounding=2e-7), rates[:500], method)
    fit, held_out = np.arange(STIMULI - HELD_OUT), np.arange(STIMULI - HELD_OUT, STIMULI)
    gram = StripedGram(rows, 0, fit, held_out, ON_CPU, rounding=2e-7, memory_bytes=memory)
    return lambda: regress(gram, rates, method)


def regression_on_features(folder):
    """Work that regresses on the features of all stimuli."""
    rows, rates, everything = (
        RowFile(Path(folder) / "features.npy"),
        np.load(Path(folder) / "rates.npy"),
        np.arange(STIMULI),
    )
    method, few = Method("ridge", COMPONENTS), np.arange(500)
    regress(StripedFeatures(rows, everything, few, few[:0], ON_CPU), rates[:500], method)
    fit, held_out = np.arange(STIMULI - HELD_OUT), np.arange(STIMULI - HELD_OUT, STIMULI)
    features = StripedFeatures(rows, everything, fit, held_out, ON_CPU)
    return lambda: regress(features, rates, method)


def bytes_of_search(vectors: int) -> int:
    """What `train/regression/krylov.py` states, on one rank; and a margin for blocks of vectors."""
    blocks = 8 * krylov.LEAST_BLOCK * STIMULI * 8
    return 8 * vectors * STIMULI + 32 * vectors**2 + blocks


RIDGE, UNBOUNDED, BOUNDED = Method("ridge", COMPONENTS), 2**30, 8 * STIMULI * 250


@pytest.mark.parametrize(
    ("method", "memory"),
    [pytest.param(RIDGE, UNBOUNDED, marks=slow), (RIDGE, BOUNDED), (Method("pls", 10), UNBOUNDED)],
    ids=["ridge", "ridge, bounded", "pls"],
)
def test_products_on_disk_are_never_copied(problem, method, memory):
    """Eight matrices of stimuli x sites, the components, and what the search for them states."""
    peak = peak_of(regression_on_products, problem, method.kind, method.components, memory)
    allowed = 8 * 8 * STIMULI * SITES + 3 * BLOCK_BYTES + LIBRARIES
    if method.kind == "ridge":
        least, most = (times * COMPONENTS + 3 * krylov.LEAST_BLOCK for times in (krylov.LEAST_BASIS, krylov.BASIS))
        vectors = int(min(max(memory / (8 * STIMULI), least), most)) + krylov.PROBE_BLOCK * krylov.PROBE_STEPS
        allowed += bytes_of_search(vectors) + 3 * 8 * STIMULI * COMPONENTS
    assert peak < allowed


def test_features_on_disk_are_never_copied(problem):
    """Blocks of rows, the covariance four times, and the components."""
    peak = peak_of(regression_on_features, problem)
    allowed = 4 * 8 * 400**2 + 4 * 8 * STIMULI * COMPONENTS + 8 * 8 * STIMULI * SITES + 3 * BLOCK_BYTES + LIBRARIES
    assert peak < allowed
