"""Inner products of the features of all stimuli, over all ranks, with more features than fit into any memory.

With n stimuli and p features, n << p, everything that regression on the features or on their principal components needs
is the n x n matrix of inner products (`train/regression/gram.py`). Each rank multiplies all stimuli of its slice of the
features (`train/regression/feature_slices.py`), and the products are summed: exact, whatever p. A rank holds its sum of
products, 8 n^2 bytes (and up to a quarter of that while it adds to it), and sends it once.
"""

import numpy as np

from train.regression.feature_slices import StoredActivations
from train.regression.precision import COLUMNS_PER_PRODUCT, SymmetricSum


def inner_products(activations: StoredActivations, layer: str, owner: int) -> np.ndarray | None:
    """Inner products of a layer's features, centred on the mean of all stimuli.

    Args:
        activations: of all stimuli.
        layer: whose features.
        owner: rank that gets the result.

    Returns:
        float64 (stimuli, stimuli), split after split; None on the other ranks.
    """
    runtime = activations.runtime
    products = SymmetricSum(activations.stimuli, activations.precision, runtime.device)
    for features in activations.slices(layer):
        for columns in features.split(COLUMNS_PER_PRODUCT, dim=1):
            products.add(columns)
    summed = runtime.reduce_to(products.total(), owner)
    return None if summed is None else summed.cpu().numpy()
