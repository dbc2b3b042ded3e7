"""Bootstrap resamples of scores, means and medians over sites, from which confidence intervals are read."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from train.evaluation.metrics import all_scores, mean_noise
from train.evaluation.moments import SiteMoments

BOOTSTRAP_RESAMPLES, BOOTSTRAP_SEED = 1000, 0
RESAMPLES_AT_ONCE = 100
VALUES_AT_ONCE = 2**20  # stimuli x sites
MEDIANS = ("pearson_r", "squared_pearson_r", "r2_er")  # metrics whose median over sites papers report


@dataclass(frozen=True)
class ResampledScores:
    """Scores on bootstrap resamples of the stimuli, float64 (resamples,).

    Attributes:
        means: each metric's mean over sites.
        medians: the medians over sites of `MEDIANS`.
    """

    means: dict[str, np.ndarray]
    medians: dict[str, np.ndarray]


def bootstrap_means(
    prediction: np.ndarray,
    response: np.ndarray,
    resamples: int = BOOTSTRAP_RESAMPLES,
    seed: int = BOOTSTRAP_SEED,
    reliability: np.ndarray | None = None,
    noise: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Each metric's mean over sites on bootstrap resamples of the stimuli (Efron 1979).

    All sites of a resample see the same stimuli, so the spread includes what sites share. The reliability is taken as
    known: the spread is that of the score, not of its ceiling.

    Args:
        prediction, response: (stimuli, sites); NaN responses are left out.
        resamples: number of resamples.
        seed: of the resampling.
        reliability: (sites,), for the scores relative to it.
        noise: (stimuli, sites), noise variance of each response, for FEVE and r2_ER.

    Returns:
        Per metric float64 (resamples,).
    """
    rounds = _resampled_sites(prediction, response, resamples, seed, reliability, noise)
    return _joined([_by_metric(_mean_of_rows, scores) for scores in rounds], resamples)


def bootstrap_scores(
    prediction: np.ndarray,
    response: np.ndarray,
    reliability: np.ndarray | None = None,
    noise: np.ndarray | None = None,
) -> ResampledScores:
    """`bootstrap_means`, and medians over sites on the same resamples."""
    means, medians = [], []
    for scores in _resampled_sites(prediction, response, BOOTSTRAP_RESAMPLES, BOOTSTRAP_SEED, reliability, noise):
        means.append(_by_metric(_mean_of_rows, scores))
        medians.append(_by_metric(_median_of_rows, {name: scores[name] for name in MEDIANS if name in scores}))
    return ResampledScores(_joined(means, BOOTSTRAP_RESAMPLES), _joined(medians, BOOTSTRAP_RESAMPLES))


def _resampled_sites(
    prediction: np.ndarray,
    response: np.ndarray,
    resamples: int,
    seed: int,
    reliability: np.ndarray | None,
    noise: np.ndarray | None,
) -> Iterator[dict[str, np.ndarray]]:
    """Each metric of each site on at least so many resamples: float64 (RESAMPLES_AT_ONCE, sites) at a time.

    NaN for a site that has no score on all stimuli.
    """
    undefined = _undefined_scores(prediction, response, reliability, noise)
    sites = response.shape[1]
    # The sites of all resamples of a round are handled side by side, as if there were that many more sites.
    tiled_reliability = None if reliability is None else np.tile(reliability, RESAMPLES_AT_ONCE)
    for sums in _sums_of_rounds(prediction, response, noise, -(-resamples // RESAMPLES_AT_ONCE), seed):
        noise_mean = None if noise is None else sums["noise"] / np.maximum(sums["count"], 1)
        resampled = all_scores(_moments_of_sums(sums), tiled_reliability, noise_mean)
        yield {
            name: np.where(undefined[name], np.nan, per_site.reshape(RESAMPLES_AT_ONCE, sites))
            for name, per_site in resampled.items()
        }


def _undefined_scores(
    prediction: np.ndarray, response: np.ndarray, reliability: np.ndarray | None, noise: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Which sites have no score on all stimuli, bool (sites,), by metric."""
    parts = []
    for block in _blocks(*response.shape):
        moments = SiteMoments.of(torch.from_numpy(prediction[:, block]), torch.from_numpy(response[:, block]))
        block_reliability = None if reliability is None else reliability[block]
        block_noise = None if noise is None else mean_noise(noise[:, block], response[:, block])
        parts.append(all_scores(moments, block_reliability, block_noise))
    return {name: np.isnan(np.concatenate([part[name] for part in parts])) for name in parts[0]}


def _blocks(stimuli: int, sites: int) -> list[slice]:
    """Neighbouring sites to handle at a time: their float64 copies may be many times as large as the predictions."""
    width = max(VALUES_AT_ONCE // stimuli, 1)
    return [slice(start, start + width) for start in range(0, sites, width)]


def _sums_of_rounds(
    prediction: np.ndarray, response: np.ndarray, noise: np.ndarray | None, rounds: int, seed: int
) -> Iterator[dict[str, np.ndarray]]:
    """The sums of `_summands` over the stimuli of each resample, float64 (resamples of a round * sites,), by round."""
    stimuli, sites = response.shape
    generator = np.random.default_rng(seed)
    equal = np.full(stimuli, 1 / stimuli)
    # How often each resample has each stimulus, rarely more than ten times.
    draws = [generator.multinomial(stimuli, equal, RESAMPLES_AT_ONCE).astype(np.uint16) for _ in range(rounds)]
    totals: dict[str, np.ndarray] = {}
    for block in _blocks(stimuli, sites):
        summands = _summands(prediction[:, block], response[:, block], None if noise is None else noise[:, block])
        columns = np.concatenate(list(summands.values()), axis=1)
        for number, counts in enumerate(draws):
            products = (counts.astype(np.float64) @ columns).reshape(RESAMPLES_AT_ONCE, len(summands), -1)
            for index, name in enumerate(summands):
                of_name = totals.setdefault(name, np.empty((rounds, RESAMPLES_AT_ONCE, sites)))
                of_name[number, :, block] = products[:, index]
    for number in range(rounds):
        yield {name: of_name[number].reshape(-1) for name, of_name in totals.items()}


def _by_metric(
    statistic: Callable[[np.ndarray], np.ndarray], scores: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    return {name: statistic(per_resample) for name, per_resample in scores.items()}


def _joined(rounds: Sequence[Mapping[str, np.ndarray]], resamples: int) -> dict[str, np.ndarray]:
    return {name: np.concatenate([values[name] for values in rounds])[:resamples] for name in rounds[0]}


def _summands(prediction: np.ndarray, response: np.ndarray, noise: np.ndarray | None) -> dict[str, np.ndarray]:
    """What is summed over the stimuli of a resample, each float64 (stimuli, sites).

    Responses and predictions are centred on the mean response, so that the sums of squares do not cancel.
    """
    recorded = ~np.isnan(response)
    with np.errstate(invalid="ignore", divide="ignore"):
        centre = np.where(recorded, response, 0).sum(axis=0, dtype=np.float64) / recorded.sum(axis=0)
    y = np.where(recorded, response - centre, 0).astype(np.float64)
    p = np.where(recorded, prediction - centre, 0).astype(np.float64)
    summands = {"count": recorded.astype(np.float64), "y": y, "p": p, "yy": y * y, "pp": p * p, "yp": y * p}
    if noise is not None:
        summands["noise"] = np.where(recorded, noise, 0)
    return summands


def _moments_of_sums(sums: dict[str, np.ndarray]) -> SiteMoments:
    """Moments from the sums of `_summands` over the stimuli of a resample."""
    count, y, p = sums["count"], sums["y"], sums["p"]
    divisor = np.maximum(count, 1)
    response_squares = sums["yy"] - y * y / divisor
    prediction_squares = sums["pp"] - p * p / divisor
    products = sums["yp"] - y * p / divisor
    # A resample in which the site did not vary.
    response_squares = np.where(response_squares > 1e-12 * sums["yy"], response_squares, 0)
    return SiteMoments(
        count=torch.from_numpy(count),
        response_mean=torch.from_numpy(y / divisor),
        prediction_mean=torch.from_numpy(p / divisor),
        residual_mean=torch.from_numpy((y - p) / divisor),
        response_squares=torch.from_numpy(response_squares),
        prediction_squares=torch.from_numpy(prediction_squares),
        residual_squares=torch.from_numpy(np.maximum(response_squares + prediction_squares - 2 * products, 0)),
        products=torch.from_numpy(products),
    )


def _mean_of_rows(scores: np.ndarray) -> np.ndarray:
    """`mean_score` of each row."""
    defined = ~np.isnan(scores)
    with np.errstate(invalid="ignore"):
        return np.where(defined, scores, 0).sum(1) / defined.sum(1)


def _median_of_rows(scores: np.ndarray) -> np.ndarray:
    """`median_score` of each row."""
    ordered = np.sort(scores, axis=1)  # NaN last
    defined = (~np.isnan(scores)).sum(1)
    rows, last = np.arange(len(scores)), scores.shape[1] - 1
    low, high = np.clip((defined - 1) // 2, 0, last), np.clip(defined // 2, 0, last)
    return (ordered[rows, low] + ordered[rows, high]) / 2
