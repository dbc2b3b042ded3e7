"""Metrics of predicted responses, per site, from the moments of responses and predictions (`moments.py`).

Over the stimuli of a split, with y the trial-averaged response and p the prediction:

    R2  = 1 - sum (y - p)^2 / sum (y - mean y)^2
    EV  = 1 - Var(y - p) / Var(y)
    MSE = mean (y - p)^2
    r   = Cov(y, p) / sqrt(Var(y) Var(p))

docs/metrics.md has the others, which are relative to a ceiling or reported by other papers. NaN responses are left out,
site by site. A score without a value is NaN.
"""

import numpy as np
import torch

from data_prep.confidence_interval import PossibleValues
from data_prep.recording import varies
from train.evaluation.moments import SiteMoments

LOWER_IS_BETTER = ("mse",)
TITLES = {  # how people read the names of metrics.json, in logs, tables and figures
    "r2": "R2",
    "explained_variance": "EV",
    "mse": "MSE",
    "pearson_r": "Pearson r",
    "ceiled_explained_variance": "ceiled EV",
    "ceiled_pearson_r": "ceiled r",
    "feve": "FEVE",
    "top1": "top-1",
}
LEAST_RELIABILITY = 0.1
POSSIBLE = {  # over endless stimuli; scores relative to an estimated ceiling can be above 1
    "r2": PossibleValues(most=1),
    "explained_variance": PossibleValues(most=1),
    "mse": PossibleValues(least=0),
    "pearson_r": PossibleValues(-1, 1),
    "squared_pearson_r": PossibleValues(0, 1),
}


def site_scores(moments: SiteMoments) -> dict[str, np.ndarray]:
    """R2, EV, MSE and Pearson's r, each float64 (sites,).

    All are NaN for a site without responses; R2, EV and r for a site whose responses are constant; r where the
    predictions are constant.
    """
    count, residual_mean = _on_host(moments.count), _on_host(moments.residual_mean)
    response_squares, residual_squares = _on_host(moments.response_squares), _on_host(moments.residual_squares)
    prediction_squares, products = _on_host(moments.prediction_squares), _on_host(moments.products)
    with np.errstate(invalid="ignore", divide="ignore"):
        squared_error = residual_squares + count * residual_mean**2
        defined = _has_r2(moments)
        correlation = products / np.sqrt(response_squares * prediction_squares)
        return {
            "r2": np.where(defined, 1 - squared_error / response_squares, np.nan),
            "explained_variance": np.where(defined, 1 - residual_squares / response_squares, np.nan),
            "mse": np.where(count > 0, squared_error / count, np.nan),
            "pearson_r": np.where(defined & (prediction_squares > 0), correlation, np.nan),
        }


def ceiled_scores(scores: dict[str, np.ndarray], reliability: np.ndarray) -> dict[str, np.ndarray]:
    """Scores relative to what a perfect model would reach: EV / rho and r / sqrt(rho), rho being the reliability.

    NaN for sites whose reliability is below `LEAST_RELIABILITY`: they would be divided by next to nothing.

    Args:
        scores: of `site_scores`.
        reliability: of the trial average, (sites,).
    """
    rho = np.where(reliability >= LEAST_RELIABILITY, reliability, np.nan)
    return {
        "ceiled_explained_variance": scores["explained_variance"] / rho,
        "ceiled_pearson_r": scores["pearson_r"] / np.sqrt(rho),
    }


def fraction_of_explainable_variance(
    moments: SiteMoments, noise: np.ndarray, least: float = LEAST_RELIABILITY
) -> np.ndarray:
    """FEVE, float64 (sites,): 1 - (MSE - noise) / (Var(y) - noise) (Cadena et al. 2019).

    Unlike EV / rho it penalises a wrong mean, and it uses the noise of exactly the stimuli that are scored.

    Args:
        moments: of responses and predictions.
        noise: mean noise variance of the trial averages, (sites,).
        least: NaN where less than this share of Var(y) is explainable.
    """
    count = _on_host(moments.count)
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = _on_host(moments.response_squares) / (count - 1)
        error = _on_host(moments.residual_squares) / count + _on_host(moments.residual_mean) ** 2
        explainable = variance - noise
        defined = _has_r2(moments) & (explainable > least * variance)
        return np.where(defined, 1 - (error - noise) / explainable, np.nan)


def noise_corrected_r2(moments: SiteMoments, noise: np.ndarray, least: float = LEAST_RELIABILITY) -> np.ndarray:
    """r2_ER, float64 (sites,): squared correlation of predictions with noise-free responses (Pospisil and Bair 2021).

    With x and y centred, over m stimuli: noise adds `noise` to (sum x y)^2 / sum x^2 and (m - 1) `noise` to sum y^2,
    each on average. Both are taken off before the one is divided by the other, so r2_ER is unbiased but for the ratio
    of two random numbers, and can lie below 0 and above 1.

    Unlike R2 and FEVE it does not penalise a wrong mean or scale, and not even a wrong sign.

    Args:
        moments: of responses and predictions.
        noise: mean noise variance of the trial averages, (sites,).
        least: NaN where less than this share of Var(y) is explainable.
    """
    count, response_squares = _on_host(moments.count), _on_host(moments.response_squares)
    prediction_squares, products = _on_host(moments.prediction_squares), _on_host(moments.products)
    with np.errstate(invalid="ignore", divide="ignore"):
        explained = products**2 / prediction_squares - noise
        explainable = response_squares - (count - 1) * noise
        defined = _has_r2(moments) & (prediction_squares > 0) & (explainable > least * response_squares)
        return np.where(defined, explained / explainable, np.nan)


def all_scores(moments: SiteMoments, reliability: np.ndarray | None, noise: np.ndarray | None) -> dict[str, np.ndarray]:
    """`site_scores`, the squared correlation, and the scores relative to a ceiling where the ceiling is known.

    Args:
        moments: of responses and predictions.
        reliability: of the trial average, (sites,), or None.
        noise: mean noise variance of the trial averages, (sites,), or None.
    """
    scores = site_scores(moments)
    scores["squared_pearson_r"] = scores["pearson_r"] ** 2
    if reliability is not None:
        scores |= ceiled_scores(scores, reliability)
    if noise is not None:
        scores["feve"] = fraction_of_explainable_variance(moments, noise)
        scores["r2_er"] = noise_corrected_r2(moments, noise)
    return scores


def mean_score(per_site: np.ndarray) -> float:
    """The plain mean over the sites that have a score; NaN if none has."""
    return float(np.nanmean(per_site)) if np.isfinite(per_site).any() else float("nan")


def median_score(per_site: np.ndarray) -> float:
    """The median over the sites that have a score; NaN if none has."""
    return float(np.nanmedian(per_site)) if np.isfinite(per_site).any() else float("nan")


def mean_noise(noise: np.ndarray | None, response: np.ndarray) -> np.ndarray | None:
    """Each site's mean noise variance over its recorded responses, (sites,), from (stimuli, sites)."""
    if noise is None:
        return None
    recorded = ~np.isnan(response)
    return np.where(recorded, noise, 0).sum(axis=0) / np.maximum(recorded.sum(axis=0), 1)


def _has_r2(moments: SiteMoments) -> np.ndarray:
    """Which sites' responses vary, bool (sites,)."""
    return varies(_on_host(moments.count), _on_host(moments.response_squares), _on_host(moments.response_mean))


def _on_host(values: torch.Tensor) -> np.ndarray:
    return values.cpu().numpy()
