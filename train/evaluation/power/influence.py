"""What each stimulus adds to a site's score: influence functions, for any number of repetitions.

To first order, a score over S stimuli is its value over endless ones plus the mean over these stimuli of the influence
psi (Hampel 1974), so its variance over draws of stimuli is Var(psi) / S. With dy and dp the responses and predictions
less their means, V and W their variances, C their covariance, and b the mean of y - p:

    R2 = 1 - A / V, A = V + W - 2 C + b^2    psi = -(dy - dp + b)^2 / V + A / V^2 dy^2
    EV = 1 - E / V, E = V + W - 2 C          psi = -(dy - dp)^2 / V     + E / V^2 dy^2
    r  = C / sqrt(V W)                       psi = dy dp / sqrt(V W) - r / 2 (dy^2 / V + dp^2 / W)

each up to a constant. All are quadratic in the response. Trial noise adds the same to V, A and E and, on average,
nothing to C, W and b: so moments at another number of repetitions are known wherever there are trials.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from data_prep.recording import varies
from train.evaluation.metrics import LEAST_RELIABILITY


@dataclass(frozen=True)
class ScoreMoments:
    """Moments over the stimuli, each float64 (sites,).

    Attributes:
        response, prediction: variances, divided by the number of stimuli.
        covariance: of responses and predictions.
        bias: mean response less mean prediction.
    """

    response: np.ndarray
    prediction: np.ndarray
    covariance: np.ndarray
    bias: np.ndarray

    def with_noise(self, added: np.ndarray) -> "ScoreMoments":
        """The moments expected with so much more noise variance in the responses, (sites,); less, if negative.

        At least `LEAST_RELIABILITY` of a site's variance stays: what little signal a noisy site has is not known well
        enough to take off more.
        """
        return replace(self, response=np.maximum(self.response + added, LEAST_RELIABILITY * self.response))


@dataclass(frozen=True)
class CentredPredictions:
    """Responses and the predictions of a model, less their means.

    Attributes:
        response, prediction: float64 (stimuli, sites), 0 where no response was recorded.
        recorded: bool (stimuli, sites).
        response_mean: float64 (sites,).
        moments: of both.
    """

    response: np.ndarray
    prediction: np.ndarray
    recorded: np.ndarray
    response_mean: np.ndarray
    moments: ScoreMoments

    @classmethod
    def of(cls, prediction: np.ndarray, response: np.ndarray) -> "CentredPredictions":
        """From (stimuli, sites) each, NaN responses = not recorded; every site has at least one response."""
        recorded = ~np.isnan(response)
        count = recorded.sum(axis=0)
        y = np.where(recorded, response, 0).astype(np.float64)
        p = np.where(recorded, prediction, 0).astype(np.float64)
        response_mean, prediction_mean = y.sum(axis=0) / count, p.sum(axis=0) / count
        dy = np.where(recorded, y - response_mean, 0)
        dp = np.where(recorded, p - prediction_mean, 0)
        moments = ScoreMoments(
            response=(dy**2).sum(axis=0) / count,
            prediction=(dp**2).sum(axis=0) / count,
            covariance=(dy * dp).sum(axis=0) / count,
            bias=response_mean - prediction_mean,
        )
        return cls(dy, dp, recorded, response_mean, moments)

    def influence(self, metric: "PlannedMetric", moments: ScoreMoments, dy: np.ndarray, rows: slice) -> np.ndarray:
        """psi of some stimuli, up to a constant for each site: float64 (stimuli, sites).

        Args:
            metric: whose score it is.
            moments: that are expected.
            dy: responses to these stimuli, less their means, (stimuli, sites).
            rows: of these stimuli.
        """
        quadratic = metric.influence(moments, self.prediction[rows])
        return quadratic.square * dy**2 + quadratic.linear * dy + quadratic.constant

    def bias(self, metric: "PlannedMetric") -> np.ndarray:
        """How far a score over so many stimuli lies from that over endless ones, on average: float64 (sites,).

        By the jackknife (Quenouille 1956; Efron and Tibshirani 1993, chapter 10): R2 lies about (1 - R2) / S too low.
        """
        count = self.recorded.sum(axis=0)
        left, moments = count - 1, self.moments

        def without_one(mean_product: np.ndarray, products: np.ndarray) -> np.ndarray:
            return (count * mean_product - count / left * products) / left

        each = ScoreMoments(
            response=without_one(moments.response, self.response**2),
            prediction=without_one(moments.prediction, self.prediction**2),
            covariance=without_one(moments.covariance, self.response * self.prediction),
            bias=moments.bias - (self.response - self.prediction) / left,
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            scores = np.where(self.recorded, metric.score(each), 0)
            bias = left * (scores.sum(axis=0) / count - metric.score(moments))
        return np.where(np.isfinite(bias), bias, 0)


@dataclass(frozen=True)
class Quadratic:
    """psi = square dy^2 + linear dy + constant; (sites,), and (stimuli, sites) each."""

    square: np.ndarray
    linear: np.ndarray
    constant: np.ndarray


@dataclass(frozen=True)
class PlannedMetric:
    """A metric whose precision can be planned; higher scores are better.

    Attributes:
        key: its name in metrics.json.
        title: for sentences.
        score: of each site, from its moments.
        influence: of each stimulus, from the moments and the centred predictions, (stimuli, sites).
        noise_power: with noise added to a response variance V, differences shrink by V to this power.
    """

    key: str
    title: str
    score: Callable[[ScoreMoments], np.ndarray]
    influence: Callable[[ScoreMoments, np.ndarray], Quadratic]
    noise_power: float = 1.0


def _error(moments: ScoreMoments) -> np.ndarray:
    return moments.response + moments.prediction - 2 * moments.covariance


def _r2(moments: ScoreMoments) -> np.ndarray:
    return 1 - (_error(moments) + moments.bias**2) / moments.response


def _explained_variance(moments: ScoreMoments) -> np.ndarray:
    return 1 - _error(moments) / moments.response


def _pearson_r(moments: ScoreMoments) -> np.ndarray:
    return moments.covariance / np.sqrt(moments.response * moments.prediction)


def _influence_on_r2(moments: ScoreMoments, dp: np.ndarray) -> Quadratic:
    return _influence_on_error(moments, dp - moments.bias, _r2(moments))


def _influence_on_explained_variance(moments: ScoreMoments, dp: np.ndarray) -> Quadratic:
    return _influence_on_error(moments, dp, _explained_variance(moments))


def _influence_on_error(moments: ScoreMoments, predicted: np.ndarray, score: np.ndarray) -> Quadratic:
    variance = moments.response
    return Quadratic(-score / variance, 2 * predicted / variance, -(predicted**2) / variance)


def _influence_on_pearson_r(moments: ScoreMoments, dp: np.ndarray) -> Quadratic:
    r, variance = _pearson_r(moments), moments.prediction
    linear = dp / np.sqrt(moments.response * variance)
    return Quadratic(-r / (2 * moments.response), linear, -r * dp**2 / (2 * variance))


PLANNED: Mapping[str, PlannedMetric] = {
    metric.key: metric
    for metric in (
        PlannedMetric("r2", "R2", _r2, _influence_on_r2),
        PlannedMetric("explained_variance", "EV", _explained_variance, _influence_on_explained_variance),
        PlannedMetric("pearson_r", "Pearson r", _pearson_r, _influence_on_pearson_r, noise_power=0.5),
    )
}


def scored_sites(metric: PlannedMetric, prediction: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Which sites have a score, bool (sites,): those whose responses vary, and for r also the predictions."""
    recorded = ~np.isnan(response)
    count = recorded.sum(axis=0)

    def has_variance(values: np.ndarray) -> np.ndarray:
        values = np.where(recorded, values, 0).astype(np.float64)
        mean = values.sum(axis=0) / np.maximum(count, 1)
        return varies(count, (np.where(recorded, values - mean, 0) ** 2).sum(axis=0), mean)

    has_score = (count > 1) & has_variance(response)
    return has_score & has_variance(prediction) if metric.key == "pearson_r" else has_score
