"""Readouts: from features to the sites, or to the classes."""

import torch
from torch import nn


class LinearReadout(nn.Linear):
    """One linear unit per output on the pooled features; it replaces the network's own last layer."""


def parameter_count(module: nn.Module, trainable_only: bool = False) -> int:
    """Number of parameters, or of those that are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable_only)


def zero_readout(features: int, outputs: int) -> LinearReadout:
    """A readout that predicts every site's mean (z-score 0) until it has learned better."""
    readout = LinearReadout(features, outputs)
    torch.nn.init.zeros_(readout.weight)
    torch.nn.init.zeros_(readout.bias)
    return readout
