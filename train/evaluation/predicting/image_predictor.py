"""What predicts responses to images: the networks of a run, a probe or an ensemble, and how they are combined."""

from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True)
class ImagePredictor:
    """A run, a probe or an ensemble that is ready to predict.

    Attributes:
        path: its folder.
        kind: what it is.
        recording: that it predicts; "" where an earlier version has not kept its name.
        units: of the rates.
        site_ids: in the order of the rates; None for a classifier.
        classes: in the order of the probabilities; None for a network without.
        networks: one, or all those of an ensemble.
        combination: of the rates of several networks; None for a single one.
        record: what it has seen; None if an earlier version made it.
        scale: of the responses that it was fitted on; None for a classifier.
    """

    path: Path
    kind: Kind
    recording: str
    units: str
    site_ids: list[str] | None
    classes: list[str] | None
    networks: tuple[SizedNetwork, ...]
    combination: Combination | None
    record: SeenRecord | None
    scale: ResponseScale | None

    @property
    def image_sizes(self) -> list[int]:
        """Sides in pixels of the images that its networks take, ascending."""
        return sorted({network.image_size for network in self.networks})

    def as_combination(self) -> Combination:
        """Its networks as a combination, also of a single one."""
        if self.combination is not None:
            return self.combination
        sites = len(self.site_ids or [])
        return Combination(np.ones((1, sites)), np.zeros(sites))

    def to(self, device: torch.device) -> None:
        """Compute on `device` from now on."""
        for network in self.networks:
            network.module.to(device)

    def outputs(self, images: Mapping[int, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Predict.

        Args:
            images: by size, the same images uint8 (b, 3, size, size).

        Returns:
            "rates", float32 (b, sites), and/or "classes", logits (b, classes).
        """
        if self.combination is None:
            return self.networks[0].module(images[self.networks[0].image_size])
        parts = [self.rates_of_size(size, images[size]) for size in self.image_sizes]
        return {"rates": self.complete(sum(parts[1:], start=parts[0]))}

    def rates_of_size(self, size: int, images: torch.Tensor) -> torch.Tensor:
        """What the networks of a size add to the rates, float64 (b, sites).

        Args:
            size: of some of the networks.
            images: uint8 (b, 3, size, size).
        """
        weights = torch.from_numpy(self.as_combination().weights).to(images.device)
        parts = [
            network.module(images)["rates"] * weight
            for network, weight in zip(self.networks, weights, strict=True)
            if network.image_size == size
        ]
        return sum(parts[1:], start=parts[0])

    def complete(self, rates: torch.Tensor) -> torch.Tensor:
        """The rates from the sum of `rates_of_size` over all sizes, float32 (b, sites)."""
        return (rates + torch.from_numpy(self.as_combination().offset).to(rates.device)).float()
