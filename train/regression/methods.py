"""The regression methods of a probe by name, and their cross-validated R2."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_prep.recording import varies
from train.regression.fit import Fit, fit_site_groups
from train.regression.gram import Predictors
from train.regression.least_squares import least_squares, partial_least_squares
from train.regression.ridge import ridge


@dataclass(frozen=True)
class Method:
    """A regression from features to sites.

    Attributes:
        kind: ridge with a penalty per site by leave-one-out; ordinary least squares on principal components; or partial
            least squares.
        components: number of principal components (all where None), or of latent dimensions of pls.
        sites_together: of ridge, whether the penalties of the other sites are the prior of a site's.
    """

    kind: Literal["ridge", "ols", "pls"]
    components: int | None = None
    sites_together: bool = False


def regress(predictors: Predictors, rates: np.ndarray, method: Method) -> Fit:
    """Fit every site.

    Args:
        predictors: of the stimuli to fit and those held out.
        rates: float32 or float64 (n, sites); NaN = not recorded.
        method: of regression.
    """
    match method.kind:
        case "ridge":
            return ridge(predictors, rates, method.components, method.sites_together)
        case "ols":
            return fit_site_groups(predictors, rates, method.components, least_squares, Fit)
        case "pls":
            return fit_site_groups(predictors, rates, method.components, partial_least_squares, Fit)


def folded_r2(
    predictors_of: Callable[[np.ndarray, np.ndarray], Predictors],
    rates: np.ndarray,
    method: Method,
    folds: Sequence[np.ndarray],
) -> np.ndarray:
    """R2 per site where each fold is predicted from the others, float64 (sites,).

    Args:
        predictors_of: from positions among the stimuli to those predictors that fit the first and hold out the second.
        rates: (n, sites) of the stimuli.
        method: of regression.
        folds: positions among the n, each in exactly one fold.
    """
    predicted = np.full(rates.shape, np.nan)
    all_stimuli = np.arange(len(rates))
    for fold in folds:
        others = np.setdiff1d(all_stimuli, fold)
        predicted[fold] = regress(predictors_of(others, fold), rates[others], method).prediction
    return r2_per_site(predicted, rates)


def r2_per_site(predicted: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """R2 per site, float64 (sites,), of predictions (n, sites) of rates (n, sites), NaN = not recorded.

    NaN for a site whose responses are constant.
    """
    recorded = ~np.isnan(rates)
    with np.errstate(invalid="ignore", divide="ignore"):
        count = recorded.sum(0)
        mean = np.where(recorded, rates, 0).sum(0) / count
        deviation = np.where(recorded, rates - mean, 0)
        error = np.where(recorded, rates - predicted, 0)
        total = np.square(deviation).sum(0, dtype=np.float64)
        r2 = 1 - np.square(error).sum(0, dtype=np.float64) / total
        return np.where(varies(count, total, mean), r2, np.nan)
