"""Stimuli by position, and those of one recording: responses and labels in memory, images decoded on demand."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import Dataset

from data_prep.ceiling import TrialStatistics
from data_prep.common.errors import BadInput, RunFailed
from data_prep.shards.folder import ShardSplit
from train.data.batch_buffers import BatchBuffers
from train.data.batches import Batch, BatchRequest, SiteGroup
from train.data.decoding import decode_at
from train.data.image_cache import ImageCaches
from train.data.order import Blocks, Layout, MicroBatch
from train.data.prefetching import ShardPrefetcher
from train.data.shared_arrays import SharedArray


class StimulusSet(Dataset, ABC):
    """The stimuli of one recording, or of several (`train.data.combined_stimuli.CombinedStimuli`), by position.

    Attributes:
        size: side in pixels of the images.
        stimulus_ids: of all stimuli.
        labels: int64 (stimuli,), or None.
    """

    size: int
    stimulus_ids: list[str]
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.stimulus_ids)

    def __getitem__(self, request: BatchRequest) -> Batch | BadInput | RunFailed:
        try:
            images = self.images(request.micro_batch.positions)
        except (BadInput, RunFailed) as error:
            return error
        return self.batch(images, request)

    def batch(self, images: torch.Tensor, request: BatchRequest) -> Batch:
        """Images, uint8 (b, size, size, 3), with responses and labels of their stimuli."""
        positions = request.micro_batch.positions
        return Batch(
            images=images.permute(0, 3, 1, 2),
            positions=torch.from_numpy(positions),
            weight=torch.from_numpy(request.micro_batch.weight),
            rates=self.rates_of(positions),
            labels=None if self.labels is None else torch.from_numpy(self.labels[positions]),
            draws=None if request.draws is None else torch.from_numpy(request.draws),
            global_stimuli=request.stimuli,
            global_observed=request.observed,
            groups=request.groups,
        )

    def request(self, micro_batch: MicroBatch, batch: np.ndarray, draws: np.ndarray | None = None) -> BatchRequest:
        """The request for a part of a global batch.

        Args:
            micro_batch: the part.
            batch: positions of the global batch.
            draws: random numbers of the global batch.
        """
        groups = self.groups_of(batch)
        return BatchRequest(
            micro_batch,
            stimuli=len(batch),
            observed=sum(group.observed for group in groups),
            groups=groups if len(groups) > 1 else (),
            draws=None if draws is None else draws[micro_batch.batch_indices],
        )

    @property
    @abstractmethod
    def recordings(self) -> "tuple[RecordingStimuli, ...]":
        """The stimuli of each recording; positions count through one after the other."""

    @abstractmethod
    def images(self, positions: np.ndarray) -> torch.Tensor:
        """The images of these stimuli, uint8 (b, size, size, 3)."""

    @abstractmethod
    def rates_of(self, positions: np.ndarray) -> torch.Tensor | None:
        """The responses to these stimuli, float32 (b, sites); None where there are none."""

    @abstractmethod
    def groups_of(self, batch: np.ndarray) -> tuple[SiteGroup, ...]:
        """The sites whose errors are averaged, with the number of responses recorded in a global batch."""

    @abstractmethod
    def layout(self, block_shards: int | None) -> Layout:
        """How the stimuli are stored, for an order that mixes `block_shards` shards at a time (None: all stimuli)."""

    @abstractmethod
    def shuffle_responses(self, seed: int) -> None:
        """Give each stimulus all the responses to another one, so that predictions can only be at chance."""

    @abstractmethod
    def shards_to_fetch(self, positions: np.ndarray) -> np.ndarray:
        """The remote shards that these images have to be read from, counted through those of all recordings."""

    @contextmanager
    def prefetching(self, schedule: Iterable[BatchRequest]) -> Iterator[Callable[[], None]]:
        """Fetch remote shards in the background while the block runs.

        Args:
            schedule: the requests to come, in order.

        Yields:
            A function to call when the next request has been read.
        """
        splits = [recording.split for recording in self.recordings]
        if not any(split.is_remote for split in splits):
            yield lambda: None
            return
        needed = [self.shards_to_fetch(request.micro_batch.positions) for request in schedule]
        with ShardPrefetcher(splits, needed) as prefetcher:
            yield prefetcher.advance


class RecordingStimuli(StimulusSet):
    """The stimuli of a split, or of a subset of it.

    Attributes:
        split: their split.
        subset: their positions in it. All other positions here count within the subset.
        columns: the columns of a network's outputs that predict the recording's sites.
        rates: float32 (stimuli, sites), NaN = not recorded; None where they are not read.
        observed: number of recorded responses to each stimulus, int64 (stimuli,); None without rates.

    Args:
        split: opened shards.
        size: side in pixels of the images to deliver.
        subset: positions in the split that are used, int64; all of them by default.
        responses: whether to read the responses.
        classes: whether to read the labels.
        caches: where decoded images are kept; by default none are.
        separate_cache: cache the subset's images apart from the rest of the split, so that a small subset that is read
            in every epoch stays cached where the whole split does not fit.
        columns: see above; all by default.
    """

    def __init__(
        self,
        split: ShardSplit,
        size: int,
        subset: np.ndarray | None = None,
        responses: bool = True,
        classes: bool = False,
        caches: ImageCaches | None = None,
        separate_cache: bool = False,
        columns: slice = slice(None),
    ):
        self.split, self.size, self.columns = split, size, columns
        self._buffers = BatchBuffers()
        self.subset = np.arange(len(split)) if subset is None else subset
        self._cache_positions = np.arange(len(self.subset)) if separate_cache else self.subset
        self._cache = None
        if caches is not None:
            self._cache = caches.open(split, size, self.subset if separate_cache else None)
        self.stimulus_ids = [split.stimulus_ids[position] for position in self.subset]
        self.rates = split.rates(self.subset) if responses else None
        self.labels = split.labels(self.subset) if classes else None
        self.observed = None if self.rates is None else _count_observed(self.rates)
        self._shared_rates: SharedArray | None = None

    def __getstate__(self) -> dict[str, object]:
        if self.rates is not None and self._shared_rates is None:
            self._shared_rates = SharedArray(self.rates)
        return self.__dict__ | {"rates": self._shared_rates, "_shared_rates": None}

    @property
    def recordings(self) -> "tuple[RecordingStimuli, ...]":
        """These stimuli alone."""
        return (self,)

    @property
    def name(self) -> str:
        """The recording's name."""
        return self.split.manifest.name

    def fingerprint(self) -> str:
        """A hash of the stimuli's ids and responses, which shows whether two scores rest on the same data."""
        return fingerprint(self.stimulus_ids, self.rates)

    def noise_of_rates(self) -> np.ndarray | None:
        """The noise variance of each response that is an average over trials: float64 (stimuli, sites).

        None where there are no responses or no single trials, or where the responses are not the average of the trials.
        """
        statistics = None if self.rates is None else self.trial_statistics()
        if self.rates is None or statistics is None:
            return None
        same = np.isclose(statistics.average, self.rates, rtol=1e-4, atol=1e-5, equal_nan=True).all()
        return statistics.noise_of_average() if same else None

    def trial_statistics(self) -> TrialStatistics | None:
        """The statistics of single trials that ceilings need; None where some stimuli have no trials."""
        trials = [self.split.array(int(position), "trials.npy") for position in self.subset]
        present = [repetitions for repetitions in trials if repetitions is not None]
        return TrialStatistics.from_trials(present) if len(present) == len(trials) else None

    def rates_of(self, positions: np.ndarray) -> torch.Tensor | None:
        """See `StimulusSet.rates_of`."""
        return None if self.rates is None else torch.from_numpy(self.rates[positions])

    def groups_of(self, batch: np.ndarray) -> tuple[SiteGroup, ...]:
        """See `StimulusSet.groups_of`."""
        if self.rates is None or self.observed is None:
            return ()
        return (SiteGroup(self.rates.shape[1], int(self.observed[batch].sum())),)

    def images(self, positions: np.ndarray) -> torch.Tensor:
        """See `StimulusSet.images`."""
        images = self._buffers.allocate((len(positions), self.size, self.size, 3))
        pixels, cache_positions = images.numpy(), self._cache_positions[positions]
        missing = range(len(positions)) if self._cache is None else self._cache.read(cache_positions, pixels)
        decoded: dict[int, int] = {}  # row of each position
        for row in missing:
            position = int(positions[row])
            if position in decoded:  # padding repeats a stimulus
                pixels[row] = pixels[decoded[position]]
                continue
            decode_at(self.split, int(self.subset[position]), pixels[row])
            decoded[position] = row
            if self._cache is not None:
                self._cache.write(int(cache_positions[row]), pixels[row])
        return images

    def names(self) -> list[str]:
        """The object that each stimulus shows, or its id where no object is given."""
        positions_and_ids = zip(self.subset, self.stimulus_ids, strict=True)
        return [self.split.label(int(position)) or stimulus_id for position, stimulus_id in positions_and_ids]

    def blocks(self, shards_mixed: int) -> Blocks:
        """How the stimuli are stored in shards, for an order that mixes `shards_mixed` of them at a time."""
        shards = self.split.shards_of(self.subset)
        if (np.diff(shards) < 0).any():
            raise ValueError("stimuli that are read shard by shard must be in the order in which they are stored")
        return Blocks(tuple(np.unique(shards, return_counts=True)[1].tolist()), shards_mixed)

    def layout(self, block_shards: int | None) -> Blocks | None:
        """See `StimulusSet.layout`."""
        return None if block_shards is None else self.blocks(block_shards)

    def shards_to_fetch(self, positions: np.ndarray) -> np.ndarray:
        """See `StimulusSet.shards_to_fetch`; shards whose images are cached are left out."""
        if not self.split.is_remote:
            return np.empty(0, np.int64)
        if self._cache is not None:
            positions = positions[~self._cache.holds(self._cache_positions[positions])]
        return np.unique(self.split.shards_of(self.subset[positions]))

    def shuffle_responses(self, seed: int) -> None:
        """See `StimulusSet.shuffle_responses`."""
        assert self.rates is not None
        circle = np.random.default_rng([seed, len(self)]).permutation(len(self))
        shuffled = np.empty_like(self.rates)
        shuffled[circle] = self.rates[np.roll(circle, 1)]
        self.replace_responses(shuffled)

    def replace_responses(self, rates: np.ndarray) -> None:
        """Replace the recorded responses: float (stimuli, sites), NaN = none."""
        self.rates = rates.astype(np.float32)
        self.observed = _count_observed(self.rates)
        self._shared_rates = None


def _count_observed(rates: np.ndarray) -> np.ndarray:
    return (~np.isnan(rates)).sum(axis=1)


def fingerprint(stimulus_ids: list[str], rates: np.ndarray | None) -> str:
    """A hash of stimuli's ids and responses."""
    digest = hashlib.sha256("\n".join(stimulus_ids).encode())
    if rates is not None:
        digest.update(rates.tobytes())
    return digest.hexdigest()
