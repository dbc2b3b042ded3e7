"""Similarity of two representations of the same stimuli, computed from their Gram matrices alone: RSA and CKA."""

import numpy as np


def _centred(products: np.ndarray) -> np.ndarray:
    column = products.mean(axis=0)
    return products - column - column[:, None] + column.mean()


def dissimilarities(products: np.ndarray) -> np.ndarray:
    """The upper triangle of a representational dissimilarity matrix, float64 (n (n - 1) / 2,).

    1 - cosine of the patterns of two stimuli, after subtracting the mean pattern of all stimuli (Walther et al. 2016).
    A stimulus with exactly the mean pattern has a cosine of 0 with all others.

    Args:
        products: (n, n), inner products of the patterns, centred or not.
    """
    gram = _centred(products)
    length = np.sqrt(np.clip(np.diag(gram), 0, None))
    outer = np.outer(length, length)
    cosine = np.divide(gram, outer, out=np.zeros_like(gram), where=outer > 0)
    return 1 - cosine[np.triu_indices(len(gram), k=1)]


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; values that differ by rounding errors only share the mean of their ranks."""
    _, inverse, counts = np.unique(np.round(values, 10), return_inverse=True, return_counts=True)
    last = np.cumsum(counts) - 1
    return (last - (counts - 1) / 2)[inverse]


def rsa(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's correlation between the dissimilarities of two representations (Kriegeskorte et al. 2008).

    NaN if one of them does not vary.

    Args:
        a, b: (n, n), inner products of the patterns of the same stimuli.
    """
    ranks = [_ranks(dissimilarities(products)) for products in (a, b)]
    x, y = (values - values.mean() for values in ranks)
    scale = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y / scale) if scale > 0 else float("nan")


def _hsic(a: np.ndarray, b: np.ndarray) -> float:
    """The unbiased estimator of the Hilbert-Schmidt independence criterion (Song et al. 2012, equation 5)."""
    n = len(a)
    a, b = (products - np.diag(np.diag(products)) for products in (a, b))
    trace, sums = np.sum(a * b), a.sum() * b.sum() / ((n - 1) * (n - 2))
    return float((trace + sums - 2 / (n - 2) * (a.sum(0) @ b.sum(0))) / (n * (n - 3)))


def cka(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased linear centred kernel alignment (Kornblith et al. 2019, with the estimator of Song et al. 2012).

    0 in expectation for unrelated representations, whatever their dimensions; 1 for equal ones. NaN if one of them does
    not vary, or for fewer than four stimuli.

    Args:
        a, b: (n, n), inner products of the patterns of the same stimuli, centred or not.
    """
    if len(a) < 4:
        return float("nan")
    a, b = _centred(a), _centred(b)  # not needed by the estimator, but it reduces rounding errors
    scale = _hsic(a, a) * _hsic(b, b)
    return _hsic(a, b) / scale**0.5 if scale > 0 else float("nan")
