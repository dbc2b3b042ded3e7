"""Batches, and the sets of stimuli that they are made of."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from data_prep.common.errors import BadInput, RunFailed
from train.data.order import Layout, MicroBatch
from train.data.prefetching import FetchAhead


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
        stimuli: int, stimuli of the whole global batch that this micro-batch is a part of.
        observed: int, responses (stimulus x site) recorded in that global batch.
        groups: the sites of each recording where each has a mean of its own; see `means`.
    """

    images: torch.Tensor
    positions: torch.Tensor
    weight: torch.Tensor
    rates: torch.Tensor | None
    labels: torch.Tensor | None
    draws: torch.Tensor | None
    stimuli: int
    observed: int
    groups: tuple[Group, ...] = ()

    @property
    def means(self) -> tuple[Group, ...]:
        """The sites in the groups that are averaged; the loss of the responses is the mean over these."""
        return self.groups or (Group(self.rates.shape[1], self.observed),)

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


class StimulusSet(Dataset, ABC):
    """Stimuli by position: those of one recording (`train.data.loader.Stimuli`) or of several
    (`train.data.combined_stimuli.Together`).

    Attributes:
        parts: the stimuli of each recording; positions count through one after the other.
        size: side in pixels of the images.
        stimulus_ids: of all of them.
        labels: int64 (stimuli,), or None.
    """

    parts: "Sequence[StimulusSet]"
    size: int
    stimulus_ids: list[str]
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.stimulus_ids)

    def __getitem__(self, work: Work) -> Batch | BadInput | RunFailed:
        try:
            images = self.images(work.micro.positions)
        except (BadInput, RunFailed) as error:
            return error
        return self.batch(images, work)

    def batch(self, images: torch.Tensor, work: Work) -> Batch:
        """Images, uint8 (b, size, size, 3), with what is known of their stimuli."""
        positions = work.micro.positions
        return Batch(
            images=images.permute(0, 3, 1, 2),
            positions=torch.from_numpy(positions),
            weight=torch.from_numpy(work.micro.weight),
            rates=self.rates_of(positions),
            labels=None if self.labels is None else torch.from_numpy(self.labels[positions]),
            draws=None if work.draws is None else torch.from_numpy(work.draws),
            stimuli=work.stimuli,
            observed=work.observed,
            groups=work.groups,
        )

    def work(self, micro: MicroBatch, batch: np.ndarray, draws: np.ndarray | None = None) -> Work:
        """`micro` as a part of the global batch `batch`, with the random numbers `draws` of that batch."""
        groups = self.groups_of(batch)
        observed = sum(group.observed for group in groups)
        own = None if draws is None else draws[micro.places]
        return Work(micro, len(batch), observed, groups if len(groups) > 1 else (), own)

    @abstractmethod
    def images(self, positions: np.ndarray) -> torch.Tensor:
        """The images of these stimuli, uint8 (b, size, size, 3)."""

    @abstractmethod
    def rates_of(self, positions: np.ndarray) -> torch.Tensor | None:
        """The responses to these stimuli, float32 (b, sites); None where there are none."""

    @abstractmethod
    def groups_of(self, batch: np.ndarray) -> tuple[Group, ...]:
        """The sites whose errors are averaged, with what they recorded in a global batch."""

    @abstractmethod
    def layout(self, block_shards: int | None) -> Layout:
        """How the stimuli lie, for an order that mixes some shards at a time; one that shuffles all where None."""

    @abstractmethod
    def shuffle_responses(self, seed: int) -> None:
        """Give each stimulus the responses of another, whole rows at a time: what is left to predict is chance."""

    @abstractmethod
    def shards_to_fetch(self, positions: np.ndarray) -> np.ndarray:
        """The remote shards that these images have to be read from, counted through those of all parts."""

    @contextmanager
    def fetched_ahead(self, schedule: Iterable[Work]) -> Iterator[Callable[[], None]]:
        """Fetch remote shards in the background while the block runs.

        Args:
            schedule: what is going to be read, in order.

        Yields:
            What is to be called when the next part of it has been read.
        """
        splits = [part.split for part in self.parts]
        if not any(split.is_remote for split in splits):
            yield lambda: None
            return
        with FetchAhead(splits, [self.shards_to_fetch(work.micro.positions) for work in schedule]) as ahead:
            yield ahead.passed
