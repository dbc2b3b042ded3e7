"""Activations of a frozen network, or the pixels, for a rank's share of the stimuli."""

import difflib
import fnmatch
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from data_prep.errors import BadInput
from data_prep.progress import Progress
from train.backbones import Backbone, channels_first
from train.loader import Stimuli, evaluation_loader
from train.runtime import Runtime

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


def choose_layers(net: nn.Module, wanted: list[str]) -> list[str]:
    """Resolve `all`, names and globs to names of modules, in the order of the network.

    Raises:
        BadInput: a name that fits nothing, with the nearest that exist.
    """
    names = [name for name, _ in net.named_modules() if name]
    chosen: set[str] = set()
    for pattern in wanted:
        found = stage_names(net) if pattern == "all" else fnmatch.filter(names, pattern)
        if not found:
            near = difflib.get_close_matches(pattern, names, n=3) or stage_names(net)
            raise BadInput(f"layers: the network has no module {pattern!r}; nearest are {', '.join(near)}")
        chosen.update(found)
    return [name for name in names if name in chosen]


def pooled(activation: torch.Tensor, grid: int | None, net: nn.Module) -> torch.Tensor:
    """(b, ...) -> float32 (b, features); maps are average-pooled to at most grid x grid."""
    if grid is not None and activation.ndim == 4:
        activation = channels_first(activation, net)
        size = [min(side, grid) for side in activation.shape[-2:]]
        activation = F.adaptive_avg_pool2d(activation, size)
    return activation.flatten(1).float()


Features = Callable[[torch.Tensor], dict[str, torch.Tensor]]


def pixel_features(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """uint8 pictures (b, 3, size, size) -> float32 (b, pixels), 0..1."""
    return {PIXELS: (images.float() / 255).flatten(1)}


class LayerFeatures:
    """The activations of a frozen network's layers: one forward pass serves all of them.

    Args:
        backbone: network whose `net` holds the layers.
        layers: names of modules.
        grid: maps are average-pooled to at most grid x grid; None keeps them whole.
    """

    def __init__(self, backbone: Backbone, layers: list[str], grid: int | None):
        self._backbone, self._layers, self._grid = backbone, layers, grid

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """uint8 pictures (b, 3, size, size) -> per layer float32 (b, features)."""
        heard: dict[str, torch.Tensor] = {}

        def listener(name: str):
            def hear(_module, _inputs, output):
                heard[name] = pooled(output, self._grid, self._backbone.net)

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


@torch.no_grad()
def extract(
    features: Features,
    stimuli: Stimuli,
    runtime: Runtime,
    *,
    batch_size: int,
    workers: int,
    label: str,
) -> dict[str, torch.Tensor]:
    """Features of this rank's share of the stimuli.

    Args:
        features: from pictures to named features (b, ...).
        stimuli: of the split.
        runtime: this process.
        batch_size: stimuli per forward pass.
        workers: decoding processes.
        label: of the progress bar.

    Returns:
        By name float32 (own stimuli, features), on the CPU, in the order of `train.loader.rank_positions`.
    """
    loader = evaluation_loader(
        stimuli, size=batch_size, rank=runtime.rank, ranks=runtime.ranks, workers=workers, pin=runtime.on_gpu
    )
    parts: dict[str, list[torch.Tensor]] = {}
    with Progress(len(stimuli), label, silent=not runtime.leads) as progress:
        for batch in loader:
            there = int(batch.weight.sum())
            for name, found in features(batch.to(runtime.device).images).items():
                parts.setdefault(name, []).append(found[:there].cpu())
            progress.advance(min(there * runtime.ranks, len(stimuli) - progress.done))
    return {name: torch.cat(pieces) for name, pieces in parts.items()}
