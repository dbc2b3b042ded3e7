"""The interval of the paired bootstrap covers the true difference as often as it claims."""

import numpy as np
import pytest
from site_scores import scores

from train.evaluation.comparison import Lead, ScoredPredictions, leads

SITES, TRIALS = 8, 400
MIX = np.random.default_rng(7).normal(size=(3, SITES)) / 2


def recording(rng: np.random.Generator, stimuli: int, share: float) -> tuple[np.ndarray, ...]:
    """Responses, and the predictions of two models that explain 0.7 and `share` of what can be explained."""
    signal = rng.normal(size=(stimuli, 3)) @ MIX
    target = signal + rng.normal(size=signal.shape)
    better, worse = (part * signal + 0.3 * rng.normal(size=(stimuli, 3)) @ MIX for part in (0.7, share))
    return target, better, worse


def true_difference(share: float) -> dict[str, float]:
    """Of R2 and of MSE over endless stimuli, by the variances that `recording` draws from."""
    signal = (MIX**2).sum(0)
    error = {part: (1 - part) ** 2 * signal + 0.09 * signal + 1 for part in (0.7, share)}
    gain = error[share] - error[0.7]
    return {"r2": float(np.mean(gain / (signal + 1))), "mse": float(np.mean(gain))}


def leads_of(target: np.ndarray, one: np.ndarray, other: np.ndarray, resamples: int = 1000) -> dict[str, Lead]:
    """The better model's lead, by R2 and by MSE."""
    resampled = [ScoredPredictions(prediction, target).resampled(resamples) for prediction in (one, other)]
    by_model = [scores(prediction, target) for prediction in (one, other)]
    found = {}
    for metric in ("r2", "mse"):
        (found[metric],) = leads(metric, [model[metric].mean() for model in by_model], resampled, len(target))
    return found


@pytest.mark.parametrize(("stimuli", "share"), [(40, 0.5), (120, 0.7)])
def test_the_interval_covers_the_true_difference_as_often_as_it_says(stimuli, share):
    rng, truth, held = np.random.default_rng(stimuli), true_difference(share), {"r2": 0, "mse": 0}
    for _ in range(TRIALS):
        for metric, lead in leads_of(*recording(rng, stimuli, share), resamples=300).items():
            low, high = lead.interval if lead.better == 0 else (-lead.interval[1], -lead.interval[0])
            held[metric] += low <= truth[metric] <= high
    error = 3 * np.sqrt(0.95 * 0.05 / TRIALS)  # of a share counted in so many trials, three of its standard deviations
    for metric, count in held.items():
        assert abs(count / TRIALS - 0.95) < error, metric


def test_pairing_finds_what_two_intervals_side_by_side_do_not():
    """What is hard for both models cancels: their intervals overlap, that of the difference does not reach 0."""
    target, better, _ = recording(np.random.default_rng(0), 100, 0.7)
    worse = better + 0.2 * np.random.default_rng(1).normal(size=better.shape)
    a, b = (ScoredPredictions(prediction, target).resampled() for prediction in (better, worse))
    assert np.quantile(a["r2"], 0.025) < np.quantile(b["r2"], 0.975)
    lead = leads_of(target, better, worse)["r2"]
    assert lead.better == 0
    assert lead.is_certain


def test_leads_go_from_the_best_on_whichever_way_a_metric_points():
    values = {name: np.full(100, value) for name, value in (("a", 0.3), ("b", 0.5))}
    resampled = [{"mse": values["a"]}, {"mse": values["b"]}, None]
    leading = leads("mse", [0.3, 0.5, 0.9], resampled, 50)
    assert [(lead.better, lead.worse) for lead in leading] == [(0, 1), (1, 2)]
    assert leading[0].difference == pytest.approx(0.2)
    assert leading[0].is_certain
    assert leading[1].interval is None
    assert not leading[1].is_certain
    assert leads("r2", [0.3, None, 0.9], [None] * 3, 50)[0].better == 2


def test_a_model_is_not_ahead_of_itself():
    target, better, _ = recording(np.random.default_rng(0), 100, 0.7)
    same = ScoredPredictions(better, target).resampled()
    (lead,) = leads("r2", [0.4, 0.4], [same, same], 100)
    assert lead.interval == (0, 0)
    assert not lead.is_certain
