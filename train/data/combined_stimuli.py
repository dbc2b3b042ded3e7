"""The stimuli of several recordings as one set: what a step mixes, and how, says the recipe's `mix`.

A network for several recordings has one readout, whose outputs are the sites of one recording after the other. Each
stimulus tells what the sites of its own recording did, and NaN of the others, which no loss sees. So there is nothing
in training that knows of recordings: a rank whose share of a step shows none of one recording has a gradient of 0 for
that one's part of the readout, and takes part in every reduction.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch

from train.data.batch_buffers import BatchBuffers
from train.data.batches import Group
from train.data.order import Blocks, Layout, Turns
from train.data.stimuli import RecordingStimuli, StimulusSet

Mix = Literal["proportional", "equal"]


class CombinedStimuli(StimulusSet):
    """The stimuli of several recordings.

    Args:
        parts: of each recording, with the columns of its sites.
        mix: `proportional`: all stimuli in one order, and all recorded responses in one mean. `equal`: the recordings
            take turns, and each has a mean of its own.
    """

    def __init__(self, parts: Sequence[RecordingStimuli], mix: Mix):
        self.recordings, self.size, self._mix = tuple(parts), parts[0].size, mix
        self.stimulus_ids = [f"{part.name}/{name}" for part in parts for name in part.stimulus_ids]
        self.labels = None if parts[0].labels is None else np.concatenate([part.labels for part in parts])
        self._first = np.cumsum([0, *map(len, parts)])
        self._memory = BatchBuffers()

    def _of_parts(self, positions: np.ndarray) -> Iterator[tuple[RecordingStimuli, np.ndarray, np.ndarray]]:
        """The recordings that have some of these stimuli; which of these it has; their positions in it."""
        number = np.searchsorted(self._first, positions, side="right") - 1
        for k in np.unique(number):
            rows = np.flatnonzero(number == k)
            yield self.recordings[k], rows, positions[rows] - self._first[k]

    def images(self, positions: np.ndarray) -> torch.Tensor:
        """See `StimulusSet.images`."""
        images = self._memory.take((len(positions), self.size, self.size, 3))
        for part, rows, own in self._of_parts(positions):
            if len(rows) == len(positions):
                return part.images(own)
            images.numpy()[rows] = part.images(own).numpy()
        return images

    def rates_of(self, positions: np.ndarray) -> torch.Tensor | None:
        """See `StimulusSet.rates_of`; NaN for the sites of other recordings."""
        if self.recordings[0].rates is None:
            return None
        rates = np.full((len(positions), sum(self._sites)), np.nan, np.float32)
        for part, rows, own in self._of_parts(positions):
            rates[rows, part.columns] = part.rates[own]
        return torch.from_numpy(rates)

    @property
    def _sites(self) -> list[int]:
        return [part.rates.shape[1] for part in self.recordings]

    def groups_of(self, batch: np.ndarray) -> tuple[Group, ...]:
        """See `StimulusSet.groups_of`: each recording's sites, or all sites as one group."""
        if self.recordings[0].rates is None:
            return ()
        observed = {part: int(part.observed[own].sum()) for part, _, own in self._of_parts(batch)}
        groups = tuple(
            Group(sites, observed.get(part, 0)) for part, sites in zip(self.recordings, self._sites, strict=True)
        )
        return groups if self._mix == "equal" else (Group(*map(sum, zip(*groups, strict=True))),)

    def layout(self, block_shards: int | None) -> Layout:
        """See `StimulusSet.layout`. Recordings that take turns have an equal part of the shards each."""
        if self._mix == "equal":
            own = None if block_shards is None else max(block_shards // len(self.recordings), 1)
            return Turns(tuple(map(len, self.recordings)), tuple(part.layout(own) for part in self.recordings))
        if block_shards is None:
            return None
        return Blocks(tuple(size for part in self.recordings for size in part.blocks(block_shards).sizes), block_shards)

    def shuffle_responses(self, seed: int) -> None:
        """See `StimulusSet.shuffle_responses`; each recording's among its own stimuli."""
        for part in self.recordings:
            part.shuffle_responses(seed)

    def shards_to_fetch(self, positions: np.ndarray) -> np.ndarray:
        """See `StimulusSet.shards_to_fetch`."""
        first = dict(
            zip(self.recordings, np.cumsum([0, *(len(part.split.shards) for part in self.recordings)]), strict=False)
        )
        found = [first[part] + part.shards_to_fetch(own) for part, _, own in self._of_parts(positions)]
        return np.concatenate(found)


def combine_recordings(parts: Sequence[RecordingStimuli], mix: Mix) -> StimulusSet:
    """The stimuli of one recording or of several."""
    return parts[0] if len(parts) == 1 else CombinedStimuli(parts, mix)
