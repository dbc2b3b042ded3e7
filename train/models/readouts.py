"""Readouts: from features to the sites.

Every readout is linear in its features as long as its spatial part is at its start. `start_features` gives those
features and `start_from` takes a linear map of them, so that each can begin at a ridge
(`train/finetuning/ridge_start.py`). All begin at each site's mean: whatever the image, the outputs are 0.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import nn

from train.models.windows import Window
from train.run.recipe import Readout


def parameter_count(module: nn.Module, trainable_only: bool = False) -> int:
    """Number of parameters, or of those that are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable_only)


def zero_linear(features: int, outputs: int) -> nn.Linear:
    """A linear layer whose outputs are 0 until it has learned better."""
    layer = nn.Linear(features, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def build_readout(settings: Readout, features: int | None, map_shape: tuple[int, ...] | None, sites: int) -> nn.Module:
    """The readout of a recipe.

    Args:
        settings: its kind.
        features: pooled features of the backbone.
        map_shape: (channels, rows, columns) of the backbone's map.
        sites: outputs.
    """
    match settings.kind:
        case "linear":
            return Linear(features, sites)
        case "flattened":
            return Linear(math.prod(map_shape), sites)
        case "low_rank":
            return LowRank(math.prod(map_shape), sites, settings.rank)
        case "factorised":
            return Factorised(map_shape, sites)
        case "gaussian":
            return Gaussian(map_shape, sites)
    raise ValueError(settings.kind)


class Linear(nn.Module):
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
        """(b, features), in which the readout is linear."""
        return features.flatten(1)

    @torch.no_grad()
    def start_from(self, weight: torch.Tensor, bias: torch.Tensor, _outputs: torch.Tensor) -> None:
        """Take over `weight` (sites, features) and `bias` (sites,)."""
        self.sites.weight.copy_(weight)
        self.sites.bias.copy_(bias)


class LowRank(nn.Module):
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
        """(b, features), in which the readout is linear."""
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


class _Masked(nn.Module, ABC):
    """y_s = sum_c w_sc sum_p m_sp x_cp + b_s: a spatial mask m and channel weights w for each site.

    At the start all masks are alike.
    """

    def __init__(self, channels: int, sites: int):
        super().__init__()
        self.sites = zero_linear(channels, sites)

    @abstractmethod
    def masks(self) -> torch.Tensor:
        """(sites, positions)."""

    @abstractmethod
    def look_through(self, windows: Sequence[Window]) -> None:
        """Set each site's mask to a Gaussian window, which adds up to 1."""

    def start_features_through(self, features: torch.Tensor, windows: Sequence[Window]) -> torch.Tensor:
        """(b, windows x channels): the map as a site sees it through each window, window after window."""
        masks = torch.stack([_mask(window, features.shape[2:]) for window in windows]).to(features)
        return (masks @ features.flatten(2).transpose(1, 2)).flatten(1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(b, channels, rows, columns) -> (b, sites)."""
        seen = features.flatten(2) @ self.masks().T  # (b, channels, sites)
        return torch.einsum("bcs,sc->bs", seen, self.sites.weight) + self.sites.bias

    def start_features(self, features: torch.Tensor) -> torch.Tensor:
        """(b, channels): the map as any site sees it at the start."""
        return features.flatten(2) @ self.masks()[0]

    @torch.no_grad()
    def start_from(self, weight: torch.Tensor, bias: torch.Tensor, _outputs: torch.Tensor) -> None:
        """Take over `weight` (sites, channels) and `bias` (sites,)."""
        self.sites.weight.copy_(weight)
        self.sites.bias.copy_(bias)


def _mask(window: Window, sides: Sequence[int]) -> torch.Tensor:
    """A window over a map of these rows and columns, adding up to 1: float32 (positions,)."""
    weights = torch.from_numpy(window.weights(*sides))
    return weights / weights.sum()


class Factorised(_Masked):
    """A free spatial mask and channel weights for each site (Klindt et al. 2017).

    sites (positions + channels) + sites parameters. The masks begin uniform, as mean pooling.
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
    def look_through(self, windows: Sequence[Window]) -> None:
        """See `_Masked.look_through`."""
        masks = torch.stack([_mask(window, self._map_sides) for window in windows])
        self.mask.copy_(masks * masks.shape[1])


class Gaussian(_Masked):
    """Channel weights and a Gaussian receptive field for each site (St-Yves and Naselaris 2018).

    m_sp ~ exp(-|p - c_s|^2 / 2 sigma_s^2), adding up to 1 over positions p, with centre c and width sigma learned, in
    half image sides. sites (channels + 3) + sites parameters. The fields begin in the middle, with sigma 0.5. Nothing
    is sampled, so the number of processes does not matter.
    """

    undecayed = ("centre", "log_width")

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
    def look_through(self, windows: Sequence[Window]) -> None:
        """See `_Masked.look_through`."""
        self.centre.copy_(torch.tensor([(window.x, window.y) for window in windows]))
        self.log_width.copy_(torch.tensor([math.log(window.width) for window in windows]))
