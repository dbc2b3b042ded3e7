"""A micro-batch as the loader delivers it, and a worker's request for one."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from train.data.order import MicroBatch


class SiteGroup(NamedTuple):
    """Neighbouring sites whose errors are averaged, and the number of their recorded responses to a global batch."""

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
        global_stimuli: number of stimuli in the whole global batch that this micro-batch is a part of.
        global_observed: number of responses (stimulus x site) recorded in that global batch.
        groups: the sites of each recording if each has its own mean; see `means`.
    """

    images: torch.Tensor
    positions: torch.Tensor
    weight: torch.Tensor
    rates: torch.Tensor | None
    labels: torch.Tensor | None
    draws: torch.Tensor | None
    global_stimuli: int
    global_observed: int
    groups: tuple[SiteGroup, ...] = ()

    @property
    def means(self) -> tuple[SiteGroup, ...]:
        """The groups of sites that are averaged; the loss of the responses is the mean over these.

        The split must have responses.
        """
        assert self.rates is not None
        return self.groups or (SiteGroup(self.rates.shape[1], self.global_observed),)

    def _map_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        changed: dict[str, Any] = {name: change(x) for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
        return replace(self, **changed)

    def with_copied_facts(self) -> "Batch":
        """The same images with copies of the other tensors.

        Each tensor from a decoding process takes an open file while anything refers to it, and a run refers to
        positions and responses for many steps.
        """
        return self._map_tensors(lambda tensor: tensor if tensor is self.images else tensor.clone())

    def pin_memory(self) -> "Batch":
        """Page-locked copies, which can be copied to a GPU without blocking."""
        return self._map_tensors(torch.Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`; from pinned memory the copy overlaps with the computation."""
        if self.images.device == device:
            return self
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(frozen=True)
class BatchRequest:
    """A micro-batch to read, with facts about its global batch.

    Attributes:
        micro_batch: the stimuli.
        stimuli: number of stimuli in the global batch.
        observed: number of responses recorded in it.
        groups: as of `Batch`.
        draws: of this micro-batch, as of `Batch`.
    """

    micro_batch: MicroBatch
    stimuli: int
    observed: int
    groups: tuple[SiteGroup, ...] = ()
    draws: np.ndarray | None = None
