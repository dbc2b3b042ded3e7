"""Readouts: from features to the sites.

Every readout is linear in its features as long as its spatial part is at its start. `start_features` returns those
features and `start_from` takes a linear map of them, so that each can start at a ridge
(`train/finetuning/setup/ridge_start.py`). By default each starts at the site's mean: its outputs are 0.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import nn

from train.models.windows import Window
from train.run.recipe import Readout


def zero_linear(features: int, outputs: int) -> nn.Linear:
    """A linear layer whose outputs are 0 until it is trained."""
    layer = nn.Linear(features, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class SiteReadout(nn.Module, ABC):
    """From features to the sites.

    Attributes:
        sites: the last layer, with an output per site.
        undecayed: names of its parameters that weight decay spares.
    """

    sites: nn.Linear
    undecayed: tuple[str, ...] = ()

    @abstractmethod
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Pooled features (b, features), or a map (b, channels, rows, columns) -> (b, sites)."""

    @abstractmethod
    def start_features(self, features: torch.Tensor) -> torch.Tensor:
        """What `forward` gets -> (b, features), in which the readout is linear at its start."""

    @torch.no_grad()
    def start_from(self, weight: torch.Tensor, bias: torch.Tensor, outputs: torch.Tensor) -> None:
        """Start at a linear map of `start_features`.

        Args:
            weight: (sites, features).
            bias: (sites,).
            outputs: (stimuli, sites) of that map, for a readout that can only approximate it.
        """
        self.sites.weight.copy_(weight)
        self.sites.bias.copy_(bias)


def build_readout(
    settings: Readout, features: int | None, map_shape: tuple[int, ...] | None, sites: int
) -> SiteReadout:
    """The readout of a recipe.

    Args:
        settings: its kind.
        features: number of pooled features of the backbone; needed by `linear`.
        map_shape: (channels, rows, columns) of the backbone's map; needed by all others.
        sites: number of outputs.
    """
    if settings.kind == "linear":
        assert features is not None
        return Linear(features, sites)
    assert map_shape is not None
    match settings.kind:
        case "flattened":
            return Linear(math.prod(map_shape), sites)
        case "low_rank":
            return LowRank(math.prod(map_shape), sites, settings.rank)
        case "factorised":
            return Factorised(map_shape, sites)
        case "gaussian":
            return Gaussian(map_shape, sites)


class Linear(SiteReadout):
    """y_s = w_s . x + b_s with x the pooled features, or the flattened map.

    features x sites + sites parameters.
    """

    def __init__(self, features: int, sites: int):
        super().__init__()
        self.sites = zero_linear(features, sites)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(b, features) or (b, channels, rows, columns) -> (b, sites)."""
        return self.sites(features.flatten(1))

    def start_features(self, features: torch.Tensor) -> torch.Tensor:
        """(b, features) or (b, channels, rows, columns) -> (b, features)."""
        return features.flatten(1)


class LowRank(SiteReadout):
    """y_s = u_s . (V x) + b_s with x the flattened map and V x dimensions that all sites share.

    rank (features + sites) + sites parameters.
    """

    def __init__(self, features: int, sites: int, rank: int):
        super().__init__()
        self.shared = nn.Linear(features, rank, bias=False)
        self.sites = zero_linear(rank, sites)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(b, channels, rows, columns) -> (b, sites)."""
        return self.sites(self.shared(features.flatten(1)))

    def start_features(self, features: torch.Tensor) -> torch.Tensor:
        """(b, channels, rows, columns) -> (b, features)."""
        return features.flatten(1)

    @torch.no_grad()
    def start_from(self, weight: torch.Tensor, bias: torch.Tensor, outputs: torch.Tensor) -> None:
        """The best approximation of a linear map's outputs at this rank (reduced-rank regression, Izenman 1975).

        Args:
            weight: (sites, features).
            bias: (sites,).
            outputs: (stimuli, sites) of that map; their leading right singular vectors are kept.
        """
        rank, mean = self.shared.out_features, outputs.mean(0)
        _, vectors = torch.linalg.eigh((outputs - mean).T @ (outputs - mean))
        leading = vectors[:, -rank:]  # (sites, at most rank)
        self.shared.weight.zero_()[: leading.shape[1]] = leading.T @ weight
        self.sites.weight.zero_()[:, : leading.shape[1]] = leading
        self.sites.bias.copy_(mean - leading @ (leading.T @ (mean - bias)))


class MaskedReadout(SiteReadout):
    """y_s = sum_c w_sc sum_p m_sp x_cp + b_s: a spatial mask m and channel weights w for each site.

    At the start all masks are equal.
    """

    def __init__(self, channels: int, sites: int):
        super().__init__()
        self.sites = zero_linear(channels, sites)

    @abstractmethod
    def masks(self) -> torch.Tensor:
        """float32 (sites, positions)."""

    @abstractmethod
    def set_windows(self, windows: Sequence[Window]) -> None:
        """Set each site's mask to a Gaussian window, which adds up to 1."""

    def windowed_start_features(self, features: torch.Tensor, windows: Sequence[Window]) -> torch.Tensor:
        """A map (b, channels, rows, columns) pooled through each window, window after window.

        Returns:
            (b, windows x channels).
        """
        masks = torch.stack([_mask(window, features.shape[2:]) for window in windows]).to(features)
        return (masks @ features.flatten(2).transpose(1, 2)).flatten(1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(b, channels, rows, columns) -> (b, sites)."""
        pooled = features.flatten(2) @ self.masks().T  # (b, channels, sites)
        return torch.einsum("bcs,sc->bs", pooled, self.sites.weight) + self.sites.bias

    def start_features(self, features: torch.Tensor) -> torch.Tensor:
        """(b, channels, rows, columns) -> (b, channels): the map through the mask that all sites start with."""
        return features.flatten(2) @ self.masks()[0]


def _mask(window: Window, sides: Sequence[int]) -> torch.Tensor:
    """A window over a map of (rows, columns), adding up to 1: float32 (positions,)."""
    rows, columns = sides
    weights = torch.from_numpy(window.weights(rows, columns))
    return weights / weights.sum()


class Factorised(MaskedReadout):
    """A free spatial mask and channel weights for each site (Klindt et al. 2017).

    sites (positions + channels) + sites parameters. The masks start uniform, as mean pooling.
    """

    def __init__(self, map_shape: tuple[int, ...], sites: int):
        channels, rows, columns = map_shape
        super().__init__(channels, sites)
        self._map_sides = (rows, columns)
        self.mask = nn.Parameter(torch.ones(sites, rows * columns))

    def masks(self) -> torch.Tensor:
        """(sites, positions); a mask of ones is mean pooling, so that steps of the optimizer fit masks of any size."""
        return self.mask / self.mask.shape[1]

    @torch.no_grad()
    def set_windows(self, windows: Sequence[Window]) -> None:
        """See `MaskedReadout.set_windows`."""
        masks = torch.stack([_mask(window, self._map_sides) for window in windows])
        self.mask.copy_(masks * masks.shape[1])


class Gaussian(MaskedReadout):
    """Channel weights and a Gaussian window for each site (St-Yves and Naselaris 2018).

    m_sp ~ exp(-|p - c_s|^2 / 2 sigma_s^2), adding up to 1 over positions p, with centre c and width sigma learned, in
    half image sides. sites (channels + 3) + sites parameters. The windows start in the middle, with sigma 0.5. Nothing
    is sampled, so the number of processes does not matter.
    """

    undecayed = ("centre", "log_width")
    positions: torch.Tensor

    def __init__(self, map_shape: tuple[int, ...], sites: int):
        channels, rows, columns = map_shape
        super().__init__(channels, sites)
        self.centre = nn.Parameter(torch.zeros(sites, 2))
        self.log_width = nn.Parameter(torch.full((sites,), math.log(0.5)))
        y, x = ((torch.arange(count) + 0.5) / count * 2 - 1 for count in (rows, columns))
        self.register_buffer("positions", torch.cartesian_prod(y, x).flip(1), persistent=False)  # (positions, (x, y))

    def masks(self) -> torch.Tensor:
        """(sites, positions)."""
        squared = (self.centre[:, None] - self.positions).square().sum(2)
        return torch.softmax(-squared / (2 * torch.exp(2 * self.log_width))[:, None], dim=1)

    @torch.no_grad()
    def set_windows(self, windows: Sequence[Window]) -> None:
        """See `MaskedReadout.set_windows`; the windows have widths."""
        widths = [window.width for window in windows if window.width is not None]
        self.centre.copy_(torch.tensor([(window.x, window.y) for window in windows]))
        self.log_width.copy_(torch.tensor([math.log(width) for width in widths]))
