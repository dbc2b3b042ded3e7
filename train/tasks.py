"""What a network predicts and what it is told it got wrong: backbone, readouts, loss.

`Network` maps uint8 pictures to outputs; a task's `losses(outputs, batch)` gives scalars of which the first is to be
minimised. Losses are normalised by counts of the whole global batch, which every rank knows: the sum over ranks and
micro-batches is the loss of the global batch, and so is the gradient.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data_prep.manifest import Manifest, from_json_list
from train.backbones import Backbone, freeze
from train.loader import Batch
from train.readouts import zero_readout
from train.recipe import Recipe, Task


class Network(nn.Module):
    """Backbone and readouts.

    Args:
        recipe: names the backbone and the task.
        manifest: gives the number of sites and classes, and each site's mean and standard deviation.
        image_size: side in pixels of the pictures.
    """

    def __init__(self, recipe: Recipe, manifest: Manifest, image_size: int):
        super().__init__()
        self.backbone = Backbone(recipe.backbone.name, recipe.backbone.weights, image_size)
        self._bf16 = recipe.precision == "bf16"
        heads = {}
        if recipe.task.predicts_responses:
            heads["rates"] = zero_readout(self.backbone.features, len(manifest.sites))
        if recipe.task.predicts_classes:
            heads["classes"] = nn.Linear(self.backbone.features, len(manifest.classes or []))
        self.heads = nn.ModuleDict(heads)
        for name, values in zip(("rate_mean", "rate_std"), rate_scale(manifest), strict=True):
            self.register_buffer(name, torch.from_numpy(values))  # saved: the weights mean nothing without them
        if recipe.backbone.trainable == "head":
            freeze(self.backbone)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """uint8 pictures (b, 3, size, size) -> "rates", z-scored (b, sites), and/or "classes", logits (b, classes).

        Training runs under the recipe's precision, evaluation in float32. The autocast is here and not around the
        call, because DeepSpeed switches an outer one off.
        """
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self._bf16 and self.training):
            features = self.backbone(images)
            return {name: head(features).float() for name, head in self.heads.items()}

    def z_score(self, rates: torch.Tensor) -> torch.Tensor:
        """Rates (b, sites) in the recording's units -> float32 in each site's standard deviations from its mean."""
        return ((rates - self.rate_mean) / self.rate_std).float()

    def in_units(self, z_scored: torch.Tensor) -> torch.Tensor:
        """The inverse of `z_score`: float32 (b, sites) in the recording's units."""
        return (z_scored * self.rate_std + self.rate_mean).float()


def rate_scale(manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
    """Per-site mean and standard deviation over the train split, float64 (sites,).

    (0, 1) for a site that train never recorded; standard deviation 1 for one that was constant there.
    """
    mean, std = from_json_list(manifest.rates.mean), from_json_list(manifest.rates.std)
    return np.nan_to_num(mean, nan=0.0), np.where(std > 0, std, 1.0)


def squared_error(prediction: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, observed: int) -> torch.Tensor:
    """This micro-batch's part of the mean squared error over all recorded responses of the global batch.

    Args:
        prediction, target: (b, sites); NaN targets contribute nothing.
        weight: (b,), 0 for padding.
        observed: recorded responses in the global batch.
    """
    there = ~torch.isnan(target)
    error = torch.where(there, prediction - torch.where(there, target, 0), 0)
    return (error**2 * weight[:, None]).sum() / max(observed, 1)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, stimuli: int) -> torch.Tensor:
    """This micro-batch's part of the mean cross-entropy over the stimuli of the global batch."""
    return (F.cross_entropy(logits, labels, reduction="none") * weight).sum() / stimuli


def losses(task: Task, network: Network, outputs: Mapping[str, torch.Tensor], batch: Batch) -> dict[str, torch.Tensor]:
    """Scalars: "loss", which is minimised, and in a hybrid the parts it is the weighted sum of.

    All are this micro-batch's part of the global batch's mean; see the top of this file.
    """
    parts = {}
    if task.predicts_responses:
        parts["mse"] = squared_error(outputs["rates"], network.z_score(batch.rates), batch.weight, batch.observed)
    if task.predicts_classes:
        parts["cross_entropy"] = cross_entropy(outputs["classes"], batch.labels, batch.weight, batch.stimuli)
    if task.kind != "hybrid":
        return {"loss": next(iter(parts.values()))}
    total = task.regression_weight * parts["mse"] + task.classification_weight * parts["cross_entropy"]
    return {"loss": total, **parts}


def parameter_groups(network: Network, weight_decay: float) -> list[dict]:
    """Trainable parameters for an optimizer, without weight decay on norms and biases (vectors and scalars)."""
    trainable = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
