"""Losses of a micro-batch, and the meaning of the outputs in the recording's units.

Every loss here is a contribution: the amount that a micro-batch adds to the mean over its global batch. Contributions
are normalised by counts that every rank knows, so their sum over ranks and micro-batches is the loss of the global
batch, and the sum of their gradients its gradient. NaN responses contribute nothing, and neither does padding (weight
0). Where `Batch.means` has several groups of sites, the loss of the responses is the mean over the groups' losses.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data_prep.shards.manifest import Manifest, from_json_list
from train.data.batches import Batch
from train.run.recipe import Recipe

SumOverRanks = Callable[[torch.Tensor], torch.Tensor]
MIN_VARIANCE = 1e-4  # of a site's predictions over a batch, in squared standard deviations of its responses
SILENT_RATE = 1e-6  # stands for the mean rate of a site that was silent over train


@dataclass(frozen=True)
class SiteLines:
    """Per site, the least-squares line from predictions to responses; each float64 (sites,)."""

    slope: torch.Tensor
    mean_response: torch.Tensor
    mean_prediction: torch.Tensor


class ResponseLoss(nn.Module, ABC):
    """The meaning of a readout's outputs to the sites, and a loss on them.

    Attributes:
        name: of the loss in logs and charts.
        needs_whole_batch: the loss of a global batch is not a sum over its stimuli.
        needs_calibration: the loss ignores each site's offset and scale; see `Correlation.calibrate`.
        rate_mean, rate_std: float64 (sites,), of the responses over the train split.
        site_weights: float32 (sites,), 1 on average.
    """

    name: str
    needs_whole_batch = False
    needs_calibration = False
    rate_mean: torch.Tensor
    rate_std: torch.Tensor
    site_weights: torch.Tensor

    def __init__(self, manifest: Manifest):
        super().__init__()
        mean, std = rate_scale(manifest)
        self.register_buffer("rate_mean", torch.from_numpy(mean))  # saved: the weights mean nothing without them
        self.register_buffer("rate_std", torch.from_numpy(std))
        self.register_buffer("site_weights", torch.ones(len(mean)), persistent=False)
        self._weighs_sites = False

    def set_site_weights(self, weights: np.ndarray) -> None:
        """Let sites count differently in the loss: (sites,), 1 on average."""
        self.site_weights.copy_(torch.from_numpy(weights))
        self._weighs_sites = True

    def weighted(self, losses: torch.Tensor) -> torch.Tensor:
        """Losses (b, sites), each times its site's weight."""
        return losses * self.site_weights if self._weighs_sites else losses

    def target(self, rates: torch.Tensor) -> torch.Tensor:
        """Rates (b, sites) in the recording's units -> what the outputs should be, float32 (b, sites)."""
        return ((rates - self.rate_mean) / self.rate_std).float()

    def to_rates(self, outputs: torch.Tensor) -> torch.Tensor:
        """Outputs (b, sites) -> rates in the recording's units, float32 (b, sites)."""
        return (outputs * self.rate_std + self.rate_mean).float()

    @abstractmethod
    def contribution(self, outputs: torch.Tensor, batch: Batch, sum_over_ranks: SumOverRanks) -> torch.Tensor:
        """The scalar that a micro-batch adds to the loss of its global batch.

        Args:
            outputs: (b, sites).
            batch: with responses.
            sum_over_ranks: adds a tensor over all ranks.
        """


class SquaredError(ResponseLoss):
    """Mean squared error of z-scored rates over all recorded responses of the global batch."""

    name = "mse"

    def contribution(self, outputs: torch.Tensor, batch: Batch, sum_over_ranks: SumOverRanks) -> torch.Tensor:
        """See `ResponseLoss.contribution`."""
        target = self.target(_rates(batch))
        error = torch.where(torch.isnan(target), 0, outputs - target)
        return mean_over_groups(self.weighted(error**2), batch)


class PoissonLikelihood(ResponseLoss):
    """Poisson negative log-likelihood of raw rates y, lambda - y log lambda (without the term of y alone).

    The mean rate is lambda = m (1 + elu(z)), with z the output and m the site's mean rate over train: m at z = 0,
    linear above, exponential below, never negative.
    """

    name = "poisson_nll"

    def __init__(self, manifest: Manifest):
        super().__init__(manifest)
        self.rate_mean.clamp_(min=SILENT_RATE)

    def target(self, rates: torch.Tensor) -> torch.Tensor:
        """The output whose lambda is a rate, continued linearly down to a rate of 0."""
        return (rates / self.rate_mean - 1).float()

    def to_rates(self, outputs: torch.Tensor) -> torch.Tensor:
        """lambda, in the recording's units."""
        return (self.rate_mean * (1 + F.elu(outputs))).float()

    def contribution(self, outputs: torch.Tensor, batch: Batch, sum_over_ranks: SumOverRanks) -> torch.Tensor:
        """See `ResponseLoss.contribution`; in the recording's units."""
        rates = _rates(batch)
        recorded = ~torch.isnan(rates)
        mean = self.rate_mean.float()
        # log(1 + elu(z)) without the rounding of the sum: z itself below 0.
        log_rate = mean.log() + torch.where(outputs < 0, outputs, torch.log1p(outputs.clamp(min=0)))
        loss = mean * (1 + F.elu(outputs)) - torch.where(recorded, rates, 0) * log_rate
        return mean_over_groups(self.weighted(torch.where(recorded, loss, 0)), batch)


class Correlation(ResponseLoss):
    """One minus Pearson's r over the stimuli of the global batch, averaged over its sites.

    Its value depends on all stimuli at once: each rank computes it from the sums of all ranks, and differentiates by
    its own. Sites with fewer than two responses in the batch, or constant ones, contribute nothing.

    r ignores scale, so the outputs have none: `calibrate` fits each site's line from outputs to responses on the train
    stimuli.

    Attributes:
        gain, offset: float64 (sites,), from outputs to z-scored rates.
    """

    name = "one_minus_r"
    needs_whole_batch = True
    needs_calibration = True
    gain: torch.Tensor
    offset: torch.Tensor

    def __init__(self, manifest: Manifest):
        super().__init__(manifest)
        self.register_buffer("gain", torch.ones_like(self.rate_mean))
        self.register_buffer("offset", torch.zeros_like(self.rate_mean))

    def to_rates(self, outputs: torch.Tensor) -> torch.Tensor:
        """The outputs on each site's calibrated line, in the recording's units."""
        return super().to_rates(outputs * self.gain + self.offset)

    def contribution(self, outputs: torch.Tensor, batch: Batch, sum_over_ranks: SumOverRanks) -> torch.Tensor:
        """See `ResponseLoss.contribution`."""
        target = self.target(_rates(batch)).double()
        recorded = ~torch.isnan(target) & (batch.weight > 0)[:, None]
        y, p = torch.where(recorded, target, 0), torch.where(recorded, outputs.double(), 0)
        sums = torch.stack(
            [recorded.double().sum(0), y.sum(0), p.sum(0), (y * y).sum(0), (p * p).sum(0), (y * p).sum(0)]
        )
        sums_of_all_ranks = sum_over_ranks(sums.detach())
        # The value is that of all ranks, the gradient goes through this rank's share.
        n, sum_y, sum_p, yy, pp, yp = sums + (sums_of_all_ranks - sums.detach())
        count = n.clamp(min=1)
        var_y, var_p = yy / count - (sum_y / count) ** 2, pp / count - (sum_p / count) ** 2
        cov = yp / count - sum_y * sum_p / count**2
        weights = ((n > 1) & (var_y > MIN_VARIANCE)) * self.site_weights.double()
        # At the start all predictions are equal; the minimum variance keeps the gradient finite there.
        r = cov / torch.sqrt((var_p + MIN_VARIANCE) * torch.where(weights > 0, var_y, 1))
        sites = [group.sites for group in batch.means]
        losses = torch.where(weights > 0, (1 - r) * weights, 0).split(sites)
        means = [
            group_losses.sum() / group_weights.sum().clamp(min=1)
            for group_losses, group_weights in zip(losses, weights.split(sites), strict=True)
        ]
        loss = _mean(means).float()
        share = batch.weight.sum() / batch.global_stimuli  # of the value, so that the contributions add up to it
        return loss - loss.detach() * (1 - share)

    def reset(self) -> None:
        """Undo `calibrate`."""
        self.gain.fill_(1)
        self.offset.zero_()

    def calibrate(self, lines: SiteLines) -> None:
        """Take each site's line from uncalibrated predictions (see `reset`) to responses, in the recording's units."""
        prediction, response = (
            (mean - self.rate_mean) / self.rate_std for mean in (lines.mean_prediction, lines.mean_response)
        )
        self.gain.copy_(lines.slope)
        self.offset.copy_(response - lines.slope * prediction)


RESPONSE_LOSSES: dict[str, type[SquaredError] | type[PoissonLikelihood] | type[Correlation]] = {
    "mse": SquaredError,
    "poisson": PoissonLikelihood,
    "correlation": Correlation,
}


class Objective(nn.Module):
    """The loss of a task.

    Attributes:
        responses: the loss of the responses; None for a classification.
    """

    def __init__(self, recipe: Recipe, manifest: Manifest):
        super().__init__()
        self._task, self._label_smoothing = recipe.task, recipe.loss.label_smoothing
        self.responses: ResponseLoss | None = (
            RESPONSE_LOSSES[recipe.loss.responses](manifest) if recipe.task.predicts_responses else None
        )
        if recipe.task.weighting == "uncertainty":
            self.log_variance = nn.Parameter(torch.zeros(2))  # of responses and classes

    def losses(
        self, outputs: Mapping[str, torch.Tensor], batch: Batch, sum_over_ranks: SumOverRanks
    ) -> dict[str, torch.Tensor]:
        """Scalars: "loss", which is minimised, and in a hybrid the terms it is the weighted sum of, by name.

        All are this micro-batch's contribution to the global batch's mean; see the top of this file.

        Args:
            outputs: "rates" (b, sites) and/or "classes", logits (b, classes).
            batch: the micro-batch.
            sum_over_ranks: adds a tensor over all ranks.
        """
        if self.responses is None:
            return {"loss": self._class_loss(outputs, batch)}
        responses = self.responses.contribution(outputs["rates"], batch, sum_over_ranks)
        if not self._task.predicts_classes:
            return {"loss": responses}
        classes = self._class_loss(outputs, batch)
        if self._task.weighting == "uncertainty":
            loss = self._weighted_by_uncertainty(responses, classes, batch)
        else:
            loss = self._task.regression_weight * responses + self._task.classification_weight * classes
        return {"loss": loss, self.responses.name: responses, "cross_entropy": classes}

    def _class_loss(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        return cross_entropy(outputs["classes"], batch, self._label_smoothing)

    def _weighted_by_uncertainty(self, responses: torch.Tensor, classes: torch.Tensor, batch: Batch) -> torch.Tensor:
        """L_r exp(-s_r) / 2 + L_c exp(-s_c) + (s_r + s_c) / 2, with s = log sigma^2 learned (Kendall et al. 2018)."""
        precision = torch.exp(-self.log_variance)
        share = batch.weight.sum() / batch.global_stimuli
        return responses * precision[0] / 2 + classes * precision[1] + self.log_variance.sum() / 2 * share

    def learned_weights(self) -> dict[str, torch.Tensor]:
        """Weights of the two losses of a hybrid where they are learned, for the charts."""
        if self._task.weighting != "uncertainty":
            return {}
        responses, classes = torch.exp(-self.log_variance.detach())
        return {"weight/responses": responses / 2, "weight/classes": classes}


def mean_over_groups(losses: torch.Tensor, batch: Batch) -> torch.Tensor:
    """A micro-batch's contribution to the mean over groups of sites of each group's mean over its recorded responses.

    Args:
        losses: (b, sites), 0 where there is no response.
        batch: the micro-batch.
    """
    losses = losses * batch.weight[:, None]
    if not batch.groups:
        return losses.sum() / max(batch.global_observed, 1)
    by_group = losses.split([group.sites for group in batch.means], dim=1)
    return _mean(
        [group_losses.sum() / max(group.observed, 1) for group_losses, group in zip(by_group, batch.means, strict=True)]
    )


def cross_entropy(logits: torch.Tensor, batch: Batch, label_smoothing: float = 0.0) -> torch.Tensor:
    """A micro-batch's contribution to the mean cross-entropy over the stimuli of the global batch.

    Args:
        logits: (b, classes).
        batch: with labels.
        label_smoothing: share of the target that is spread over all classes.
    """
    assert batch.labels is not None
    losses = F.cross_entropy(logits, batch.labels, reduction="none", label_smoothing=label_smoothing)
    return (losses * batch.weight).sum() / batch.global_stimuli


def rate_scale(manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
    """Per-site mean and standard deviation over the train split, float64 (sites,).

    (0, 1) for a site that train never recorded; standard deviation 1 for one that was constant there.
    """
    mean, std = from_json_list(manifest.rates.mean), from_json_list(manifest.rates.std)
    return np.nan_to_num(mean, nan=0.0), np.where(std > 0, std, 1.0)


def _rates(batch: Batch) -> torch.Tensor:
    assert batch.rates is not None  # recipes that predict responses need splits that have them
    return batch.rates


def _mean(scalars: Sequence[torch.Tensor]) -> torch.Tensor:
    return sum(scalars[1:], start=scalars[0]) / len(scalars)
