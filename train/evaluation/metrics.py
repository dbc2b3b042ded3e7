"""Exact metrics over ranks.

Per site, over the stimuli of a split, with y the trial-averaged response and p the prediction:

    R2  = 1 - sum (y - p)^2 / sum (y - mean y)^2
    EV  = 1 - Var(y - p) / Var(y)
    MSE = mean (y - p)^2
    r   = Cov(y, p) / sqrt(Var(y) Var(p))

All of them follow from the means and the centred second moments of y, p and e = y - p. Each rank accumulates these in
float64, and ranks are merged by Chan, Golub and LeVeque's update (1983), which neither cancels nor depends on the order
beyond rounding. Responses that are NaN are left out, per site.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_prep.ceiling import percentile_interval
from data_prep.common.errors import DIVERGED, RunFailed
from data_prep.shards.manifest import to_json_list
from train.models.losses import SiteLines

METRICS = ("r2", "explained_variance", "mse", "pearson_r")
_ROWS = ("n", "mean_y", "mean_p", "mean_e", "m2_y", "m2_p", "m2_e", "m2_yp")
BOOTSTRAP_RESAMPLES, BOOTSTRAP_SEED = 1000, 0
LEAST_RELIABILITY = 0.1
CONSTANT = 1e-15  # a variance below this part of the squared mean is what float32 rounding makes of a constant


class SiteMoments:
    """Counts, means and centred second moments per site, of the responses y, the predictions p and the residuals y - p.

    Args:
        sites: number of sites.
        device: where the sums are kept; nothing is copied to the host before `merge_over`.
    """

    def __init__(self, sites: int, device: torch.device | str = "cpu"):
        self.state = torch.zeros(len(_ROWS), sites, dtype=torch.float64, device=device)

    def add(self, prediction: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        """Take in a batch.

        Args:
            prediction: (stimuli, sites).
            target: (stimuli, sites), NaN = not recorded.
            weight: (stimuli,), 0 leaves a stimulus out.
        """
        y, p = target.double(), prediction.double()
        there = ~torch.isnan(y)
        if weight is not None:
            there = there & (weight > 0)[:, None]
        y, p = torch.where(there, y, 0), torch.where(there, p, 0)
        n = there.sum(0)
        count = n.clamp(min=1)
        mean_y, mean_p = y.sum(0) / count, p.sum(0) / count
        dy, dp = torch.where(there, y - mean_y, 0), torch.where(there, p - mean_p, 0)
        de = dy - dp
        rows = (n, mean_y, mean_p, mean_y - mean_p, (dy**2).sum(0), (dp**2).sum(0), (de**2).sum(0), (dy * dp).sum(0))
        self.state = merge_moments(self.state, torch.stack([row.double() for row in rows]))


def merge_moments(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Moments of two disjoint sets of stimuli joined (Chan's update): float64 (8, sites), rows as in `SiteMoments`."""
    n = a[0] + b[0]
    part = torch.where(n > 0, b[0] / n.clamp(min=1), 0)
    delta = b[1:4] - a[1:4]
    mean = a[1:4] + delta * part
    cross = a[0] * part
    dy, dp, de = delta
    second = a[4:8] + b[4:8] + cross * torch.stack((dy * dy, dp * dp, de * de, dy * dp))
    return torch.cat((n[None], mean, second))


def merge_all(states: torch.Tensor) -> torch.Tensor:
    """Merge the moments of all ranks, float64 (ranks, 8, sites), in the order of the ranks."""
    merged = states[0]
    for state in states[1:]:
        merged = merge_moments(merged, state)
    return merged


def least_squares_lines(moments: torch.Tensor) -> SiteLines:
    """Per site the line from predictions to responses; its slope is 0 where the predictions are constant."""
    _, mean_y, mean_p, _, _, m2_p, _, m2_yp = moments
    slope = torch.where(m2_p > 0, m2_yp / torch.where(m2_p > 0, m2_p, 1), 0)
    return SiteLines(slope=slope, mean_response=mean_y, mean_prediction=mean_p)


def site_scores(moments: torch.Tensor) -> dict[str, np.ndarray]:
    """The metrics per site, float64 (sites,), from merged moments.

    A score that has no value is NaN: all of them for a site without responses, R2, EV and r for one whose responses are
    constant, r where the predictions are constant.
    """
    n, mean_y, _, mean_e, m2_y, m2_p, m2_e, m2_yp = moments.cpu().numpy()
    with np.errstate(invalid="ignore", divide="ignore"):
        squared_error = m2_e + n * mean_e**2
        varies = (n >= 2) & (m2_y > CONSTANT * n * mean_y**2)
        return {
            "r2": np.where(varies, 1 - squared_error / m2_y, np.nan),
            "explained_variance": np.where(varies, 1 - m2_e / m2_y, np.nan),
            "mse": np.where(n > 0, squared_error / n, np.nan),
            "pearson_r": np.where(varies & (m2_p > 0), m2_yp / np.sqrt(m2_y * m2_p), np.nan),
        }


def ceiled_scores(scores: dict[str, np.ndarray], reliability: np.ndarray) -> dict[str, np.ndarray]:
    """Scores relative to the reliability rho, per site: EV / rho and r / sqrt(rho).

    Sites below `LEAST_RELIABILITY` would be divided by next to nothing; they are NaN.
    """
    rho = np.where(reliability >= LEAST_RELIABILITY, reliability, np.nan)
    return {
        "ceiled_explained_variance": scores["explained_variance"] / rho,
        "ceiled_pearson_r": scores["pearson_r"] / np.sqrt(rho),
    }


def fraction_of_explainable_variance(
    moments: torch.Tensor, noise: np.ndarray, least: float = LEAST_RELIABILITY
) -> np.ndarray:
    """FEVE per site, float64 (sites,): 1 - (MSE - noise) / (Var(y) - noise) (Cadena et al. 2019).

    Unlike EV / rho it charges a wrong mean, and takes the noise of the very stimuli that are scored.

    Args:
        moments: of responses and predictions.
        noise: the mean noise variance of these trial averages, (sites,).
        least: NaN where less than this share of Var(y) is explainable.
    """
    n, _, _, mean_e, m2_y, _, m2_e, _ = moments.cpu().numpy()
    with np.errstate(invalid="ignore", divide="ignore"):
        variance, error = m2_y / (n - 1), m2_e / n + mean_e**2
        explainable = variance - noise
        return np.where(explainable > least * variance, 1 - (error - noise) / explainable, np.nan)


def all_scores(
    moments: torch.Tensor, reliability: np.ndarray | None, noise: np.ndarray | None
) -> dict[str, np.ndarray]:
    """`site_scores`, and those relative to a ceiling where it is known."""
    scores = site_scores(moments)
    if reliability is not None:
        scores |= ceiled_scores(scores, reliability)
    if noise is not None:
        scores["feve"] = fraction_of_explainable_variance(moments, noise)
    return scores


def mean_score(per_site: np.ndarray) -> float:
    """The plain mean over the sites that have a score; NaN where none has."""
    return float(np.nanmean(per_site)) if np.isfinite(per_site).any() else float("nan")


# ------------------------------------------------------------------------------------------------------- intervals


def bootstrap_means(
    prediction: np.ndarray,
    target: np.ndarray,
    resamples: int = BOOTSTRAP_RESAMPLES,
    seed: int = BOOTSTRAP_SEED,
    reliability: np.ndarray | None = None,
    noise: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """The mean over sites of each metric on bootstrap resamples of the stimuli (Efron 1979).

    All sites of a resample see the same stimuli, so that what sites share is in the spread. A reliability is taken as
    known: the spread is that of the score, not of its ceiling.

    Args:
        prediction, target: (stimuli, sites); NaN targets are left out.
        resamples: how many.
        seed: of the resampling.
        reliability: (sites,), for the scores relative to it.
        noise: (stimuli, sites), noise variance of each response, for FEVE.

    Returns:
        Per metric float64 (resamples,).
    """
    there = ~np.isnan(target)
    with np.errstate(invalid="ignore", divide="ignore"):
        centre = np.where(there, target, 0).sum(axis=0, dtype=np.float64) / there.sum(axis=0)
    # Centred on the responses' means: the sums of squares below then lose nothing to cancellation.
    y = np.where(there, target - centre, 0).astype(np.float64)
    p = np.where(there, prediction - centre, 0).astype(np.float64)
    parts = [there.astype(np.float64), y, p, y * y, p * p, y * p]
    if noise is not None:
        parts.append(np.where(there, noise, 0))
    columns = np.concatenate(parts, axis=1)
    whole = SiteMoments(target.shape[1])
    whole.add(torch.from_numpy(prediction), torch.from_numpy(target))
    found = all_scores(whole.state, reliability, mean_noise(noise, target))
    undefined = {name: np.isnan(scores) for name, scores in found.items()}
    generator = np.random.default_rng(seed)
    means: dict[str, list[np.ndarray]] = {name: [] for name in found}
    reliability = None if reliability is None else np.tile(reliability, 100)
    for _ in range(-(-resamples // 100)):
        times = generator.multinomial(len(y), np.full(len(y), 1 / len(y)), size=100).astype(np.float64)
        # The sites of 100 resamples side by side, as if they were so many more sites.
        sums = (times @ columns).reshape(100, len(parts), -1).swapaxes(0, 1).reshape(len(parts), -1)
        of_averages = None if noise is None else sums[6] / np.maximum(sums[0], 1)
        for name, scores in all_scores(_moments_of_sums(sums[:6]), reliability, of_averages).items():
            means[name].append(_mean_of_rows(np.where(undefined[name], np.nan, scores.reshape(100, -1))))
    return {name: np.concatenate(values)[:resamples] for name, values in means.items()}


def _mean_of_rows(scores: np.ndarray) -> np.ndarray:
    """`mean_score` of each row."""
    there = ~np.isnan(scores)
    with np.errstate(invalid="ignore"):
        return np.where(there, scores, 0).sum(1) / there.sum(1)


def mean_noise(noise: np.ndarray | None, target: np.ndarray) -> np.ndarray | None:
    """The mean noise variance of each site's recorded responses, (sites,), from (stimuli, sites)."""
    if noise is None:
        return None
    there = ~np.isnan(target)
    return np.where(there, noise, 0).sum(axis=0) / np.maximum(there.sum(axis=0), 1)


def _moments_of_sums(sums: np.ndarray) -> torch.Tensor:
    n, y, p, yy, pp, yp = sums
    count = np.maximum(n, 1)
    m2_y, m2_p, m2_yp = yy - y * y / count, pp - p * p / count, yp - y * p / count
    m2_y = np.where(m2_y > 1e-12 * yy, m2_y, 0)  # a resample in which the site did not vary
    rows = (n, y / count, p / count, (y - p) / count, m2_y, m2_p, np.maximum(m2_y + m2_p - 2 * m2_yp, 0), m2_yp)
    return torch.from_numpy(np.stack(rows))


# --------------------------------------------------------------------------------------------------------- reports


def regression_report(
    moments: torch.Tensor,
    prediction: np.ndarray,
    target: np.ndarray,
    site_ids: list[str],
    reliability: np.ndarray | None,
    trained: np.ndarray | None = None,
    noise: np.ndarray | None = None,
) -> dict[str, Any]:
    """The `regression` block of metrics.json.

    Args:
        moments: merged over all ranks.
        prediction, target: (stimuli, sites), for the intervals.
        site_ids: names of the sites.
        reliability: of the trial average, float64 (sites,), or None.
        trained: bool (sites,), the sites that a model can have predictions for; by default all.
        noise: noise variance of each response, float64 (stimuli, sites), or None.

    Raises:
        RunFailed: a prediction is NaN or infinite.
    """
    expected = slice(None) if trained is None else trained
    if not np.isfinite(prediction[:, expected]).all():
        raise RunFailed(f"{DIVERGED}the predictions hold NaN or infinity")
    scores = all_scores(moments, reliability, mean_noise(noise, target))
    resampled = dict.fromkeys(scores, np.empty(0))
    if len(target) > 1:
        resampled = bootstrap_means(prediction, target, reliability=reliability, noise=noise)
    report: dict[str, Any] = {name: _summary(scores[name], resampled[name]) for name in scores}
    undefined = np.isnan(scores["r2"])
    if undefined.any():
        report["sites_without_r2"] = [site_ids[site] for site in np.flatnonzero(undefined)]
    if reliability is not None:
        report |= {"ceiling": _summary(reliability), "least_reliability": LEAST_RELIABILITY}
        unreliable = ~(reliability >= LEAST_RELIABILITY)
        if unreliable.any():
            report["unreliable_sites"] = [site_ids[site] for site in np.flatnonzero(unreliable)]
    return report


def _summary(per_site: np.ndarray, resampled: np.ndarray | None = None) -> dict[str, Any]:
    median = float(np.nanmedian(per_site)) if np.isfinite(per_site).any() else float("nan")
    block: dict[str, Any] = {"mean": to_json_list([mean_score(per_site)])[0], "median": to_json_list([median])[0]}
    if resampled is not None:
        block["ci95"] = percentile_interval(resampled)
    return block | {"per_site": to_json_list(per_site)}


@dataclass
class ClassCounts:
    """Right answers per class, and among the five likeliest; int64 tensors of length `classes` on the device."""

    shown: torch.Tensor
    top1: torch.Tensor
    top5: torch.Tensor

    @classmethod
    def zeros(cls, classes: int, device: torch.device | str = "cpu") -> "ClassCounts":
        """No stimulus seen yet."""
        return cls(*(torch.zeros(classes, dtype=torch.int64, device=device) for _ in range(3)))

    def add(self, logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor) -> None:
        """Take in a batch: logits (stimuli, classes), labels (stimuli,), weight (stimuli,) with 0 for padding."""
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        counts = (weight > 0).long()
        right = (best == labels[:, None]).long() * counts[:, None]
        self.shown.index_add_(0, labels, counts)
        self.top1.index_add_(0, labels, right[:, 0])
        self.top5.index_add_(0, labels, right.sum(1))

    def stacked(self) -> torch.Tensor:
        """int64 (3, classes), to be summed over ranks."""
        return torch.stack((self.shown, self.top1, self.top5))


def classification_report(counts: torch.Tensor, classes: list[str]) -> dict[str, Any]:
    """The `classification` block of metrics.json from counts summed over all ranks, int64 (3, classes)."""
    shown, top1, top5 = counts.cpu().numpy()
    seen = shown > 0
    recall = top1[seen] / shown[seen]
    return {
        "top1": float(top1.sum() / shown.sum()),
        "top5": float(top5.sum() / shown.sum()),
        "balanced_accuracy": float(recall.mean()),
        "per_class": {classes[index]: float(top1[index] / shown[index]) for index in np.flatnonzero(seen)},
    }
