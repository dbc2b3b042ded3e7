"""A probe as a network: a frozen backbone, or the pixels, and a linear map of its features to the sites."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from data_prep.common.errors import BadInput
from train.models.backbone import Backbone
from train.models.features import PIXELS, ImageFeatures, LayerFeatures, PixelFeatures
from train.models.saved_probe import SavedProbe, read_saved_probe
from train.run.recipe import ProbeRecipe


class ProbeNetwork(nn.Module):
    """Images, uint8 (b, 3, size, size) -> "rates", float32 (b, sites), in the recording's units.

    Args:
        facts: of the probe.
        features: from images to the features of its modules.
        tensors: see `train/models/saved_probe.py`.
    """

    bias: torch.Tensor
    curve: torch.Tensor | None

    def __init__(self, facts: SavedProbe, features: ImageFeatures, tensors: Mapping[str, torch.Tensor]):
        super().__init__()
        self.modules_read = list(facts.modules)
        self.features = features
        self.backbone = features.backbone if isinstance(features, LayerFeatures) else None
        self.register_buffer("curve", None)
        for name, tensor in tensors.items():
            self.register_buffer(name.replace(".", "_"), tensor)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Predict, as described for the class."""
        features = self.features(images)
        rates = self.bias.expand(images.shape[0], -1)
        for number, module in enumerate(self.modules_read):
            centred = features[module] - self.get_buffer(f"centre_{number}")
            rates = rates + (centred @ self.get_buffer(f"weight_{number}").T)
        if self.curve is not None:
            low, high, constant, slope, bend = self.curve
            within = torch.clamp(rates, low, high)
            rates = rates + (constant + within * (slope + within * bend))
        return {"rates": rates.float()}


def network_digest(backbone: Backbone | None) -> str | None:
    """sha256 of a network's weights, by which a probe knows the network that it was fitted on."""
    if backbone is None:
        return None
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.net.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def load_probe_network(folder: Path, recipe: ProbeRecipe) -> tuple[ProbeNetwork, SavedProbe]:
    """The network of a probe, in evaluation mode.

    Args:
        folder: of the probe.
        recipe: of the probe.

    Raises:
        BadInput: the probe has no saved weights, they are damaged, or its network is not the one that it was fitted on.
    """
    facts, tensors = read_saved_probe(folder)
    features: ImageFeatures = PixelFeatures()
    if facts.modules != [PIXELS]:
        torch.default_generator.manual_seed(recipe.seed)  # of random weights
        backbone = Backbone(recipe.backbone, facts.image_size).eval()
        if network_digest(backbone) != facts.network:
            raise BadInput(
                f"{folder}: the weights of {recipe.backbone.name} ({recipe.backbone.weights}) are not those that were "
                "probed: they have changed since, or another version of timm or torch makes others; probe again"
            )
        features = LayerFeatures(backbone, list(dict.fromkeys(facts.modules)), recipe.pool)
    network = ProbeNetwork(facts, features, tensors).eval()
    example = torch.zeros(1, 3, facts.image_size, facts.image_size, dtype=torch.uint8)
    with torch.no_grad():
        widths = {module: rows.shape[1] for module, rows in features(example).items()}
    for number, module in enumerate(facts.modules):
        width = network.get_buffer(f"centre_{number}").shape[0]
        if widths.get(module) != width:
            raise BadInput(
                f"{folder}: {module} has {widths.get(module, 0):,} features, the probe weighs {width:,}; probe again"
            )
    return network, facts
