"""A running average of a network's weights."""

import copy

import torch
from torch import nn


class RunningAverage:
    """Exponential moving average of the parameters and running statistics of a network (Polyak averaging).

    After step t the decay is min(decay, (1 + t) / (10 + t)), so that the random beginning is soon forgotten.

    Args:
        network: to follow.
        decay: per optimizer step.

    Attributes:
        network: the averaged one, to score and to save.
    """

    def __init__(self, network: nn.Module, decay: float):
        self._source, self._decay = network, decay
        self.network = copy.deepcopy(network)
        self.network.requires_grad_(False)
        self._averages: list[torch.Tensor] = []
        self._sources: list[torch.Tensor] = []

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step`, counted from 1."""
        if not self._averages:  # not before: a strategy may move the weights when it wraps the network
            averages, sources = self.network.state_dict(), self._source.state_dict()
            # The objective's constants are float64, and one such tensor would make the whole list slow.
            floats = [name for name, tensor in averages.items() if tensor.dtype == torch.float32]
            self._averages, self._sources = ([state[name] for name in floats] for state in (averages, sources))
        torch._foreach_lerp_(self._averages, self._sources, 1 - min(self._decay, (1 + step) / (10 + step)))
