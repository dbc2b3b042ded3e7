"""Which stimuli make a step, and which of them go to which rank: pure functions of a few integers.

Nothing here depends on how many workers, ranks or nodes there are, except the functions that deal a given global batch
out to ranks. So the same run can go on with another number of processes without repeating or skipping a stimulus.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data_prep.common.errors import BadInput


def steps_per_epoch(stimuli: int, global_batch: int) -> int:
    """Optimizer steps of one epoch.

    The stimuli that do not fill a last batch are left out (others in each epoch, as the order changes), since a small
    last batch would weigh its stimuli more. With fewer stimuli than one batch, the one step takes them all.
    """
    return max(stimuli // global_batch, 1)


def stream_seed(*numbers: int) -> int:
    """A seed for one of many independent streams of random numbers, which these numbers name."""
    # With their count, as SeedSequence takes (3, 1) and (3, 1, 0) for the same.
    return int(np.random.SeedSequence([len(numbers), *numbers]).generate_state(1, np.uint64)[0] >> 1)


@dataclass(frozen=True)
class Blocks:
    """Of an order that mixes the stimuli of a few shards at a time.

    At no point of an epoch are more than `together` shards begun and not finished, so that each is read in one stretch
    and is not needed again before the next epoch.

    Attributes:
        sizes: stimuli in each shard, in the order in which they are stored.
        together: shards that are mixed; all of them give the full shuffle.
    """

    sizes: tuple[int, ...]
    together: int


@dataclass(frozen=True)
class Turns:
    """Of an order in which several recordings take turns, one stimulus each, until the smallest has no more.

    Any stretch of it holds equally many stimuli of each, to within one.

    Attributes:
        sizes: stimuli of each recording; positions count through one recording after the other.
        blocks: of each recording, for an order that mixes a few of its shards at a time; None shuffles all its stimuli.
    """

    sizes: tuple[int, ...]
    blocks: tuple[Blocks | None, ...]


Layout = Blocks | Turns | None  # a full shuffle where None


def stimuli_of_epoch(stimuli: int, layout: Layout = None) -> int:
    """How many of the stimuli an epoch goes through: all of them, but where recordings of several sizes take turns."""
    return len(layout.sizes) * min(layout.sizes) if isinstance(layout, Turns) else stimuli


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, stimuli: int, layout: Layout = None) -> np.ndarray:
    """The order of the stimuli in an epoch, each at most once: int64, by numpy's PCG64.

    Args:
        seed, epoch: name the order.
        stimuli: how many there are.
        layout: how they lie in shards or recordings, where that matters; a permutation of all of them without.
    """
    if isinstance(layout, Turns):
        order = _in_turns(seed, epoch, layout)
    elif layout is None or layout.together >= len(layout.sizes):
        order = np.random.default_rng([seed, epoch]).permutation(stimuli)
    else:
        order = _mixed(layout, np.random.default_rng([seed, epoch, _OF_BLOCKS]))
    order.flags.writeable = False
    return order


def _in_turns(seed: int, epoch: int, turns: Turns) -> np.ndarray:
    smallest, first = min(turns.sizes), np.cumsum([0, *turns.sizes])
    orders = [
        first[number] + epoch_order(stream_seed(seed, number), epoch, size, blocks)[:smallest]
        for number, (size, blocks) in enumerate(zip(turns.sizes, turns.blocks, strict=True))
    ]
    return np.stack(orders, axis=1).ravel()


_OF_BLOCKS, _OF_SUBSETS = 1, 2  # name their streams of random numbers


def _mixed(blocks: Blocks, random: np.random.Generator) -> np.ndarray:
    """Shards at random places 0, 1, 2 ..., each stimulus at a random moment at most together/2 from its shard's middle.

    (As in MosaicML Streaming's `py1e`.) Moment t lies within the reach of no more than `together` middles 0.5, 1.5 ...
    """
    count, reach = len(blocks.sizes), blocks.together / 2
    middle = np.repeat(random.permutation(count) + 0.5, blocks.sizes)
    moment = random.uniform(np.maximum(middle - reach, 0), np.minimum(middle + reach, count))
    return np.argsort(moment, kind="stable")


def nested_subset(stimuli: int, size: int, seed: int) -> np.ndarray:
    """Positions of `size` of the training stimuli, ascending, int64; of two sizes the smaller draws from the larger.

    Raises:
        BadInput: there are fewer.
    """
    if size > stimuli:
        raise BadInput(f"subset: {size} stimuli cannot be drawn from the {stimuli} of train; lower it or leave it out")
    return np.sort(np.random.default_rng(stream_seed(seed, stimuli, _OF_SUBSETS)).permutation(stimuli)[:size])


def global_batch(seed: int, epoch: int, step: int, global_size: int, stimuli: int, layout: Layout = None) -> np.ndarray:
    """The stimuli of global step `step` (counted within its epoch), int64, in order."""
    return epoch_order(seed, epoch, stimuli, layout)[step * global_size : (step + 1) * global_size].copy()


def augmentation_draws(seed: int, epoch: int, step: int, size: int, kinds: int) -> np.ndarray:
    """Random numbers for the stimuli of a global step, uniform in [-1, 1): float32 (size, kinds)."""
    return np.random.default_rng([seed, epoch, step, kinds]).uniform(-1, 1, (size, kinds)).astype(np.float32)


def share(items: np.ndarray, rank: int, ranks: int) -> np.ndarray:
    """The contiguous part of `items` that falls to `rank`; the parts' sizes differ by at most one."""
    return items[rank * len(items) // ranks : (rank + 1) * len(items) // ranks]


def accumulation(global_size: int, ranks: int, per_device: int | None) -> int:
    """Micro-batches per step, the same on every rank, so that none exceeds `per_device` stimuli."""
    largest_share = -(-global_size // ranks)
    return -(-largest_share // per_device) if per_device else 1


@dataclass(frozen=True)
class MicroBatch:
    """What one rank passes through the network at once.

    Attributes:
        positions: of the stimuli in their split, int64.
        weight: float32, 1 for a stimulus that counts and 0 for padding.
        places: of the stimuli in the global batch, int64.
    """

    positions: np.ndarray
    weight: np.ndarray
    places: np.ndarray


def micro_batches(batch: np.ndarray, rank: int, ranks: int, accumulation_steps: int) -> list[MicroBatch]:
    """Deal a rank's share of a global batch out to `accumulation_steps` micro-batches.

    Every rank must take part in every collective operation, so a micro-batch is never empty: where a rank has fewer
    stimuli than micro-batches, it repeats the batch's first stimulus with weight 0, which adds nothing to loss or
    gradient.
    """
    own = share(np.arange(len(batch)), rank, ranks)
    dealt = []
    for piece in range(accumulation_steps):
        places = share(own, piece, accumulation_steps)
        weight = np.ones(len(places), np.float32)
        if not len(places):
            places, weight = np.zeros(1, np.int64), np.zeros(1, np.float32)
        dealt.append(MicroBatch(batch[places], weight, places))
    return dealt


def evaluation_batches(stimuli: int, rank: int, ranks: int, size: int) -> list[MicroBatch]:
    """A rank's share of a split in batches of equal shape, every stimulus of the split once over all ranks.

    What is missing to full batches, and to the same number of batches on every rank, is filled with weight 0: kernels
    may round differently for another batch shape, and the prediction for a stimulus should not depend on how many
    ranks there are.
    """
    own = share(np.arange(stimuli), rank, ranks)
    largest_share = -(-stimuli // ranks)
    batches = []
    for start in range(0, largest_share, size):
        positions = own[start : start + size]
        padding = np.full(
            size - len(positions), own[-1] if len(own) else 0
        )  # one that lies near, not the split's first
        weight = np.repeat(np.array([1, 0], np.float32), [len(positions), len(padding)])
        batches.append(MicroBatch(np.concatenate([positions, padding]), weight, np.arange(size)))
    return batches


def inner_split(groups: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide the training stimuli into a fitting part and an inner part that selects, by whole groups.

    Args:
        groups: a group label per stimulus (any comparable dtype); unique labels give a plain random split.
        fraction: share of the stimuli in the inner part.
        seed: of the division.

    Returns:
        Positions (fit, inner), each ascending; both hold at least one group where there are two.
    """
    inner = _drawn(groups, fraction * len(groups), seed)
    return np.flatnonzero(~inner), np.flatnonzero(inner)


def _drawn(groups: np.ndarray, wanted: float, seed: int, spare: int = 1) -> np.ndarray:
    """Draw whole groups, all but `spare`, until they hold `wanted` stimuli, and one at least: bool (stimuli,)."""
    labels, group_of = np.unique(groups, return_inverse=True)
    sizes = np.bincount(group_of)
    order = np.random.default_rng([seed, len(groups)]).permutation(len(labels))
    before = np.cumsum(sizes[order]) - sizes[order]
    chosen = order[(before < max(wanted, 1)) & (np.arange(len(order)) < len(order) - spare)]
    return np.isin(group_of, chosen)


def inner_splits(
    recordings: Sequence[tuple[np.ndarray, Sequence[Hashable]]], fraction: float, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """`inner_split` of each recording, so that what several recordings share is on the same side in all of them.

    What earlier recordings have decided holds for later ones, which draw what they lack from the rest. The first one is
    divided as it would be alone, and so is every one that shares nothing.

    Args:
        recordings: of each the groups as of `inner_split`, and per stimulus what tells its group in other recordings.
        fraction, seed: as of `inner_split`.
    """
    side: dict[Hashable, bool] = {}  # whether it is inner
    found = []
    for groups, shared in recordings:
        inner = np.array([side.get(key, False) for key in shared], bool)
        free = np.array([key not in side for key in shared], bool)
        wanted = fraction * len(inner) - inner.sum()
        if not inner.any() and not free.any():  # earlier ones fit all of it
            free[:] = True
        if free.any() and (wanted > 0 or not inner.any()):
            inner[free] = _drawn(groups[free], wanted, seed, spare=int(free.all() or inner[~free].all()))
        side |= dict(zip(shared, inner.tolist(), strict=True))
        found.append((np.flatnonzero(~inner), np.flatnonzero(inner)))
    return found
