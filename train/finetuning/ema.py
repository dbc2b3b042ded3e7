"""A running average of a network's weights."""

import copy

import torch
from torch import nn

from train.distributed.engine import Engine


class RunningAverage:
    """Exponential moving average of the parameters and running statistics of a network (Polyak averaging).

    After step t the decay is min(decay, (1 + t) / (10 + t)), so that the random beginning is soon forgotten. Each rank
    averages what it holds of the network; `gather` makes a whole network of it.

    Args:
        network: to follow, before a strategy wraps it.
        decay: per optimizer step.

    Attributes:
        network: the averaged one, to score and to save, as of the last `gather`.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.network = copy.deepcopy(network)
        self.network.requires_grad_(False)
        self._decay = decay

    def follow(self, engine: Engine) -> None:
        """Follow the weights of an engine, beginning with what `network` holds."""
        self._engine, self._sources = engine, engine.local_tensors()
        # The objective's constants are float64, and one such tensor would make the whole list slow.
        self._whole = [tensor for tensor in self.network.state_dict().values() if tensor.dtype == torch.float32]
        self._averages = engine.partition(self._whole)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step`, counted from 1."""
        torch._foreach_lerp_(self._averages, self._sources, 1 - min(self._decay, (1 + step) / (10 + step)))

    @torch.no_grad()
    def gather(self) -> None:
        """Bring `network` up to date where ranks hold parts of it; every rank must take part."""
        for own, whole in zip(self._whole, self._engine.gather(self._averages), strict=True):
            if own is not whole:
                own.copy_(whole)
