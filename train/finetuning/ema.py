"""A running average of a network's weights."""

import copy

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from train.distributed.engine import Engine
from train.models.network import Network


class RunningAverage:
    """Exponential moving average of the parameters and running statistics of a network (Polyak averaging).

    After step t the decay is min(decay, (1 + t) / (10 + t)), so that the first weights are soon forgotten. Each rank
    averages its part of the network; `gather` puts the parts together.

    Args:
        network: to follow, before a strategy wraps it.
        decay: per optimizer step.

    Attributes:
        network: with the averaged weights as of the last `gather`, to score and to save.
    """

    def __init__(self, network: Network, decay: float):
        self.network = copy.deepcopy(network)
        self.network.requires_grad_(False)
        self._decay = decay

    def follow(self, engine: Engine) -> None:
        """Average the weights of an engine from now on, starting from those that `network` holds."""
        self._engine, self._sources = engine, engine.local_tensors()
        # The objective's constants are float64, and one such tensor would make the whole list slow.
        self._whole = [tensor for tensor in self.network.state_dict().values() if tensor.dtype == torch.float32]
        self._averages = engine.partition(self._whole)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after optimizer step `step`, counted from 1."""
        decay = min(self._decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(self._averages, self._sources, step)

    @torch.no_grad()
    def gather(self) -> None:
        """Bring `network` up to date; every rank must take part."""
        for tensor, average in zip(self._whole, self._engine.gather(self._averages), strict=True):
            if tensor is not average:
                tensor.copy_(average)
