"""Layers that are read together (`train/models/joined_layers.py`) are made to vary alike over the stimuli to fit."""

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

    Without it a ridge, or a step of the optimizer, would attend to the layer that happens to have the largest numbers.

    Args:
        backbone: with joined layers, on the runtime's device; its BatchNorm statistics stay as they are.
        stimuli: to fit.
        runtime: this process.
        batch_size: stimuli per forward pass.
        workers: decoding processes.
    """

    def moments(images: torch.Tensor) -> dict[str, torch.Tensor]:
        found = backbone(images).double()
        return {"sum": found.mean((2, 3)), "squares": found.square().mean((2, 3))}

    training = backbone.training
    backbone.eval()
    own = activations_of_share(
        moments, stimuli, runtime, batch_size=batch_size, workers=workers, label="variance of each layer"
    )
    backbone.train(training)
    totals = runtime.sum(torch.stack([own["sum"].sum(0), own["squares"].sum(0)]).to(runtime.device)) / len(stimuli)
    variances = totals[1] - totals[0].square()
    of_layer = torch.stack([part.sum() for part in variances.split(backbone.join.channels)])
    wanted = len(variances) / len(of_layer)
    factors = torch.where(of_layer > 0, (wanted / of_layer).sqrt(), 1.0)
    backbone.join.scales.mul_(factors)
