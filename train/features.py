"""Activations of a frozen network, or the pixels, for a rank's share of the stimuli."""

import difflib
import fnmatch
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from data_prep.errors import BadInput
from data_prep.progress import Progress
from train.backbones import Backbone
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


def pooled(activation: torch.Tensor, grid: int | None) -> torch.Tensor:
    """(b, ...) -> float32 (b, features); maps (b, channels, h, w) are average-pooled to at most grid x grid."""
    if grid is not None and activation.ndim == 4:
        size = [min(side, grid) for side in activation.shape[-2:]]
        activation = F.adaptive_avg_pool2d(activation, size)
    return activation.flatten(1).float()


@contextmanager
def _listening(net: nn.Module, layers: list[str], grid: int | None) -> Iterator[dict[str, torch.Tensor]]:
    heard: dict[str, torch.Tensor] = {}

    def listener(name: str):
        def hear(_module, _inputs, output):
            heard[name] = pooled(output, grid)

        return hear

    handles = [net.get_submodule(name).register_forward_hook(listener(name)) for name in layers]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def extract(
    backbone: Backbone | None,
    layers: list[str],
    stimuli: Stimuli,
    runtime: Runtime,
    *,
    grid: int | None,
    batch_size: int,
    workers: int,
    label: str,
) -> dict[str, torch.Tensor]:
    """Features of this rank's share of the stimuli; one forward pass serves all layers.

    Args:
        backbone: network whose `net` holds the layers; None for the pixels.
        layers: names of modules, or [PIXELS].
        stimuli: of the split.
        runtime: this process.
        grid: maps are average-pooled to at most grid x grid; None keeps them whole.
        batch_size: stimuli per forward pass.
        workers: decoding processes.
        label: of the progress bar.

    Returns:
        Per layer float32 (own stimuli, features), on the CPU, in the order of `train.loader.rank_positions`.
    """
    loader = evaluation_loader(
        stimuli, size=batch_size, rank=runtime.rank, ranks=runtime.ranks, workers=workers, pin=runtime.on_gpu
    )
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    with Progress(len(stimuli), label, silent=not runtime.leads) as progress:
        for batch in loader:
            there = int(batch.weight.sum())
            images = batch.to(runtime.device).images
            if backbone is None:
                found = {PIXELS: (images.float() / 255).flatten(1)}
            else:
                with _listening(backbone.net, layers, grid) as found:
                    backbone(images)
            for name in layers:
                parts[name].append(found[name][:there].cpu())
            progress.advance(min(there * runtime.ranks, len(stimuli) - progress.done))
    return {name: torch.cat(pieces) for name, pieces in parts.items()}
