"""Random predictions and responses, and their scores by our metrics and by scikit-learn."""

import json

import numpy as np
import torch
from sklearn.metrics import explained_variance_score, mean_squared_error, r2_score

from train.evaluation.metrics import site_scores
from train.evaluation.metrics_report import regression_report
from train.evaluation.moments import SiteMoments

STIMULI, SITES = 90, 6
SITE_IDS = [f"n{k}" for k in range(SITES)]


def make_predictions(stimuli=STIMULI, sites=SITES, missing=0.2, seed=0):
    """Predictions and responses, float32 (stimuli, sites); a share of the responses is NaN, except at site 0."""
    rng = np.random.default_rng(seed)
    target = rng.normal(10, 2, (stimuli, sites))
    prediction = 0.6 * target + rng.normal(3, 1.2, (stimuli, sites))
    gone = rng.uniform(size=target.shape) < missing
    gone[:, 0] = False
    target[gone] = np.nan
    return prediction.astype(np.float32), target.astype(np.float32)


def moments(prediction, target, weight=None):
    """The moments of all stimuli, computed at once."""
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
