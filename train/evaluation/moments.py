"""Counts, means and centred second moments per site: the sums from which all metrics of responses follow."""

from dataclasses import dataclass, fields, replace
from functools import reduce

import numpy as np
import torch

from train.distributed.runtime import Runtime
from train.models.losses import SiteLines


@dataclass(frozen=True)
class SiteMoments:
    """Moments of the responses y, the predictions p and the residuals e = y - p over a set of stimuli.

    They are shifted moments: second moments are sums about the mean, which do not cancel. Moments of two sets of
    stimuli merge exactly, in whatever order the stimuli came (`merge`).

    Attributes: all float64 (sites,).
        count: recorded responses.
        response_mean, prediction_mean, residual_mean: of y, p and e.
        response_squares, prediction_squares, residual_squares: sum of (x - mean x)^2 for y, p and e.
        products: sum of (y - mean y) (p - mean p).
    """

    count: torch.Tensor
    response_mean: torch.Tensor
    prediction_mean: torch.Tensor
    residual_mean: torch.Tensor
    response_squares: torch.Tensor
    prediction_squares: torch.Tensor
    residual_squares: torch.Tensor
    products: torch.Tensor

    @classmethod
    def zeros(cls, sites: int, device: torch.device | str = "cpu") -> "SiteMoments":
        """The moments of no stimuli."""
        return cls._from_rows(torch.zeros(len(fields(cls)), sites, dtype=torch.float64, device=device))

    @classmethod
    def of(cls, prediction: torch.Tensor, response: torch.Tensor, weight: torch.Tensor | None = None) -> "SiteMoments":
        """The moments of a batch, on its device; nothing is copied to the host.

        Args:
            prediction: (stimuli, sites).
            response: (stimuli, sites); NaN responses are left out, site by site.
            weight: (stimuli,); a stimulus of weight 0 is left out.
        """
        y, p = response.double(), prediction.double()
        recorded = ~torch.isnan(y)
        if weight is not None:
            recorded = recorded & (weight > 0)[:, None]
        y, p = torch.where(recorded, y, 0), torch.where(recorded, p, 0)
        count = recorded.sum(0)
        divisor = count.clamp(min=1)
        response_mean, prediction_mean = y.sum(0) / divisor, p.sum(0) / divisor
        dy = torch.where(recorded, y - response_mean, 0)
        dp = torch.where(recorded, p - prediction_mean, 0)
        return cls(
            count=count.double(),
            response_mean=response_mean,
            prediction_mean=prediction_mean,
            residual_mean=response_mean - prediction_mean,
            response_squares=(dy**2).sum(0),
            prediction_squares=(dp**2).sum(0),
            residual_squares=((dy - dp) ** 2).sum(0),
            products=(dy * dp).sum(0),
        )

    def merge(self, other: "SiteMoments") -> "SiteMoments":
        """The moments of both sets of stimuli together, by the update of Chan, Golub and LeVeque (1983)."""
        count = self.count + other.count
        share = torch.where(count > 0, other.count / count.clamp(min=1), 0)
        between = self.count * share
        dy = other.response_mean - self.response_mean
        dp = other.prediction_mean - self.prediction_mean
        de = other.residual_mean - self.residual_mean
        return SiteMoments(
            count=count,
            response_mean=self.response_mean + dy * share,
            prediction_mean=self.prediction_mean + dp * share,
            residual_mean=self.residual_mean + de * share,
            response_squares=self.response_squares + other.response_squares + between * (dy * dy),
            prediction_squares=self.prediction_squares + other.prediction_squares + between * (dp * dp),
            residual_squares=self.residual_squares + other.residual_squares + between * (de * de),
            products=self.products + other.products + between * (dy * dp),
        )

    def over_ranks(self, runtime: Runtime) -> "SiteMoments":
        """The moments of all ranks merged, the same on every rank; one exchange."""
        ranks = runtime.all_gather(torch.stack(self._rows()))
        return reduce(SiteMoments.merge, map(self._from_rows, ranks))

    @classmethod
    def side_by_side(cls, recordings: list["SiteMoments"]) -> "SiteMoments":
        """The moments of the sites of several recordings, one recording after the other."""
        return cls._from_rows(torch.cat([torch.stack(moments._rows()) for moments in recordings], dim=1))

    def only(self, sites: np.ndarray) -> "SiteMoments":
        """The same moments, with a count of 0, and so no score, for all sites but these; bool (sites,)."""
        return replace(self, count=torch.where(torch.from_numpy(sites).to(self.count.device), self.count, 0))

    def is_finite(self) -> bool:
        """Whether all moments are finite: no prediction was NaN or infinite."""
        return bool(torch.isfinite(torch.stack(self._rows())).all())

    def least_squares_lines(self) -> SiteLines:
        """Each site's line from predictions to responses; its slope is 0 where the predictions are constant."""
        varies = self.prediction_squares > 0
        slope = torch.where(varies, self.products / torch.where(varies, self.prediction_squares, 1), 0)
        return SiteLines(slope=slope, mean_response=self.response_mean, mean_prediction=self.prediction_mean)

    def _rows(self) -> list[torch.Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    @classmethod
    def _from_rows(cls, rows: torch.Tensor) -> "SiteMoments":
        """From float64 (fields, sites), in the order of the fields."""
        return cls(**{field.name: row for field, row in zip(fields(cls), rows, strict=True)})
