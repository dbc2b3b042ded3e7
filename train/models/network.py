"""The network of a run: a backbone, a readout to the sites and/or one to the classes, and its objective."""

from typing import Any

import torch
from torch import nn

from data_prep.common.errors import BadInput
from data_prep.shards.manifest import Manifest
from train.data.order import stream_seed
from train.models.backbone import Backbone
from train.models.losses import Objective
from train.models.readouts import SiteReadout, build_readout
from train.run.recipe import Recipe

BACKBONE, RATES, CLASSES = range(3)  # streams of random numbers for the initial weights
AUTOCAST_TYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Network(nn.Module):
    """Backbone, readouts and objective.

    The initial weights of each depend on the seed alone: a hybrid starts with the readouts that a regression and a
    classification start with.

    Args:
        recipe: names the backbone, the readout and the task.
        manifest: gives the number of sites and classes, and each site's mean and standard deviation.
        image_size: side in pixels of the images.

    Attributes:
        backbone: from images to features.
        heads: "rates", the readout to the sites, and/or "classes", the one to the classes.
        objective: the loss, and the meaning of "rates".
    """

    def __init__(self, recipe: Recipe, manifest: Manifest, image_size: int):
        super().__init__()
        regresses, classifies = recipe.task.predicts_responses, recipe.task.predicts_classes
        self._autocast_type = AUTOCAST_TYPES[recipe.precision]
        self._reads_map = regresses and recipe.readout.kind != "linear"
        self._reads_pooled = classifies or not self._reads_map
        torch.manual_seed(stream_seed(recipe.seed, BACKBONE))
        self.backbone = Backbone(recipe.backbone, image_size, pools=self._reads_pooled, maps=self._reads_map)
        self.heads = nn.ModuleDict()
        if regresses:
            torch.manual_seed(stream_seed(recipe.seed, RATES))
            self.heads["rates"] = build_readout(
                recipe.readout, self.backbone.features, self.backbone.map_shape, len(manifest.sites)
            )
        if classifies:
            assert self.backbone.features is not None
            torch.manual_seed(stream_seed(recipe.seed, CLASSES))
            self.heads["classes"] = nn.Linear(self.backbone.features, len(manifest.classes or []))
        self.objective = Objective(recipe, manifest)
        if self.objective.responses is not None and self.objective.responses.needs_calibration:
            self.site_readout.sites.bias.requires_grad_(False)  # its gradient would be rounding errors
        _freeze(self.backbone, recipe, image_size)

    @property
    def site_readout(self) -> SiteReadout:
        """The readout to the sites, `heads["rates"]`."""
        readout = self.heads["rates"]
        assert isinstance(readout, SiteReadout)
        return readout

    @property
    def class_readout(self) -> nn.Linear:
        """The readout to the classes, `heads["classes"]`."""
        readout = self.heads["classes"]
        assert isinstance(readout, nn.Linear)
        return readout

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images (b, 3, size, size), 0..255 -> "rates" (b, sites) and/or "classes", logits (b, classes).

        `ResponseLoss.to_rates` turns "rates" into responses. Training runs under the recipe's precision, evaluation in
        float32. The autocast is here and not around the call: DeepSpeed switches an outer one off.
        """
        lower_precision = self._autocast_type is not None and self.training
        with torch.autocast(images.device.type, self._autocast_type, enabled=lower_precision):
            features = self.read(images)
            return {name: head(features[name]).float() for name, head in self.heads.items()}

    def read(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """The features that each head gets: a map (b, channels, rows, columns) or pooled ones (b, features)."""
        output = self.backbone(images)
        features: dict[str, torch.Tensor] = {}
        if self._reads_pooled:
            features = dict.fromkeys(self.heads, self.backbone.pool(output))
        if self._reads_map:
            features["rates"] = self.backbone.map(output)
        return features


def _freeze(backbone: Backbone, recipe: Recipe, image_size: int) -> None:
    """Freeze what the recipe does not train, and set up gradient checkpointing."""
    if recipe.backbone.trainable == "head":
        backbone.freeze()
    if recipe.backbone.batch_norm != "live" and not backbone.has_batch_norm:
        raise BadInput(f"backbone.batch_norm: {recipe.backbone.name} has no BatchNorm; leave it at live")
    if recipe.backbone.batch_norm == "frozen":
        backbone.freeze_batch_norm()
    if recipe.backbone.gradient_checkpointing:
        backbone.checkpoint_gradients(image_size)


def parameter_groups(network: Network, recipe: Recipe) -> list[dict[str, Any]]:
    """Trainable parameters for an optimizer, each group with its peak learning rate.

    Weight decay spares norms and biases (vectors and scalars) and what a readout names `undecayed`.
    """
    settings = recipe.optimizer
    undecayed = {
        id(getattr(module, name))
        for module in network.modules()
        if isinstance(module, SiteReadout)
        for name in module.undecayed
    }
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and id(parameter) not in undecayed
            groups.setdefault((name.startswith("backbone."), decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": settings.weight_decay if decays else 0.0,
            "peak_lr": settings.lr * (settings.backbone_lr_factor if in_backbone else 1.0),
            "part": "backbone" if in_backbone else "readout",
        }
        for (in_backbone, decays), parameters in groups.items()
    ]


def parameter_count(module: nn.Module, trainable_only: bool = False) -> int:
    """Number of parameters, or of those that are trained."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad or not trainable_only)
