"""RSA and CKA against plain formulas."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from train.evaluation.similarity import cka, dissimilarities, rsa


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
