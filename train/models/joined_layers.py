"""Several layers of a network read together, as one map: `backbone.cut: blocks.3+blocks.4`.

A recorded area need not resemble a single layer. The maps of all layers are averaged to one grid and their channels
concatenated; each layer is scaled so that all vary alike (`train/finetuning/setup/layer_balance.py`).
"""

from collections.abc import Sequence

import torch
from torch import nn

from data_prep.common.errors import BadInput
from train.models.timm_networks import TimmNetwork
from train.models.tracing import no_output, record_outputs
from train.models.truncation import check_module, truncate
from train.run.layer_names import JOIN

GRID = 7  # rows and columns of the joined map


class LayerOutputs:
    """The forward pass of a network up to the last of several modules, which returns the outputs of all.

    Args:
        net: a timm network in evaluation mode; what comes after the last module is dropped.
        modules: their names, in any order.
        example: images (b, 3, h, w) of the size that will be used.

    Attributes:
        modules: in the order in which they end.
        forward_pass: normalised images -> the output of the last module.

    Raises:
        BadInput: no such module, one named twice, or one whose output the forward pass does not give.
    """

    def __init__(self, net: TimmNetwork, modules: Sequence[str], example: torch.Tensor):
        self._net = net
        self.modules = _in_order(net, modules, example)
        self.forward_pass = truncate(net, self.modules[-1], example, keep_head=False)

    def __call__(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Normalised images (b, 3, h, w) -> the outputs, in the order of `modules`."""
        with record_outputs(self._net, self.modules[:-1]) as outputs:
            last = self.forward_pass(images)
        return [*(outputs[name] for name in self.modules[:-1]), last]


@torch.no_grad()
def _in_order(net: TimmNetwork, modules: Sequence[str], example: torch.Tensor) -> list[str]:
    """The modules in the order in which they end."""
    for name in modules:
        check_module(net, name)
    if len(set(modules)) < len(modules):
        raise BadInput(f"backbone.cut: {JOIN.join(modules)} names a module twice")
    with record_outputs(net, modules) as outputs:
        net.forward_features(example)
    for name in modules:
        if name not in outputs:
            raise no_output(net, name)
    return list(outputs)


class JoinedMap(nn.Module):
    """Concatenates the maps of several layers, averaged to GRID x GRID positions.

    Attributes:
        channels: of each layer.
        scales: factor of each layer, float32 (layers,); saved with the weights.

    Args:
        maps: an example of each layer's, (b, channels, rows, columns).
    """

    scales: torch.Tensor

    def __init__(self, maps: Sequence[torch.Tensor]):
        super().__init__()
        self.channels = [layer_map.shape[1] for layer_map in maps]
        self.register_buffer("scales", torch.ones(len(maps)))
        for layer, layer_map in enumerate(maps):
            rows, columns = layer_map.shape[2:]
            self.register_buffer(f"rows_{layer}", averages(rows), persistent=False)
            self.register_buffer(f"columns_{layer}", averages(columns), persistent=False)

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Maps (b, channels, rows, columns) of each layer -> (b, all channels, GRID, GRID)."""
        # Two matrix products: adaptive pooling has no deterministic gradient on a GPU.
        averaged = [
            self.get_buffer(f"rows_{layer}") @ layer_map @ self.get_buffer(f"columns_{layer}").T
            for layer, layer_map in enumerate(maps)
        ]
        return torch.cat([layer_map * scale for layer_map, scale in zip(averaged, self.scales, strict=True)], 1)


def averages(side: int) -> torch.Tensor:
    """Means over GRID equal parts of `side` positions, float32 (GRID, side); positions at their edges count in part."""
    edges = torch.arange(GRID + 1) * side / GRID
    position = torch.arange(side)
    overlap = torch.minimum(edges[1:, None], position + 1) - torch.maximum(edges[:-1, None], position)
    return overlap.clamp(min=0) * GRID / side
