"""What a network is told it got wrong, and what its outputs mean in the recording's units.

All losses are parts: a micro-batch's part of the mean over the whole global batch, which is normalised by counts that
every rank knows. The sum over ranks and micro-batches is the loss of the global batch, and so is the gradient.
NaN responses contribute nothing, and neither does padding (weight 0). Where `Batch.means` has several groups of sites,
a loss of the responses is the mean over these groups of each one's.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data_prep.shards.manifest import Manifest, from_json_list
from train.data.batches import Batch
from train.run.recipe import Recipe

SumOverRanks = Callable[[torch.Tensor], torch.Tensor]
LEAST_VARIANCE = 1e-4  # of a site's predictions over a batch, in squared standard deviations of its responses


@dataclass(frozen=True)
class SiteLines:
    """Per site the line from predictions to responses that fits best by least squares; each float64 (sites,)."""

    slope: torch.Tensor
    mean_response: torch.Tensor
    mean_prediction: torch.Tensor


class ResponseLoss(nn.Module, ABC):
    """What the outputs of a readout to the sites mean, and a loss on them.

    Attributes:
        rate_mean, rate_std: float64 (sites,), of the responses over the train split.
    """

    name: str
    needs_whole_batch = False  # the loss of a global batch is not a sum over its stimuli
    ignores_offsets = False  # and scales: the outputs are calibrated after every epoch, see `Correlation.calibrate`

    def __init__(self, manifest: Manifest):
        super().__init__()
        for name, values in zip(("rate_mean", "rate_std"), rate_scale(manifest), strict=True):
            self.register_buffer(name, torch.from_numpy(values))  # saved: the weights mean nothing without them
        self.register_buffer("site_weights", torch.ones(len(self.rate_mean)), persistent=False)

    def weigh(self, weights: np.ndarray) -> None:
        """Let sites count differently in the loss: (sites,), 1 on average."""
        self.site_weights.copy_(torch.from_numpy(weights))

    def target(self, rates: torch.Tensor) -> torch.Tensor:
        """Rates (b, sites) in the recording's units -> what the outputs should be, float32."""
        return ((rates - self.rate_mean) / self.rate_std).float()

    def in_units(self, outputs: torch.Tensor) -> torch.Tensor:
        """Outputs (b, sites) -> rates in the recording's units, float32."""
        return (outputs * self.rate_std + self.rate_mean).float()

    @abstractmethod
    def part(self, outputs: torch.Tensor, batch: Batch, sum_over_ranks: SumOverRanks) -> torch.Tensor:
        """This micro-batch's part of the loss of its global batch."""


class SquaredError(ResponseLoss):
    """Mean squared error of z-scored rates over all recorded responses of the global batch."""

    name = "mse"

    def part(self, outputs: torch.Tensor, batch: Batch, sum_over_ranks: SumOverRanks) -> torch.Tensor:
        """See `ResponseLoss.part`."""
        target = self.target(batch.rates)
        there = ~torch.isnan(target)
        error = torch.where(there, outputs - torch.where(there, target, 0), 0)
        return mean_over_groups(error**2 * self.site_weights, batch)


class PoissonLikelihood(ResponseLoss):
    """Poisson negative log-likelihood of raw rates y, lambda - y log lambda (without the term of y alone).

    The mean rate is lambda = m (1 + elu(z)), with z the output and m the site's mean rate over train: m at z = 0,
    linear above, exponential below, never negative.
    """

    name = "poisson_nll"

    def __init__(self, manifest: Manifest):
        super().__init__(manifest)
        self.rate_mean.clamp_(min=1e-6)  # a site that was silent over train

    def target(self, rates: torch.Tensor) -> torch.Tensor:
        """The output whose lambda is a rate, continued linearly down to a rate of 0."""
        return (rates / self.rate_mean - 1).float()

    def in_units(self, outputs: torch.Tensor) -> torch.Tensor:
        """lambda, in the recording's units."""
        return (self.rate_mean * (1 + F.elu(outputs))).float()

    def part(self, outputs: torch.Tensor, batch: Batch, sum_over_ranks: SumOverRanks) -> torch.Tensor:
        """See `ResponseLoss.part`; in the recording's units."""
        there = ~torch.isnan(batch.rates)
        mean = self.rate_mean.float()
        # log(1 + elu(z)) without the rounding of the sum: z itself below 0.
        log_rate = mean.log() + torch.where(outputs < 0, outputs, torch.log1p(outputs.clamp(min=0)))
        loss = mean * (1 + F.elu(outputs)) - torch.where(there, batch.rates, 0) * log_rate
        return mean_over_groups(torch.where(there, loss, 0) * self.site_weights, batch)


class Correlation(ResponseLoss):
    """One minus Pearson's r over the stimuli of the global batch, averaged over its sites.

    Its value depends on all stimuli at once: each rank computes it from the sums of all ranks, and differentiates by
    its own. Sites with fewer than two responses in the batch, or constant ones, contribute nothing.

    r knows no scale, so neither do the outputs: `calibrate` fits each site's line from outputs to responses on the
    train stimuli.
    """

    name = "one_minus_r"
    needs_whole_batch = True
    ignores_offsets = True

    def __init__(self, manifest: Manifest):
        super().__init__(manifest)
        self.register_buffer("gain", torch.ones_like(self.rate_mean))
        self.register_buffer("offset", torch.zeros_like(self.rate_mean))

    def in_units(self, outputs: torch.Tensor) -> torch.Tensor:
        """The outputs on each site's calibrated line, in the recording's units."""
        return super().in_units(outputs * self.gain + self.offset)

    def part(self, outputs: torch.Tensor, batch: Batch, sum_over_ranks: SumOverRanks) -> torch.Tensor:
        """See `ResponseLoss.part`."""
        target = self.target(batch.rates).double()
        there = ~torch.isnan(target) & (batch.weight > 0)[:, None]
        y, p = torch.where(there, target, 0), torch.where(there, outputs.double(), 0)
        own = torch.stack([there.double().sum(0), y.sum(0), p.sum(0), (y * y).sum(0), (p * p).sum(0), (y * p).sum(0)])
        everyones = sum_over_ranks(own.detach())
        # The value is that of all ranks, the gradient goes through this rank's share.
        n, sum_y, sum_p, yy, pp, yp = own + (everyones - own.detach())
        count = n.clamp(min=1)
        var_y, var_p = yy / count - (sum_y / count) ** 2, pp / count - (sum_p / count) ** 2
        cov = yp / count - sum_y * sum_p / count**2
        counts = ((n > 1) & (var_y > LEAST_VARIANCE)) * self.site_weights.double()
        # At the start all predictions are equal; the least variance keeps the gradient finite there.
        r = cov / torch.sqrt((var_p + LEAST_VARIANCE) * torch.where(counts > 0, var_y, 1))
        sites = [group.sites for group in batch.means]
        wrong, counted = torch.where(counts > 0, (1 - r) * counts, 0).split(sites), counts.split(sites)
        of_groups = [part.sum() / count.sum().clamp(min=1) for part, count in zip(wrong, counted, strict=True)]
        loss = (sum(of_groups) / len(of_groups)).float()
        share = batch.weight.sum() / batch.global_stimuli  # of the value, so that the parts add up to it
        return loss - loss.detach() * (1 - share)

    def reset(self) -> None:
        """Forget the lines."""
        self.gain.fill_(1)
        self.offset.zero_()

    def calibrate(self, lines: SiteLines) -> None:
        """Take each site's line from uncalibrated predictions (see `reset`) to responses, in the recording's units."""
        z_p, z_y = ((mean - self.rate_mean) / self.rate_std for mean in (lines.mean_prediction, lines.mean_response))
        self.gain.copy_(lines.slope)
        self.offset.copy_(z_y - lines.slope * z_p)


RESPONSE_LOSSES = {"mse": SquaredError, "poisson": PoissonLikelihood, "correlation": Correlation}


class Objective(nn.Module):
    """The loss of a task.

    Attributes:
        responses: of the outputs to the sites; None for a classification.
    """

    def __init__(self, recipe: Recipe, manifest: Manifest):
        super().__init__()
        self._task, self._label_smoothing = recipe.task, recipe.loss.label_smoothing
        self.responses: ResponseLoss | None = (
            RESPONSE_LOSSES[recipe.loss.responses](manifest) if recipe.task.predicts_responses else None
        )
        if recipe.task.weighting == "uncertainty":
            self.log_variance = nn.Parameter(torch.zeros(2))  # of responses and classes

    def parts(
        self, outputs: Mapping[str, torch.Tensor], batch: Batch, sum_over_ranks: SumOverRanks
    ) -> dict[str, torch.Tensor]:
        """Scalars: "loss", which is minimised, and in a hybrid the parts it is the weighted sum of.

        All are this micro-batch's part of the global batch's mean; see the top of this file.
        """
        parts = {}
        if self.responses is not None:
            parts[self.responses.name] = self.responses.part(outputs["rates"], batch, sum_over_ranks)
        if self._task.predicts_classes:
            parts["cross_entropy"] = cross_entropy(outputs["classes"], batch, self._label_smoothing)
        if self._task.kind != "hybrid":
            return {"loss": next(iter(parts.values()))}
        if self._task.weighting == "uncertainty":
            return {"loss": self._by_uncertainty(*parts.values(), batch), **parts}
        weights = (self._task.regression_weight, self._task.classification_weight)
        return {"loss": sum(weight * part for weight, part in zip(weights, parts.values(), strict=True)), **parts}

    def _by_uncertainty(self, responses: torch.Tensor, classes: torch.Tensor, batch: Batch) -> torch.Tensor:
        """L_r exp(-s_r) / 2 + L_c exp(-s_c) + (s_r + s_c) / 2, with s = log sigma^2 learned (Kendall et al. 2018)."""
        precision = torch.exp(-self.log_variance)
        share = batch.weight.sum() / batch.global_stimuli
        return responses * precision[0] / 2 + classes * precision[1] + self.log_variance.sum() / 2 * share

    def learned_weights(self) -> dict[str, torch.Tensor]:
        """Weights of the two parts where they are learned, for the charts."""
        if self._task.weighting != "uncertainty":
            return {}
        responses, classes = torch.exp(-self.log_variance.detach())
        return {"weight/responses": responses / 2, "weight/classes": classes}


def mean_over_groups(losses: torch.Tensor, batch: Batch) -> torch.Tensor:
    """This micro-batch's part of the mean over groups of sites of each one's mean over its recorded responses.

    Args:
        losses: (b, sites), 0 where there is no response.
        batch: what they are of.
    """
    parts = (losses * batch.weight[:, None]).split([group.sites for group in batch.means], dim=1)
    means = [part.sum() / max(group.observed, 1) for part, group in zip(parts, batch.means, strict=True)]
    return sum(means) / len(means)


def cross_entropy(logits: torch.Tensor, batch: Batch, label_smoothing: float = 0.0) -> torch.Tensor:
    """This micro-batch's part of the mean cross-entropy over the stimuli of the global batch."""
    losses = F.cross_entropy(logits, batch.labels, reduction="none", label_smoothing=label_smoothing)
    return (losses * batch.weight).sum() / batch.global_stimuli


def rate_scale(manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
    """Per-site mean and standard deviation over the train split, float64 (sites,).

    (0, 1) for a site that train never recorded; standard deviation 1 for one that was constant there.
    """
    mean, std = from_json_list(manifest.rates.mean), from_json_list(manifest.rates.std)
    return np.nan_to_num(mean, nan=0.0), np.where(std > 0, std, 1.0)
