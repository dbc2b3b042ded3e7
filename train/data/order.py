"""Which stimuli make a step, and which of them go to which rank: pure functions of a few integers.

Nothing here depends on the number of workers, ranks or nodes, except the functions that divide a given global batch
among ranks. So a run can resume with another number of processes without repeating or skipping a stimulus.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data_prep.common.errors import BadInput

_BLOCK_STREAM, _SUBSET_STREAM = 1, 2  # name streams of random numbers


def steps_per_epoch(stimuli: int, global_batch: int) -> int:
    """Optimizer steps of one epoch.

    Stimuli that do not fill the last batch are left out (different ones in each epoch, as the order changes), since a
    small last batch would give its stimuli more weight. Stimuli that do not even fill one batch make a single step.
    """
    return max(stimuli // global_batch, 1)


def stream_seed(*numbers: int) -> int:
    """A seed for one of many independent streams of random numbers, named by these numbers."""
    # The count comes first, as SeedSequence treats (3, 1) and (3, 1, 0) alike.
    return int(np.random.SeedSequence([len(numbers), *numbers]).generate_state(1, np.uint64)[0] >> 1)


@dataclass(frozen=True)
class Blocks:
    """The layout for an order that mixes the stimuli of a few shards at a time.

    At no point of an epoch are more than `shards_mixed` shards begun and not finished, so that each is read in one
    stretch and not needed again before the next epoch.

    Attributes:
        sizes: stimuli in each shard, in the order in which they are stored.
        shards_mixed: shards that are mixed at a time; with all of them it is a full shuffle.
    """

    sizes: tuple[int, ...]
    shards_mixed: int


@dataclass(frozen=True)
class Turns:
    """The layout for an order in which recordings take turns, one stimulus each, until the smallest runs out.

    Any stretch of that order holds equally many stimuli of each recording, to within one.

    Attributes:
        sizes: stimuli of each recording; positions count through one recording after the other.
        blocks: of each recording, for an order that mixes a few of its shards at a time; None shuffles all its stimuli.
    """

    sizes: tuple[int, ...]
    blocks: tuple[Blocks | None, ...]


Layout = Blocks | Turns | None  # a full shuffle where None


def stimuli_of_epoch(stimuli: int, layout: Layout = None) -> int:
    """The number of stimuli in an epoch: all of them, except where recordings of different sizes take turns."""
    return len(layout.sizes) * min(layout.sizes) if isinstance(layout, Turns) else stimuli


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, stimuli: int, layout: Layout = None) -> np.ndarray:
    """The order of the stimuli in an epoch, each at most once: int64, by numpy's PCG64.

    Args:
        seed, epoch: name the order.
        stimuli: their number.
        layout: how they are stored in shards or recordings, where that matters; None gives a full permutation.
    """
    if isinstance(layout, Turns):
        order = _in_turns(seed, epoch, layout)
    elif layout is None or layout.shards_mixed >= len(layout.sizes):
        order = np.random.default_rng([seed, epoch]).permutation(stimuli)
    else:
        order = _mixed(layout, np.random.default_rng([seed, epoch, _BLOCK_STREAM]))
    order.flags.writeable = False
    return order


def _in_turns(seed: int, epoch: int, turns: Turns) -> np.ndarray:
    smallest, first = min(turns.sizes), np.cumsum([0, *turns.sizes])
    orders = [
        first[number] + epoch_order(stream_seed(seed, number), epoch, size, blocks)[:smallest]
        for number, (size, blocks) in enumerate(zip(turns.sizes, turns.blocks, strict=True))
    ]
    return np.stack(orders, axis=1).ravel()


def _mixed(blocks: Blocks, random: np.random.Generator) -> np.ndarray:
    """Shards in a random order 0, 1, 2 ..., stimuli at random times at most shards_mixed/2 from their shard's middle.

    As in MosaicML Streaming's `py1e`. A time t is within reach of no more than `shards_mixed` middles 0.5, 1.5 ...
    """
    count, reach = len(blocks.sizes), blocks.shards_mixed / 2
    middle = np.repeat(random.permutation(count) + 0.5, blocks.sizes)
    time = random.uniform(np.maximum(middle - reach, 0), np.minimum(middle + reach, count))
    return np.argsort(time, kind="stable")


def nested_subset(stimuli: int, size: int, seed: int) -> np.ndarray:
    """Positions of `size` of the training stimuli, ascending, int64; a smaller subset lies within a larger one.

    Raises:
        BadInput: train has fewer.
    """
    if size > stimuli:
        raise BadInput(f"subset: {size} stimuli cannot be drawn from the {stimuli} of train; lower it or leave it out")
    return np.sort(np.random.default_rng(stream_seed(seed, stimuli, _SUBSET_STREAM)).permutation(stimuli)[:size])


def global_batch(seed: int, epoch: int, step: int, global_size: int, stimuli: int, layout: Layout = None) -> np.ndarray:
    """The stimuli of global step `step` (counted within its epoch), int64, in order."""
    return epoch_order(seed, epoch, stimuli, layout)[step * global_size : (step + 1) * global_size].copy()


def augmentation_draws(seed: int, epoch: int, step: int, size: int, kinds: int) -> np.ndarray:
    """Random numbers for the stimuli of a global step, uniform in [-1, 1): float32 (size, kinds)."""
    return np.random.default_rng([seed, epoch, step, kinds]).uniform(-1, 1, (size, kinds)).astype(np.float32)


def share(items: np.ndarray, rank: int, ranks: int) -> np.ndarray:
    """The contiguous share of `items` that belongs to `rank`; shares differ by at most one in size.

    Raises:
        ValueError: there is no such rank, whose share would be empty.
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} of {ranks}")
    return items[rank * len(items) // ranks : (rank + 1) * len(items) // ranks]


def accumulation(global_size: int, ranks: int, per_device: int | None) -> int:
    """Micro-batches per step, the same number on every rank, so that none exceeds `per_device` stimuli."""
    largest_share = -(-global_size // ranks)
    return -(-largest_share // per_device) if per_device else 1


@dataclass(frozen=True)
class MicroBatch:
    """The stimuli that one rank passes through the network at once.

    Attributes:
        positions: of the stimuli in their split, int64.
        weight: float32, 1 for a stimulus that counts and 0 for padding.
        batch_indices: of the stimuli in the global batch, int64.
    """

    positions: np.ndarray
    weight: np.ndarray
    batch_indices: np.ndarray


def micro_batches(batch: np.ndarray, rank: int, ranks: int, accumulation_steps: int) -> list[MicroBatch]:
    """Divide a rank's share of a global batch into `accumulation_steps` micro-batches.

    Every rank must take part in every collective operation, so a micro-batch is never empty: where a rank has fewer
    stimuli than micro-batches, it repeats the batch's first stimulus with weight 0, which adds nothing to loss or
    gradient.
    """
    rank_share = share(np.arange(len(batch)), rank, ranks)
    divided = []
    for step in range(accumulation_steps):
        indices = share(rank_share, step, accumulation_steps)
        weight = np.ones(len(indices), np.float32)
        if not len(indices):
            indices, weight = np.zeros(1, np.int64), np.zeros(1, np.float32)
        divided.append(MicroBatch(batch[indices], weight, indices))
    return divided


def evaluation_batches(stimuli: int, rank: int, ranks: int, size: int) -> list[MicroBatch]:
    """A rank's share of a split in batches of equal shape, every stimulus of the split once over all ranks.

    Batches are padded with weight 0 to the same shape and the same number on every rank: kernels may round differently
    for another batch shape, and the prediction for a stimulus should not depend on the number of ranks.
    """
    rank_share = share(np.arange(stimuli), rank, ranks)
    largest_share = -(-stimuli // ranks)
    batches = []
    for start in range(0, largest_share, size):
        positions = rank_share[start : start + size]
        nearest = rank_share[-1] if len(rank_share) else 0  # read in the same stretch, unlike the split's first
        padding = np.full(size - len(positions), nearest)
        weight = np.repeat(np.array([1, 0], np.float32), [len(positions), len(padding)])
        batches.append(MicroBatch(np.concatenate([positions, padding]), weight, np.arange(size)))
    return batches


@dataclass(frozen=True)
class StimulusGroups:
    """Which stimuli of a recording stay on one side when it is divided.

    Attributes:
        labels: of each stimulus's group (any comparable dtype); unique labels give a plain random split.
        keys: per stimulus, what other recordings call it or its group; the stimuli of a group may have several.
    """

    labels: np.ndarray
    keys: Sequence[Hashable]


@dataclass(frozen=True)
class InnerSplit:
    """Positions of the training stimuli to fit and of the inner ones, which select; each ascending."""

    fit: np.ndarray
    inner: np.ndarray


def inner_splits(recordings: Sequence[StimulusGroups], fraction: float, seed: int) -> list[InnerSplit]:
    """Divide the training stimuli of each recording by whole groups, those that recordings share alike in all of them.

    Earlier recordings decide for later ones, which draw what they lack from the rest. The first one is divided as it
    would be alone, and so is every one that shares nothing. Where a recording has two groups, both sides hold at least
    one.

    Args:
        recordings: the groups of each.
        fraction: of the stimuli that are inner.
        seed: of the draw.
    """
    is_inner: dict[Hashable, bool] = {}
    divided = []
    for groups in recordings:
        inner = np.array([is_inner.get(key, False) for key in groups.keys], bool)
        free = np.array([key not in is_inner for key in groups.keys], bool)
        inner, free = _any_of_group(groups.labels, inner), ~_any_of_group(groups.labels, ~free)
        wanted = fraction * len(inner) - inner.sum()
        if not inner.any() and not free.any():  # earlier recordings fit all of its stimuli
            free[:] = True
        if free.any() and (wanted > 0 or not inner.any()):
            spare = int(free.all() or inner[~free].all())
            inner[free] = _draw_groups(groups.labels[free], wanted, seed, spare)
        is_inner |= dict(zip(groups.keys, inner.tolist(), strict=True))
        divided.append(InnerSplit(np.flatnonzero(~inner), np.flatnonzero(inner)))
    return divided


def _any_of_group(labels: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The stimuli with any of their group among the `chosen`; both bool (stimuli,)."""
    group_of = np.unique(labels, return_inverse=True)[1]
    return np.bincount(group_of, weights=chosen)[group_of] > 0


def _draw_groups(labels: np.ndarray, wanted: float, seed: int, spare: int) -> np.ndarray:
    """Draw whole groups until they hold `wanted` stimuli: at least one group, and all but `spare`; bool (stimuli,)."""
    names, group_of = np.unique(labels, return_inverse=True)
    sizes = np.bincount(group_of)
    order = np.random.default_rng([seed, len(labels)]).permutation(len(names))
    before = np.cumsum(sizes[order]) - sizes[order]
    chosen = order[(before < max(wanted, 1)) & (np.arange(len(order)) < len(order) - spare)]
    return np.isin(group_of, chosen)
