"""Several layers of a network read together, as one map: `backbone.cut: blocks.3+blocks.4`.

What the recorded area resembles need not be one layer. The maps of all are averaged to one grid, and their channels
follow each other, those of each layer times a number that lets all layers vary alike
(`train/finetuning/layer_balance.py`).
"""

from collections.abc import Sequence

import torch
from torch import nn

from data_prep.common.errors import BadInput
from train.models.truncation import check_module, truncate

SUM = "+"  # between the names of modules that are read together
SIDE = 7  # rows and columns of the joined map


def modules_of(layer: str) -> list[str]:
    """The modules whose features a layer has: one, or those that `+` joins."""
    return layer.split(SUM)


class _Ear:
    """A forward hook that keeps what its module gave; a copy of the network has ears of its own."""

    def __init__(self) -> None:
        self._heard: torch.Tensor | None = None

    def __call__(self, _module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        self._heard = output

    def take(self) -> torch.Tensor:
        """What was heard last; it is given once."""
        heard, self._heard = self._heard, None
        return heard


class LayersHeard:
    """The forward pass of a network up to the last of several modules, which gives the outputs of all.

    Args:
        net: a timm network in evaluation mode; what comes after the last module is dropped.
        names: of the modules, in any order.
        example: images (b, 3, h, w) of the size that is going to be used.

    Raises:
        BadInput: no such module, one named twice, or one that the forward pass does not come by.
    """

    def __init__(self, net: nn.Module, names: Sequence[str], example: torch.Tensor):
        *before, last = _in_order(net, names, example)
        self._run = truncate(net, last, example, keep_head=False)
        self._ears = [_Ear() for _ in before]
        for name, ear in zip(before, self._ears, strict=True):
            net.get_submodule(name).register_forward_hook(ear)

    def __call__(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Images -> the outputs, in the order in which the network comes by them."""
        last = self._run(images)
        return [*(ear.take() for ear in self._ears), last]


@torch.no_grad()
def _in_order(net: nn.Module, names: Sequence[str], example: torch.Tensor) -> list[str]:
    """The modules in the order in which they end."""
    ended: list[str] = []
    for name in names:
        check_module(net, name)
    if len(set(names)) < len(names):
        raise BadInput(f"backbone.cut: {SUM.join(names)} names a module twice")
    handles = [
        net.get_submodule(name).register_forward_hook(lambda *_, name=name: ended.append(name)) for name in names
    ]
    try:
        net.forward_features(example)
    finally:
        for handle in handles:
            handle.remove()
    for name in names:
        if name not in ended:
            raise BadInput(f"backbone.cut: the forward pass of {type(net).__name__} does not come by {name}")
    return list(dict.fromkeys(ended))


class JoinedMap(nn.Module):
    """Maps of several layers -> one map of SIDE x SIDE positions, channels after channels.

    Attributes:
        scales: what each layer is multiplied by, float32 (layers,); kept with the weights.

    Args:
        maps: an example of each layer's, (b, channels, rows, columns).
    """

    def __init__(self, maps: Sequence[torch.Tensor]):
        super().__init__()
        self.channels = [found.shape[1] for found in maps]
        self.register_buffer("scales", torch.ones(len(maps)))
        for layer, found in enumerate(maps):
            for axis, side in zip(("rows", "columns"), found.shape[2:], strict=True):
                self.register_buffer(f"{axis}_{layer}", averages(side), persistent=False)

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """(b, channels, rows, columns) of each layer -> (b, all channels, SIDE, SIDE)."""
        # Two matrix products: adaptive pooling has no deterministic gradient on a GPU.
        averaged = [
            getattr(self, f"rows_{layer}") @ found @ getattr(self, f"columns_{layer}").T
            for layer, found in enumerate(maps)
        ]
        return torch.cat([found * scale for found, scale in zip(averaged, self.scales, strict=True)], 1)


def averages(side: int) -> torch.Tensor:
    """Means over SIDE equal parts of `side` positions, float32 (SIDE, side); positions at their edges count in part."""
    edges = torch.arange(SIDE + 1) * side / SIDE
    place = torch.arange(side)
    shared = torch.minimum(edges[1:, None], place + 1) - torch.maximum(edges[:-1, None], place)
    return shared.clamp(min=0) * SIDE / side
