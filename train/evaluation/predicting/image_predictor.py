"""What predicts responses to images: the networks of a run, a probe or an ensemble, and how they are combined."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from train.data.seen import SeenRecord
from train.evaluation.training_facts import ResponseScale
from train.models.network import Network

Kind = Literal["run", "probe", "ensemble"]


class NetworkInUnits(nn.Module):
    """Images, uint8 (b, 3, size, size) -> "rates" (b, sites) in the recording's units and/or "classes", logits."""

    def __init__(self, network: Network):
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Predict, as described for the class."""
        outputs = self.network(images)
        responses = self.network.objective.responses
        if responses is not None:
            outputs["rates"] = responses.to_rates(outputs["rates"])
        return outputs


@dataclass(frozen=True)
class SizedNetwork:
    """A network in evaluation mode.

    Attributes:
        module: images, uint8 (b, 3, size, size) -> "rates", float32 (b, sites), in the recording's units, and/or
            "classes", logits (b, classes).
        image_size: side in pixels of the images that it takes.
    """

    module: nn.Module
    image_size: int


@dataclass(frozen=True)
class Combination:
    """rates = offset + the sum over networks of weight x rates of the network, per site.

    Attributes:
        weights: float64 (networks, sites).
        offset: float64 (sites,).
    """

    weights: np.ndarray
    offset: np.ndarray

    @classmethod
    def of(cls, parts: "Sequence[Combination]", weights: np.ndarray, offset: np.ndarray) -> "Combination":
        """A combination of combinations.

        Args:
            parts: of the networks of each part.
            weights: of the parts, float64 (parts, sites).
            offset: float64 (sites,), to add.
        """
        networks = [part.weights * weight for part, weight in zip(parts, weights, strict=True)]
        offsets = [part.offset * weight for part, weight in zip(parts, weights, strict=True)]
        return cls(np.concatenate(networks), offset + np.sum(offsets, axis=0))


class PredictorNetwork(nn.Module):
    """The networks of a predictor as one, in evaluation mode: images -> "rates" and/or "classes", as `SizedNetwork`.

    Args:
        networks: one, or several.
        combination: of the rates of several; None for a single one.

    Attributes:
        image_sizes: sides in pixels of the images that they take, ascending.
        networks: their modules.
        combines: whether there is a combination.
    """

    weights: torch.Tensor
    offset: torch.Tensor

    def __init__(self, networks: Sequence[SizedNetwork], combination: Combination | None):
        super().__init__()
        self._size_of = [network.image_size for network in networks]
        self.image_sizes = sorted(set(self._size_of))
        self.networks = nn.ModuleList(network.module for network in networks)
        self.combines = combination is not None
        if combination is not None:
            self.register_buffer("weights", torch.from_numpy(combination.weights))
            self.register_buffer("offset", torch.from_numpy(combination.offset))
        self.eval()

    @property
    def sized_networks(self) -> list[SizedNetwork]:
        """The networks, each with its size."""
        return [SizedNetwork(*pair) for pair in zip(self.networks, self._size_of, strict=True)]

    def as_combination(self, sites: int) -> Combination:
        """The combination, also of a single network that predicts so many sites."""
        if not self.combines:
            return Combination(np.ones((1, sites)), np.zeros(sites))
        return Combination(self.weights.cpu().numpy(), self.offset.cpu().numpy())

    def forward(self, images: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The same images in each size of `image_sizes`, uint8 (b, 3, size, size)."""
        if not self.combines:
            return self.networks[0](images[0])
        parts = [self.rates_of_size(size, of_size) for size, of_size in zip(self.image_sizes, images, strict=True)]
        return {"rates": self.complete(sum(parts[1:], start=parts[0]))}

    def rates_of_size(self, size: int, images: torch.Tensor) -> torch.Tensor:
        """What the networks of a size add to the rates, float64 (b, sites).

        Args:
            size: of some of the networks.
            images: uint8 (b, 3, size, size).
        """
        parts = [
            network(images)["rates"] * weight
            for network, weight, size_of in zip(self.networks, self.weights, self._size_of, strict=True)
            if size_of == size
        ]
        return sum(parts[1:], start=parts[0])

    def complete(self, rates: torch.Tensor) -> torch.Tensor:
        """The rates from the sum of `rates_of_size` over all sizes, float32 (b, sites)."""
        return (rates + self.offset).float()


@dataclass(frozen=True)
class ImagePredictor:
    """A run, a probe or an ensemble that is ready to predict.

    Attributes:
        path: its folder.
        kind: what it is.
        checkpoint: of a run, its name, such as step_120; else "".
        recording: that it predicts; "" where an earlier version has not kept its name.
        units: of the rates.
        site_ids: in the order of the rates; None for a classifier.
        classes: in the order of the probabilities; None for a network without.
        network: what predicts.
        record: what it has seen; None if an earlier version made it.
        scale: of the responses that it was fitted on; None for a classifier.
    """

    path: Path
    kind: Kind
    checkpoint: str
    recording: str
    units: str
    site_ids: list[str] | None
    classes: list[str] | None
    network: PredictorNetwork
    record: SeenRecord | None
    scale: ResponseScale | None
