"""Gives layers that are read together (`train/models/joined_layers.py`) equal variance over the training stimuli."""

import torch

from train.data.stimuli import StimulusSet
from train.distributed.runtime import Runtime
from train.models.backbone import Backbone
from train.regression.activations import activations_of_share


@torch.no_grad()
def balance_layers(
    backbone: Backbone, stimuli: StimulusSet, runtime: Runtime, *, batch_size: int, workers: int
) -> None:
    """Scale each joined layer so that all have the same sum of variances, and features a variance of 1 on average.

    Otherwise a ridge, or a step of the optimizer, would favour the layer that happens to have the largest numbers.

    Args:
        backbone: with joined layers, on the runtime's device; its BatchNorm statistics stay as they are.
        stimuli: that are trained on.
        runtime: this process.
        batch_size: stimuli per forward pass.
        workers: decoding processes.
    """
    join = backbone.join
    assert join is not None

    def moments(images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = backbone(images).double()
        return {"sum": features.mean((2, 3)), "squares": features.square().mean((2, 3))}

    training = backbone.training
    backbone.eval()
    share = activations_of_share(
        moments, stimuli, runtime, batch_size=batch_size, workers=workers, label="variance of each layer"
    )
    backbone.train(training)
    sums = torch.stack([share["sum"].sum(0), share["squares"].sum(0)])
    mean, mean_square = runtime.sum(sums.to(runtime.device)) / len(stimuli)
    variances = mean_square - mean.square()
    layer_variances = torch.stack([layer.sum() for layer in variances.split(join.channels)])
    target = len(variances) / len(layer_variances)
    join.scales.mul_(torch.where(layer_variances > 0, (target / layer_variances).sqrt(), 1.0))
