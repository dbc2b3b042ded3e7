"""The network of a run: a backbone, a readout to the sites and/or one to the classes, and its objective."""

import torch
from torch import nn

from data_prep.common.errors import BadInput
from data_prep.shards.manifest import Manifest
from train.data.order import stream_seed
from train.models.backbone import Backbone
from train.models.losses import Objective
from train.models.readouts import build_readout
from train.run.recipe import Recipe

BACKBONE, RATES, CLASSES = range(3)  # streams of random numbers for the initial weights


class Network(nn.Module):
    """Backbone, readouts and objective.

    The initial weights depend on the seed alone, part by part: a hybrid begins with the readouts that a regression and
    a classification begin with.

    Args:
        recipe: names the backbone, the readout and the task.
        manifest: gives the number of sites and classes, and each site's mean and standard deviation.
        image_size: side in pixels of the images.
    """

    def __init__(self, recipe: Recipe, manifest: Manifest, image_size: int):
        super().__init__()
        regresses, classifies = recipe.task.predicts_responses, recipe.task.predicts_classes
        self._autocast = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[recipe.precision]
        self._reads_map = regresses and recipe.readout.kind != "linear"
        self._reads_pooled = classifies or not self._reads_map
        torch.manual_seed(stream_seed(recipe.seed, BACKBONE))
        self.backbone = Backbone(recipe.backbone, image_size, pools=self._reads_pooled, maps=self._reads_map)
        self.heads = nn.ModuleDict()
        if regresses:
            torch.manual_seed(stream_seed(recipe.seed, RATES))
            shapes = (self.backbone.features, self.backbone.map_shape)
            self.heads["rates"] = build_readout(recipe.readout, *shapes, len(manifest.sites))
        if classifies:
            torch.manual_seed(stream_seed(recipe.seed, CLASSES))
            self.heads["classes"] = nn.Linear(self.backbone.features, len(manifest.classes or []))
        self.objective = Objective(recipe, manifest)
        if regresses and self.objective.responses.ignores_offsets:
            self.heads["rates"].sites.bias.requires_grad_(False)  # its gradient would be rounding errors
        _train_what_the_recipe_says(self.backbone, recipe, image_size)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images (b, 3, size, size), 0..255 -> "rates" (b, sites) and/or "classes", logits (b, classes).

        What "rates" mean, the objective knows (`ResponseLoss.in_units`). Training runs under the recipe's precision,
        evaluation in float32. The autocast is here and not around the call: DeepSpeed switches an outer one off.
        """
        lower = self._autocast is not None and self.training
        with torch.autocast(images.device.type, self._autocast, enabled=lower):
            read = self.read(images)
            return {name: head(read[name]).float() for name, head in self.heads.items()}

    def read(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """The features that each head gets: a map (b, channels, rows, columns) or pooled ones (b, features)."""
        output = self.backbone(images)
        pooled = self.backbone.pool(output) if self._reads_pooled else None
        return {
            name: self.backbone.map(output) if name == "rates" and self._reads_map else pooled for name in self.heads
        }


def _train_what_the_recipe_says(backbone: Backbone, recipe: Recipe, image_size: int) -> None:
    if recipe.backbone.trainable == "head":
        backbone.freeze()
    if recipe.backbone.batch_norm != "live" and not backbone.has_batch_norm:
        raise BadInput(f"backbone.batch_norm: {recipe.backbone.name} has no BatchNorm; leave it at live")
    if recipe.backbone.batch_norm == "frozen":
        backbone.freeze_batch_norm()
    if recipe.backbone.gradient_checkpointing:
        backbone.checkpoint_gradients(image_size)


def parameter_groups(network: Network, recipe: Recipe) -> list[dict]:
    """Trainable parameters for an optimizer, each group with its peak learning rate.

    Weight decay spares norms and biases (vectors and scalars) and what a readout names `undecayed`.
    """
    settings = recipe.optimizer
    spared = {id(getattr(module, name)) for module in network.modules() for name in getattr(module, "undecayed", ())}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and id(parameter) not in spared
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
