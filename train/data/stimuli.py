"""The stimuli of one recording: responses and labels in memory, images decoded on demand."""

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
from train.data.batches import Batch, Group, Work
from train.data.decoding import decode_at
from train.data.image_cache import ImageCaches
from train.data.order import Blocks, Layout, MicroBatch
from train.data.prefetching import ShardPrefetcher


class StimulusSet(Dataset, ABC):
    """Stimuli by position: those of one recording, or of several (`train.data.combined_stimuli.CombinedStimuli`).

    Attributes:
        recordings: the stimuli of each recording; positions count through one after the other.
        size: side in pixels of the images.
        stimulus_ids: of all of them.
        labels: int64 (stimuli,), or None.
    """

    recordings: "tuple[RecordingStimuli, ...]"
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
            global_stimuli=work.stimuli,
            global_observed=work.observed,
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
    def prefetching(self, schedule: Iterable[Work]) -> Iterator[Callable[[], None]]:
        """Fetch remote shards in the background while the block runs.

        Args:
            schedule: what is going to be read, in order.

        Yields:
            What is to be called when the next part of it has been read.
        """
        splits = [part.split for part in self.recordings]
        if not any(split.is_remote for split in splits):
            yield lambda: None
            return
        with ShardPrefetcher(splits, [self.shards_to_fetch(work.micro.positions) for work in schedule]) as ahead:
            yield ahead.passed


class RecordingStimuli(StimulusSet):
    """The stimuli of a split, or of a part of it, with their responses and labels in memory and images on disk.

    Args:
        split: opened shards.
        size: side in pixels of the images to deliver.
        subset: positions in the split that are used, int64; all of them by default. Everything below counts within it.
        responses: whether to read the responses.
        classes: whether to read the labels.
        caches: where decoded images are kept; by default none are.
        separate_cache: cache the subset's images apart from the rest of the split, so that a small subset that is read
            in every epoch stays cached where the whole split does not fit.
        columns: which of a network's outputs are for its sites; by default all.
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
        self._split = split
        self._memory = BatchBuffers()
        self.size, self.columns = size, columns
        self.subset = np.arange(len(split)) if subset is None else subset
        self._kept_as = np.arange(len(self.subset)) if separate_cache else self.subset
        self._cache = None if caches is None else caches.of(split, size, self.subset if separate_cache else None)
        self.stimulus_ids = [split.stimulus_ids[position] for position in self.subset]
        self.rates = split.rates(self.subset) if responses else None
        self.labels = split.labels(self.subset) if classes else None
        self.observed = None if self.rates is None else (~np.isnan(self.rates)).sum(axis=1)

    @property
    def recordings(self) -> tuple["RecordingStimuli"]:
        """Itself: one recording is the case of one."""
        return (self,)

    @property
    def split(self) -> ShardSplit:
        """Where they lie."""
        return self._split

    @property
    def name(self) -> str:
        """The name of their recording."""
        return self._split.manifest.name

    def fingerprint(self) -> str:
        """A hash of the stimuli's ids and responses: it tells whether two scores rest on the same data."""
        return fingerprint(self.stimulus_ids, self.rates)

    def noise_of_rates(self) -> np.ndarray | None:
        """The noise variance of each response that is an average over trials: float64 (stimuli, sites).

        None where there are no responses or no single trials, or where the responses are no average of the trials.
        """
        statistics = None if self.rates is None else self.trial_statistics()
        if statistics is None:
            return None
        same = np.isclose(statistics.average, self.rates, rtol=1e-4, atol=1e-5, equal_nan=True).all()
        return statistics.noise_of_average() if same else None

    def trial_statistics(self) -> TrialStatistics | None:
        """What ceilings need to know of the single trials of these stimuli; None where there are none."""
        trials = [self._split.array(int(position), "trials.npy") for position in self.subset]
        return None if any(part is None for part in trials) else TrialStatistics.from_trials(trials)

    def rates_of(self, positions: np.ndarray) -> torch.Tensor | None:
        """See `StimulusSet.rates_of`."""
        return None if self.rates is None else torch.from_numpy(self.rates[positions])

    def groups_of(self, batch: np.ndarray) -> tuple[Group, ...]:
        """See `StimulusSet.groups_of`."""
        return () if self.rates is None else (Group(self.rates.shape[1], int(self.observed[batch].sum())),)

    def images(self, positions: np.ndarray) -> torch.Tensor:
        """See `StimulusSet.images`."""
        images = self._memory.take((len(positions), self.size, self.size, 3))
        pixels, kept_as = images.numpy(), self._kept_as[positions]
        missing = range(len(positions)) if self._cache is None else self._cache.read(kept_as, pixels)
        decoded: dict[int, int] = {}
        for row in missing:
            position = int(positions[row])
            if position in decoded:  # padding repeats a stimulus
                pixels[row] = pixels[decoded[position]]
                continue
            decode_at(self._split, int(self.subset[position]), pixels[row])
            decoded[position] = row
            if self._cache is not None:
                self._cache.write(int(kept_as[row]), pixels[row])
        return images

    def names(self) -> list[str]:
        """What each stimulus shows, or its id where nothing tells."""
        found = zip(self.subset, self.stimulus_ids, strict=True)
        return [self._split.label(int(place)) or name for place, name in found]

    def blocks(self, together: int) -> Blocks:
        """How the stimuli lie in shards, for an order that mixes `together` of these at a time."""
        shards = self._split.shards_of(self.subset)
        if (np.diff(shards) < 0).any():
            raise ValueError("stimuli that are read shard by shard must be in the order in which they are stored")
        return Blocks(tuple(np.unique(shards, return_counts=True)[1].tolist()), together)

    def layout(self, block_shards: int | None) -> Layout:
        """See `StimulusSet.layout`."""
        return None if block_shards is None else self.blocks(block_shards)

    def shards_to_fetch(self, positions: np.ndarray) -> np.ndarray:
        """See `StimulusSet.shards_to_fetch`; shards whose images are kept are left out."""
        if not self._split.is_remote:
            return np.empty(0, np.int64)
        if self._cache is not None:
            positions = positions[~self._cache.holds(self._kept_as[positions])]
        return np.unique(self._split.shards_of(self.subset[positions]))

    def shuffle_responses(self, seed: int) -> None:
        """See `StimulusSet.shuffle_responses`."""
        circle = np.random.default_rng([seed, len(self)]).permutation(len(self))
        shuffled = np.empty_like(self.rates)
        shuffled[circle] = self.rates[np.roll(circle, 1)]
        self.replace_responses(shuffled)

    def replace_responses(self, rates: np.ndarray) -> None:
        """Put others in place of the recorded responses: float (stimuli, sites), NaN = none."""
        self.rates = rates.astype(np.float32)
        self.observed = (~np.isnan(self.rates)).sum(axis=1)


def fingerprint(stimulus_ids: list[str], rates: np.ndarray | None) -> str:
    """A hash of stimuli's ids and responses."""
    found = hashlib.sha256("\n".join(stimulus_ids).encode())
    if rates is not None:
        found.update(rates.tobytes())
    return found.hexdigest()
