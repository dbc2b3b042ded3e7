"""Features of images for a probe: the activations of a frozen network's layers, or the pixels."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from train.models.backbone import Backbone, channels_first
from train.models.tracing import record_outputs

PIXELS = "pixels"


class ImageFeatures(ABC):
    """Maps images to features, layer by layer.

    Attributes:
        parameters: number of parameters that the features depend on.
    """

    parameters: int

    @abstractmethod
    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """uint8 images (b, 3, size, size) -> by layer float32 (b, features)."""

    @abstractmethod
    def map_sizes(self, images: torch.Tensor) -> dict[str, tuple[int, int]]:
        """(rows, columns) of each layer's map, whose positions vary fastest among its features; 1 x 1 for vectors."""

    @abstractmethod
    def only(self, layers: Sequence[str]) -> "ImageFeatures":
        """The same features of some layers only."""

    @abstractmethod
    def describe(self) -> str:
        """What is read, for the log."""

    @abstractmethod
    def to(self, device: torch.device) -> None:
        """Compute on `device` from now on."""


class PixelFeatures(ImageFeatures):
    """The pixels, 0..1, as a layer named `pixels`."""

    parameters = 0

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `ImageFeatures`."""
        return {PIXELS: (images.float() / 255).flatten(1)}

    def map_sizes(self, images: torch.Tensor) -> dict[str, tuple[int, int]]:
        """See `ImageFeatures`."""
        rows, columns = images.shape[-2:]
        return {PIXELS: (rows, columns)}

    def only(self, layers: Sequence[str]) -> "PixelFeatures":
        """See `ImageFeatures`; there is a single layer."""
        return self

    def describe(self) -> str:
        """See `ImageFeatures`."""
        return "pixels"

    def to(self, device: torch.device) -> None:
        """See `ImageFeatures`; nothing has to move."""


class LayerFeatures(ImageFeatures):
    """The activations of a frozen network's layers: one forward pass serves all of them.

    Attributes:
        backbone: the network.

    Args:
        backbone: network whose `net` holds the layers.
        layers: names of modules.
        grid: maps are average-pooled to at most grid x grid; None keeps them whole.
    """

    def __init__(self, backbone: Backbone, layers: Sequence[str], grid: int | None):
        self.backbone, self._layers, self._grid = backbone, layers, grid
        self.parameters = sum(parameter.numel() for parameter in backbone.parameters())

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `ImageFeatures`; the features of a map are channel after channel."""
        return self._record(images, lambda output: self._pool(output).flatten(1).float())

    def map_sizes(self, images: torch.Tensor) -> dict[str, tuple[int, int]]:
        """See `ImageFeatures`."""
        pooled = self._record(images, self._pool)
        return {
            layer: (output.shape[2], output.shape[3]) if output.ndim == 4 else (1, 1)
            for layer, output in pooled.items()
        }

    def only(self, layers: Sequence[str]) -> "LayerFeatures":
        """See `ImageFeatures`."""
        return LayerFeatures(self.backbone, layers, self._grid)

    def describe(self) -> str:
        """See `ImageFeatures`."""
        maps = "whole maps" if self._grid is None else f"maps pooled to at most {self._grid} x {self._grid}"
        return f"{self.backbone.name}, weights: {self.backbone.weights_from}; {maps}"

    def to(self, device: torch.device) -> None:
        """See `ImageFeatures`."""
        self.backbone.to(device).to(memory_format=torch.channels_last)

    def _pool(self, activation: torch.Tensor) -> torch.Tensor:
        """A map -> (b, channels, rows, columns), at most grid x grid; other activations as they are."""
        if activation.ndim != 4:
            return activation
        activation = channels_first(activation, self.backbone.net)
        if self._grid is None:
            return activation
        rows, columns = activation.shape[-2:]
        return F.adaptive_avg_pool2d(activation, (min(rows, self._grid), min(columns, self._grid)))

    def _record(
        self, images: torch.Tensor, transform: Callable[[torch.Tensor], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        with record_outputs(self.backbone.net, self._layers, transform) as outputs:
            self.backbone(images)
        return outputs
