"""The stimuli of several recordings as one set; the recipe's `mix` says how a step mixes them.

A network for several recordings has one readout, whose outputs are the sites of one recording after the other. Each
stimulus has the responses of its own recording's sites, and NaN for the others, which the loss ignores. So training
itself knows nothing of recordings: a rank whose share of a step holds no stimulus of a recording has a gradient of 0
for that part of the readout, and still takes part in every reduction.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch

from train.data.batch_buffers import BatchBuffers
from train.data.batches import SiteGroup
from train.data.order import Blocks, Layout, Turns
from train.data.stimuli import RecordingStimuli, StimulusSet

Mix = Literal["proportional", "equal"]


class _Selected(NamedTuple):
    """The requested stimuli that belong to one recording."""

    recording: RecordingStimuli
    rows: np.ndarray  # among those requested
    positions: np.ndarray  # within the recording


class CombinedStimuli(StimulusSet):
    """The stimuli of several recordings.

    Args:
        recordings: the stimuli of each, with the columns of its sites.
        mix: `proportional`: all stimuli in one order, and all recorded responses in one mean. `equal`: the recordings
            take turns, and each has a mean of its own.
    """

    def __init__(self, recordings: Sequence[RecordingStimuli], mix: Mix):
        self._recordings, self.size, self._mix = tuple(recordings), recordings[0].size, mix
        self.stimulus_ids = [f"{recording.name}/{name}" for recording in recordings for name in recording.stimulus_ids]
        labels = [recording.labels for recording in recordings if recording.labels is not None]
        self.labels = np.concatenate(labels) if labels else None
        self._first = np.cumsum([0, *map(len, recordings)])  # position of each recording's first stimulus
        self._buffers = BatchBuffers()

    @property
    def recordings(self) -> tuple[RecordingStimuli, ...]:
        """See `StimulusSet.recordings`."""
        return self._recordings

    def _by_recording(self, positions: np.ndarray) -> Iterator[_Selected]:
        number = np.searchsorted(self._first, positions, side="right") - 1
        for k in np.unique(number):
            rows = np.flatnonzero(number == k)
            yield _Selected(self._recordings[k], rows, positions[rows] - self._first[k])

    def images(self, positions: np.ndarray) -> torch.Tensor:
        """See `StimulusSet.images`."""
        images = self._buffers.allocate((len(positions), self.size, self.size, 3))
        for recording, rows, within in self._by_recording(positions):
            if len(rows) == len(positions):
                return recording.images(within)
            images.numpy()[rows] = recording.images(within).numpy()
        return images

    def rates_of(self, positions: np.ndarray) -> torch.Tensor | None:
        """See `StimulusSet.rates_of`; NaN for the sites of other recordings."""
        if self._recordings[0].rates is None:
            return None
        rates = np.full((len(positions), sum(map(_sites, self._recordings))), np.nan, np.float32)
        for recording, rows, within in self._by_recording(positions):
            assert recording.rates is not None
            rates[rows, recording.columns] = recording.rates[within]
        return torch.from_numpy(rates)

    def groups_of(self, batch: np.ndarray) -> tuple[SiteGroup, ...]:
        """See `StimulusSet.groups_of`: each recording's sites, or all sites as one group."""
        if self._recordings[0].rates is None:
            return ()
        observed = dict.fromkeys(self._recordings, 0)
        for recording, _, within in self._by_recording(batch):
            assert recording.observed is not None
            observed[recording] = int(recording.observed[within].sum())
        if self._mix == "equal":
            return tuple(SiteGroup(_sites(recording), count) for recording, count in observed.items())
        return (SiteGroup(sum(map(_sites, self._recordings)), sum(observed.values())),)

    def layout(self, block_shards: int | None) -> Layout:
        """See `StimulusSet.layout`. Recordings that take turns get equal parts of the shards."""
        if self._mix == "equal":
            share = None if block_shards is None else max(block_shards // len(self._recordings), 1)
            blocks = tuple(recording.layout(share) for recording in self._recordings)
            return Turns(tuple(map(len, self._recordings)), blocks)
        if block_shards is None:
            return None
        sizes = (size for recording in self._recordings for size in recording.blocks(block_shards).sizes)
        return Blocks(tuple(sizes), block_shards)

    def shuffle_responses(self, seed: int) -> None:
        """See `StimulusSet.shuffle_responses`; within each recording."""
        for recording in self._recordings:
            recording.shuffle_responses(seed)

    def shards_to_fetch(self, positions: np.ndarray) -> np.ndarray:
        """See `StimulusSet.shards_to_fetch`."""
        shards_before = np.cumsum([0, *(len(recording.split.shards) for recording in self._recordings)])
        first_shard = dict(zip(self._recordings, shards_before, strict=False))
        return np.concatenate(
            [
                first_shard[recording] + recording.shards_to_fetch(within)
                for recording, _, within in self._by_recording(positions)
            ]
        )


def _sites(recording: RecordingStimuli) -> int:
    assert recording.rates is not None
    return recording.rates.shape[1]


def combine_recordings(recordings: Sequence[RecordingStimuli], mix: Mix) -> StimulusSet:
    """The stimuli of one recording or of several."""
    return recordings[0] if len(recordings) == 1 else CombinedStimuli(recordings, mix)
