"""Feature extractors: the activations of a frozen network's layers, or the pixels."""

import difflib
import fnmatch
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from data_prep.common.errors import BadInput
from train.models.backbone import Backbone, channels_first
from train.models.joined_layers import SUM, modules_of
from train.models.truncation import is_dropped

PIXELS = "pixels"


def stage_names(net: nn.Module) -> list[str]:
    """The stages of a timm network in order: the parts of `blocks` or `stages`, or `layer1` ..., or timm's list."""
    modules = dict(net.named_modules())
    for container in ("blocks", "stages"):
        if container in modules and (found := [name for name in modules if re.fullmatch(rf"{container}\.\d+", name)]):
            return found
    if found := [name for name in modules if re.fullmatch(r"layer\d+", name)]:
        return found
    return [info["module"] for info in net.feature_info]


def choose_layers(backbone: Backbone, wanted: list[str], image_size: int) -> list[str]:
    """Resolve `all`, names and globs to names of modules, in the order of the network.

    A `*` stands for one part of a dotted name: `blocks.*` are the stages, not what is in them. Names joined by `+` are
    one layer that has the features of all (`modules_of`); those come after the others.

    Args:
        backbone: with the modules.
        wanted: what the user asked for.
        image_size: side in pixels of the images.

    Raises:
        BadInput: a name that fits nothing (with the nearest that exist) or that the forward pass does not come by.
    """
    net = backbone.net
    names = [name for name, _ in net.named_modules() if name]
    image = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8)
    with torch.no_grad():
        heard = LayerFeatures(backbone, names, grid=1)(image)
    heard = {name for name in heard if not is_dropped(net.get_submodule(name))}
    stages = [name for name in stage_names(net) if name in heard]
    cuts = [] if backbone.cut is None else modules_of(backbone.cut)
    stages += [name for name in cuts if name not in stages]

    def named(pattern: str) -> list[str]:
        matching = stages if pattern == "all" else [name for name in names if _matches(name, pattern)]
        if not matching:
            near = difflib.get_close_matches(pattern, names, n=3) or stages
            raise BadInput(f"layers: the network has no module {pattern!r}; nearest are {', '.join(near)}")
        found = [name for name in matching if name in heard]
        if not found:
            raise BadInput(f"layers: {pattern} has no output of its own in the forward pass; name another module")
        return found

    def in_order(patterns: list[str]) -> list[str]:
        chosen = {name for pattern in patterns for name in named(pattern)}
        return [name for name in names if name in chosen]

    sums = [SUM.join(in_order(modules_of(pattern))) for pattern in wanted if SUM in pattern]
    return [*in_order([pattern for pattern in wanted if SUM not in pattern]), *dict.fromkeys(sums)]


def _matches(name: str, pattern: str) -> bool:
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def pooled(activation: torch.Tensor, grid: int | None, net: nn.Module, flat: bool = True) -> torch.Tensor:
    """(b, ...) -> float32 (b, features), channel after channel; maps are average-pooled to at most grid x grid."""
    if activation.ndim == 4:
        activation = channels_first(activation, net)
        if grid is not None:
            size = [min(side, grid) for side in activation.shape[-2:]]
            activation = F.adaptive_avg_pool2d(activation, size)
    return activation.flatten(1).float() if flat else activation


class PixelFeatures:
    """The pixels themselves, under the name `pixels`."""

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """uint8 images (b, 3, size, size) -> float32 (b, pixels), 0..1."""
        return {PIXELS: (images.float() / 255).flatten(1)}

    def map_sizes(self, images: torch.Tensor) -> dict[str, tuple[int, int]]:
        """Rows and columns of positions among the features."""
        return {PIXELS: tuple(images.shape[-2:])}

    def of(self, _layers: list[str]) -> "PixelFeatures":
        """Itself: there is one layer."""
        return self

    parameters = 0

    def describe(self) -> str:
        """What is read, for the log."""
        return "pixels"

    def to(self, _device: torch.device) -> None:
        """Nothing has to move."""


class LayerFeatures:
    """The activations of a frozen network's layers: one forward pass serves all of them.

    Args:
        backbone: network whose `net` holds the layers.
        layers: names of modules.
        grid: maps are average-pooled to at most grid x grid; None keeps them whole.
    """

    def __init__(self, backbone: Backbone, layers: list[str], grid: int | None):
        self._backbone, self._layers, self._grid = backbone, layers, grid

    @property
    def parameters(self) -> int:
        """Of the network, all of them frozen."""
        return sum(parameter.numel() for parameter in self._backbone.parameters())

    def describe(self) -> str:
        """What is read, for the log."""
        maps = "whole maps" if self._grid is None else f"maps pooled to at most {self._grid} x {self._grid}"
        return f"{self._backbone.name}, weights: {self._backbone.weights_from}; {maps}"

    def to(self, device: torch.device) -> None:
        """Move the network to `device`."""
        self._backbone.to(device, memory_format=torch.channels_last)

    def of(self, layers: list[str]) -> "LayerFeatures":
        """The same network, and only some of its layers."""
        return LayerFeatures(self._backbone, layers, self._grid)

    def map_sizes(self, images: torch.Tensor) -> dict[str, tuple[int, int]]:
        """Rows and columns of each layer's map, whose positions vary fastest among its features; 1 x 1 for vectors."""
        heard = self._heard(images, lambda output: pooled(output, self._grid, self._backbone.net, flat=False))
        return {layer: tuple(found.shape[2:]) if found.ndim == 4 else (1, 1) for layer, found in heard.items()}

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """uint8 images (b, 3, size, size) -> per layer float32 (b, features)."""
        return self._heard(images, lambda output: pooled(output, self._grid, self._backbone.net))

    def _heard(self, images: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        heard: dict[str, torch.Tensor] = {}

        def listener(name: str):
            def hear(_module, _inputs, output):
                if isinstance(output, torch.Tensor):
                    heard[name] = change(output)

            return hear

        net = self._backbone.net
        # Before the hook of a cut, which ends the forward pass.
        handles = [net.get_submodule(name).register_forward_hook(listener(name), prepend=True) for name in self._layers]
        try:
            self._backbone(images)
        finally:
            for handle in handles:
                handle.remove()
        return heard
