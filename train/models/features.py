"""Features of images for a probe: the activations of a frozen network's layers, or the pixels."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from train.models.backbone import Backbone, channels_first
from train.models.population import POPULATION, Population, SiteMaps
from train.models.tracing import record_outputs

PIXELS = "pixels"


class ImageFeatures(ABC):
    """Maps images to features, layer by layer.

    Attributes:
        parameters: number of parameters that the features depend on.
        population: sha256 of the sites of other recordings whose maps are among the features; None without any.
    """

    parameters: int
    population: str | None = None

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
        layers: names of modules; `population` stands for the maps of `site_maps`.
        grid: maps are average-pooled to at most grid x grid; None keeps them whole.
        site_maps: what sites of other recordings read.
    """

    def __init__(self, backbone: Backbone, layers: Sequence[str], grid: int | None, site_maps: SiteMaps | None = None):
        self.backbone, self._layers, self._grid, self._site_maps = backbone, layers, grid, site_maps
        self.parameters = sum(parameter.numel() for parameter in backbone.parameters())
        self.population = None if site_maps is None else site_maps.digest

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `ImageFeatures`; the features of a map are channel after channel."""
        if self._site_maps is None or POPULATION not in self._layers:
            return self._record(images, lambda output: self._pool(output).flatten(1).float(), self._layers)
        return {layer: output.flatten(1).float() for layer, output in self._with_site_maps(images).items()}

    def map_sizes(self, images: torch.Tensor) -> dict[str, tuple[int, int]]:
        """See `ImageFeatures`."""
        if self._site_maps is None or POPULATION not in self._layers:
            pooled = self._record(images, self._pool, self._layers)
        else:
            pooled = self._with_site_maps(images)
        return {
            layer: (output.shape[2], output.shape[3]) if output.ndim == 4 else (1, 1)
            for layer, output in pooled.items()
        }

    def only(self, layers: Sequence[str]) -> "LayerFeatures":
        """See `ImageFeatures`."""
        return LayerFeatures(self.backbone, layers, self._grid, self._site_maps)

    def joined_by(self, population: Population) -> "LayerFeatures":
        """The same features, and the maps of a population's sites as a layer named `population`.

        Raises:
            BadInput: the network's modules have other numbers of channels.
        """
        side, device = population.facts.image_size, self.backbone.mean.device
        image = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device)
        with torch.no_grad():
            maps = {module: _as_map(output) for module, output in self._record(image, self._pool, self._layers).items()}
        population.check_channels({module: output.shape[1] for module, output in maps.items()})
        sizes = {module: (output.shape[2], output.shape[3]) for module, output in maps.items()}
        site_maps = SiteMaps(population.weights, sizes, population.digest)
        return LayerFeatures(self.backbone, [*self._layers, POPULATION], self._grid, site_maps)

    def describe(self) -> str:
        """See `ImageFeatures`."""
        maps = "whole maps" if self._grid is None else f"maps pooled to at most {self._grid} x {self._grid}"
        sites = "" if self._site_maps is None else f", and those of {self._site_maps.sites:,} sites of other recordings"
        return f"{self.backbone.name}, weights: {self.backbone.weights_from}; {maps}{sites}"

    @property
    def site_maps(self) -> SiteMaps | None:
        """What sites of other recordings read; None without a population."""
        return self._site_maps

    def to(self, device: torch.device) -> None:
        """See `ImageFeatures`."""
        self.backbone.to(device).to(memory_format=torch.channels_last)
        if self._site_maps is not None:
            self._site_maps.to(device)

    def _pool(self, activation: torch.Tensor) -> torch.Tensor:
        """A map -> (b, channels, rows, columns), at most grid x grid; other activations as they are."""
        if activation.ndim != 4:
            return activation
        activation = channels_first(activation, self.backbone.net)
        if self._grid is None:
            return activation
        rows, columns = activation.shape[-2:]
        return F.adaptive_avg_pool2d(activation, (min(rows, self._grid), min(columns, self._grid)))

    def _with_site_maps(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """The pooled outputs of the layers, and the maps of the sites (b, sites, rows, columns)."""
        assert self._site_maps is not None
        modules = [layer for layer in self._layers if layer != POPULATION]
        outputs = self._record(images, self._pool, list(dict.fromkeys([*modules, *self._site_maps.modules_read])))
        maps = self._site_maps({module: _as_map(outputs[module]).float() for module in self._site_maps.modules_read})
        return {module: outputs[module] for module in modules} | {POPULATION: maps}

    def _record(
        self, images: torch.Tensor, transform: Callable[[torch.Tensor], torch.Tensor], modules: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        with record_outputs(self.backbone.net, modules, transform) as outputs:
            self.backbone(images)
        return outputs


def _as_map(output: torch.Tensor) -> torch.Tensor:
    """A module's output as a map (b, channels, rows, columns); what is none has a single position."""
    return output if output.ndim == 4 else output.flatten(1)[:, :, None, None]
