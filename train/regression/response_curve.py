"""A site's response as a curve of what is linear in the features.

Neurons respond more than in proportion to their drive, and not below zero: predictions of a linear regression are too
low for the strongest responses and for the weakest. A quadratic curve from left-out predictions to responses mends
most of it. Its bend is measured poorly at a single site, so that the sites' bends are shrunk towards their mean as far
as their spread is no more than what chance would make of it (DerSimonian and Laird 1986).
"""

from dataclasses import dataclass

import numpy as np

from train.regression.stacking import stacking_folds

MIN_STIMULI = 20  # of a site, to measure a bend
LEAST_SLOPE = 1e-3  # of responses on predictions, both in standard deviations; a site that is not predicted has no bend

LEAST_VARIANCE = 1e-12  # of a bend; responses without noise are no reason to divide by 0


@dataclass(frozen=True)
class ResponseCurves:
    """rates = prediction + constant + slope * p + bend * p^2, with p the prediction within `low` to `high`.

    All are float64 (sites,); the latter three are 0 for a site whose predictions stay as they are.
    """

    low: np.ndarray
    high: np.ndarray
    constant: np.ndarray
    slope: np.ndarray
    bend: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        """All of them, float64 (5, sites), as a saved probe keeps them."""
        return np.stack([self.low, self.high, self.constant, self.slope, self.bend])

    def apply(self, prediction: np.ndarray) -> np.ndarray:
        """Predictions (n, sites) -> rates, float32."""
        p = np.clip(prediction.astype(np.float64), self.low, self.high)
        return (prediction + (self.constant + p * (self.slope + p * self.bend))).astype(np.float32)


def learn_curves(left_out: np.ndarray, rates: np.ndarray) -> ResponseCurves:
    """Learn the curve of each site.

    Args:
        left_out: (n, sites), predictions of stimuli that they were not fitted on; NaN where there are none.
        rates: (n, sites), the responses; NaN = not recorded.
    """
    usable = ~np.isnan(rates) & ~np.isnan(left_out)
    count = usable.sum(axis=0)
    p, y = (np.where(usable, values, 0).astype(np.float64) for values in (left_out, rates))
    n = np.maximum(count, 1)
    mean, mean_rate = p.sum(axis=0) / n, y.sum(axis=0) / n
    deviation, y = np.where(usable, p - mean, 0), np.where(usable, y - mean_rate, 0)
    spread = np.sqrt(np.square(deviation).sum(axis=0) / n)
    safe = np.where(spread > 0, spread, 1)
    z = deviation / safe
    skew = (z**3).sum(axis=0) / n
    bent = np.where(usable, z**2 - 1 - skew * z, 0)  # uncorrelated with a constant and with z
    bend = _bends(z, bent, y, count)
    observed = np.where(usable, left_out, np.nan)
    observed[:, count == 0] = 0
    # bend * (z^2 - 1 - skew z) with z = (p - mean) / spread, in powers of p.
    return ResponseCurves(
        low=np.nanmin(observed, axis=0).astype(np.float64),
        high=np.nanmax(observed, axis=0).astype(np.float64),
        constant=bend * (mean**2 / safe**2 - 1 + skew * mean / safe),
        slope=bend * (-2 * mean / safe**2 - skew / safe),
        bend=bend / safe**2,
    )


def _bends(z: np.ndarray, bent: np.ndarray, y: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The slope of responses on `bent`, shrunk towards that of the other sites; 0 where it cannot be measured.

    Args:
        z: standardised predictions, float64 (n, sites); 0 where there are none, as in the others.
        bent: what is quadratic in these.
        y: responses less their mean.
        count: usable stimuli, (sites,).
    """
    n = np.maximum(count, 1)
    linear, leverage = (z * y).sum(axis=0) / n, np.square(bent).sum(axis=0)
    scale = np.sqrt(np.square(y).sum(axis=0) / n)
    measured = (count >= MIN_STIMULI) & (linear > LEAST_SLOPE * scale) & (leverage > 0)
    bends = np.zeros(len(count))
    if measured.any():
        z, y, bent, linear, leverage = (values[..., measured] for values in (z, y, bent, linear, leverage))
        slopes = (bent * y).sum(axis=0) / leverage
        noise = np.square(y - linear * z - slopes * bent).sum(axis=0) / (count[measured] - 3)
        # In units of the slope, in which sites can be compared.
        bends[measured] = linear * _shrunk(slopes / linear, noise / leverage / linear**2)
    return bends


def crossed_curves(left_out: np.ndarray, rates: np.ndarray, copies: np.ndarray | None) -> np.ndarray:
    """The predictions after curves that were learned on other folds, float32 (n, sites); arguments as above."""
    curved = np.empty(left_out.shape, np.float32)
    all_stimuli = np.arange(len(rates))
    for fold in stacking_folds(len(rates), copies):
        others = np.setdiff1d(all_stimuli, fold)
        curved[fold] = learn_curves(left_out[others], rates[others]).apply(left_out[fold])
    return curved


def _shrunk(values: np.ndarray, variances: np.ndarray) -> np.ndarray:
    """Values (sites,) pulled towards their mean, each by its own variance and their common spread."""
    variances = np.maximum(variances, LEAST_VARIANCE)
    precision = 1 / variances
    mean = (precision * values).sum() / precision.sum()
    excess = (precision * np.square(values - mean)).sum() - (len(values) - 1)
    if len(values) == 1 or excess <= 0:
        return np.full(len(values), mean)
    between = excess / (precision.sum() - np.square(precision).sum() / precision.sum())
    weights = 1 / (variances + between)
    mean = (weights * values).sum() / weights.sum()
    return mean + between * weights * (values - mean)
