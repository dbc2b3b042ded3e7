"""The content of metrics.json."""

from typing import Any

import numpy as np

from data_prep.common.errors import DIVERGED, RunFailed
from data_prep.confidence_interval import ANY_VALUE, confidence_interval, percentile_interval
from data_prep.shards.manifest import Manifest, from_json_list, to_json_list
from train.data.stimuli import RecordingStimuli, fingerprint
from train.evaluation.brain_score import brain_score
from train.evaluation.classification import classification_report
from train.evaluation.confidence_intervals import MEDIANS, ResampledScores, bootstrap_scores
from train.evaluation.metrics import LEAST_RELIABILITY, POSSIBLE, all_scores, mean_noise, mean_score, median_score
from train.evaluation.moments import SiteMoments
from train.evaluation.scoring import RecordingScores

NOISE_CEILING = "noise variance of the scored stimuli's repetitions"  # of FEVE and r2_ER
NO_RESAMPLES = np.empty(0)
SHUFFLED_CONTROL = "shuffled responses"  # `control` of a run or probe that was fitted on shuffled responses


def metrics_report(
    scores: RecordingScores, stimuli: RecordingStimuli, manifest: Manifest, split: str, ranks: int
) -> dict[str, Any]:
    """The content of metrics.json for a network's scores on a split."""
    metrics = report_head(stimuli.stimulus_ids, stimuli.rates, manifest, split, ranks)
    if scores.moments is not None:
        assert scores.rates is not None, "the predictions of a report are kept"
        assert stimuli.rates is not None
        noise = stimuli.noise_of_rates()
        metrics["regression"] = regression_block(scores.moments, scores.rates, stimuli.rates, manifest, noise)
    if scores.counts is not None:
        metrics["classification"] = classification_report(scores.counts, manifest.classes or [])
    return metrics


def report_head(
    stimulus_ids: list[str], rates: np.ndarray | None, manifest: Manifest, split: str, ranks: int
) -> dict[str, Any]:
    """The first entries of every metrics.json: what was scored, and on how many processes."""
    head = {
        "split": split,
        "stimuli": len(stimulus_ids),
        "world_size": ranks,
        "recording": manifest.name,
        "fingerprint": fingerprint(stimulus_ids, rates),
    }
    if manifest.simulated:
        head["simulated"] = True
    return head


def resampled_scores(
    prediction: np.ndarray, response: np.ndarray, manifest: Manifest, noise: np.ndarray | None
) -> ResampledScores:
    """The scores on resamples of the stimuli, as `regression_block` draws them from its arguments; none of one."""
    if len(response) < 2:
        return ResampledScores({}, {})
    reliability = None if manifest.ceiling is None else from_json_list(manifest.ceiling.reliability)
    response = np.where(manifest.rates.fitted_sites(), response, np.nan)
    return bootstrap_scores(prediction, response, reliability, noise)


def regression_block(
    moments: SiteMoments,
    prediction: np.ndarray,
    response: np.ndarray,
    manifest: Manifest,
    noise: np.ndarray | None,
    resampled: ResampledScores | None = None,
) -> dict[str, Any]:
    """The `regression` block for the sites of a recording; every score that rests on a ceiling names it.

    Args:
        moments: of responses and predictions, of all ranks.
        prediction, response: (stimuli, sites).
        manifest: has the reliability of each site where there are single trials.
        noise: (stimuli, sites), noise variance of the responses (`RecordingStimuli.noise_of_rates`), or None.
        resampled: of `resampled_scores`, where they are known already.

    Raises:
        RunFailed: a prediction is NaN or infinite.
    """
    ceiling = manifest.ceiling
    reliability = None if ceiling is None else from_json_list(ceiling.reliability)
    # Folders of earlier versions have no other estimate than this one.
    split_half = reliability if ceiling is None or ceiling.split_half is None else from_json_list(ceiling.split_half)
    trained = manifest.rates.fitted_sites()
    site_ids = manifest.site_ids
    block = regression_report(
        moments, prediction, response, site_ids, reliability, trained, noise, split_half, resampled
    )
    if ceiling is not None:
        block["ceiling"] |= ceiling.facts()
        for name in ("ceiled_explained_variance", "ceiled_pearson_r"):
            block[name]["ceiling"] = ceiling.method
    if noise is not None:
        for name in ("feve", "r2_er"):
            block[name]["ceiling"] = NOISE_CEILING
    return block


def regression_report(
    moments: SiteMoments,
    prediction: np.ndarray,
    response: np.ndarray,
    site_ids: list[str],
    reliability: np.ndarray | None,
    trained: np.ndarray | None = None,
    noise: np.ndarray | None = None,
    split_half: np.ndarray | None = None,
    resampled: ResampledScores | None = None,
) -> dict[str, Any]:
    """Every metric's mean, median, confidence intervals and values per site, and Brain-Score's score.

    Args:
        moments: of responses and predictions, of all ranks.
        prediction, response: (stimuli, sites), for the intervals.
        site_ids: of the sites.
        reliability: of the trial average, float64 (sites,), or None.
        trained: bool (sites,), the sites that a model can be fitted to; the others have no score. All by default.
        noise: noise variance of each response, float64 (stimuli, sites), or None.
        split_half: reliability of the trial average by split halves, float64 (sites,), or None.
        resampled: the scores on resamples of the stimuli; by default they are drawn here.

    Raises:
        RunFailed: a prediction is NaN or infinite.
    """
    if trained is not None:
        moments, response = moments.only(trained), np.where(trained, response, np.nan)
    predicted = prediction if trained is None else prediction[:, trained]
    if not np.isfinite(predicted).all():
        raise RunFailed(f"{DIVERGED}the predictions contain NaN or infinity")
    scores = all_scores(moments, reliability, mean_noise(noise, response))
    if resampled is None:
        resampled = ResampledScores({}, {})
        if len(response) > 1:
            resampled = bootstrap_scores(prediction, response, reliability, noise)
    report: dict[str, Any] = {
        name: _summary(name, per_site, resampled, len(response)) for name, per_site in scores.items()
    }
    if split_half is not None:
        medians = resampled.medians.get("pearson_r", NO_RESAMPLES)
        report["brain_score"] = brain_score(scores["pearson_r"], medians, split_half, len(response))
    undefined = np.isnan(scores["r2"])
    if undefined.any():
        report["sites_without_r2"] = [site_ids[site] for site in np.flatnonzero(undefined)]
    if reliability is not None:
        report["ceiling"] = _averages(reliability) | {"per_site": to_json_list(reliability)}
        report["least_reliability"] = LEAST_RELIABILITY
        unreliable = ~(reliability >= LEAST_RELIABILITY)
        if unreliable.any():
            report["unreliable_sites"] = [site_ids[site] for site in np.flatnonzero(unreliable)]
    return report


def _summary(name: str, per_site: np.ndarray, resampled: ResampledScores, stimuli: int) -> dict[str, Any]:
    """A metric's mean and median, with the interval of the mean and, of `MEDIANS`, that of the median."""
    means, possible = resampled.means.get(name, NO_RESAMPLES), POSSIBLE.get(name, ANY_VALUE)
    of_mean = confidence_interval(mean_score(per_site), means, stimuli, possible)
    summary = _averages(per_site) | {"ci95": of_mean and list(of_mean)}
    if name in MEDIANS:
        of_median = percentile_interval(resampled.medians.get(name, NO_RESAMPLES), stimuli)
        summary["median_ci95"] = of_median and list(of_median)
    return summary | {"per_site": to_json_list(per_site)}


def _averages(per_site: np.ndarray) -> dict[str, Any]:
    mean, median = to_json_list([mean_score(per_site), median_score(per_site)])
    return {"mean": mean, "median": median}
