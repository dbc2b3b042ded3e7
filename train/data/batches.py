"""Batches, and the sets of stimuli that they are made of."""

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch

from train.data.order import MicroBatch


class Group(NamedTuple):
    """Neighbouring sites whose errors are averaged, and how many responses to a global batch they have."""

    sites: int
    observed: int


@dataclass
class Batch:
    """One micro-batch of one rank.

    Attributes:
        images: uint8 (b, 3, size, size) in channels-last memory.
        positions: int64 (b,), of the stimuli in their split.
        weight: float32 (b,), 0 for padding, else 1.
        rates: float32 (b, sites), in the recording's units, NaN = not recorded; None where the split has no responses.
        labels: int64 (b,); None where there are no classes.
        draws: float32 (b, kinds), random numbers in [-1, 1) for `augment.py`; None where nothing is augmented.
        global_stimuli: int, stimuli of the whole global batch that this micro-batch is a part of.
        global_observed: int, responses (stimulus x site) recorded in that global batch.
        groups: the sites of each recording where each has a mean of its own; see `means`.
    """

    images: torch.Tensor
    positions: torch.Tensor
    weight: torch.Tensor
    rates: torch.Tensor | None
    labels: torch.Tensor | None
    draws: torch.Tensor | None
    global_stimuli: int
    global_observed: int
    groups: tuple[Group, ...] = ()

    @property
    def means(self) -> tuple[Group, ...]:
        """The sites in the groups that are averaged; the loss of the responses is the mean over these."""
        return self.groups or (Group(self.rates.shape[1], self.global_observed),)

    def _each_tensor(self, change) -> "Batch":
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(x) for name, x in tensors.items() if isinstance(x, torch.Tensor)})

    def pin_memory(self) -> "Batch":
        """Page-locked copies, for copies to a GPU that do not block."""
        return self._each_tensor(torch.Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`; from pinned memory the copy runs beside the computation."""
        return self._each_tensor(lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(frozen=True)
class Work:
    """A micro-batch and what it has to know of the global batch it belongs to."""

    micro: MicroBatch
    stimuli: int
    observed: int
    groups: tuple[Group, ...] = ()
    draws: np.ndarray | None = None
