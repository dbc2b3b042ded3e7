"""Readouts: from features to the sites, or to the classes."""

from torch import nn


def parameter_count(module: nn.Module, trainable_only: bool = False) -> int:
    """Number of parameters, or of those that are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable_only)


def zero_readout(features: int, outputs: int) -> nn.Linear:
    """One linear unit per site on the pooled features, in place of the network's own last layer.

    It predicts every site's mean (z-score 0) until it has learned better.
    """
    readout = nn.Linear(features, outputs)
    nn.init.zeros_(readout.weight)
    nn.init.zeros_(readout.bias)
    return readout
