"""Properties of the order and of its division over ranks that hold for every number of ranks."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.order import (
    Blocks,
    InnerSplit,
    StimulusGroups,
    accumulation,
    epoch_order,
    evaluation_batches,
    global_batch,
    inner_splits,
    micro_batches,
    share,
    steps_per_epoch,
)

settings.register_profile("unhurried", deadline=None)  # the machine may be busy
settings.load_profile("unhurried")

seeds = st.integers(0, 2**32 - 1)
epochs = st.integers(0, 1000)
counts = st.integers(1, 300)
ranks_ = st.integers(1, 70)


def inner_split(labels, fraction, seed) -> InnerSplit:
    """The inner split of a single recording."""
    (split,) = inner_splits([StimulusGroups(np.array(labels), list(labels))], fraction, seed)
    return split


def epoch_of(seed, epoch, size, stimuli):
    """All global batches of an epoch."""
    return [global_batch(seed, epoch, step, size, stimuli) for step in range(steps_per_epoch(stimuli, size))]


def counted(micros):
    """The positions with weight in some micro-batches, in order."""
    return np.concatenate([micro.positions[micro.weight > 0] for micro in micros])


# ---- epochs --------------------------------------------------------------------------------------------------------


@given(seeds, epochs, counts, counts)
def test_an_epoch_shows_each_stimulus_once_except_an_incomplete_last_batch(seed, epoch, size, stimuli):
    batches = epoch_of(seed, epoch, size, stimuli)
    assert {len(batch) for batch in batches} == {min(size, stimuli)}
    shown = np.concatenate(batches)
    assert len(set(shown.tolist())) == len(shown) == stimuli - (stimuli % size if size <= stimuli else 0)
    assert set(shown.tolist()) <= set(range(stimuli))


@given(seeds, epochs)
def test_the_order_depends_on_seed_and_epoch_alone(seed, epoch):
    order = epoch_order(seed, epoch, 50)
    assert sorted(order) == list(range(50))
    assert np.array_equal(order, epoch_order.__wrapped__(seed, epoch, 50))  # not the cached one
    others = [epoch_order(*other, 50) for other in ((seed, epoch + 1), (seed + 1, epoch), (seed + 1, epoch + 1))]
    assert len({tuple(other) for other in (order, *others)}) == 4


def test_every_stimulus_is_seen_over_the_epochs():
    """10 of 50 stimuli fill no batch; which ones changes from epoch to epoch."""
    shown = [np.concatenate(epoch_of(0, epoch, 40, 50)) for epoch in range(20)]
    assert set(np.concatenate(shown).tolist()) == set(range(50))


# ---- blocks --------------------------------------------------------------------------------------------------------


@st.composite
def stored(draw):
    """Stimuli in shards of uneven sizes, and how many shards are mixed at a time."""
    sizes = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=25)))
    return Blocks(sizes, draw(st.integers(1, 30)))


def begun_and_not_finished(order, blocks):
    """At each place of an order, how many shards have had a stimulus by then and have one to come, there included."""
    shard = np.repeat(np.arange(len(blocks.sizes)), blocks.sizes)[order]
    first = [np.flatnonzero(shard == number)[0] for number in range(len(blocks.sizes))]
    last = [np.flatnonzero(shard == number)[-1] for number in range(len(blocks.sizes))]
    return [sum(a <= position <= b for a, b in zip(first, last, strict=True)) for position in range(len(order))]


@given(seeds, epochs, stored())
def test_the_order_by_blocks_takes_each_stimulus_once(seed, epoch, blocks):
    order = epoch_order(seed, epoch, sum(blocks.sizes), blocks)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(sum(blocks.sizes)))
    assert np.array_equal(order, epoch_order.__wrapped__(seed, epoch, sum(blocks.sizes), blocks))  # not the cached one


@given(seeds, epochs, stored())
def test_no_more_shards_are_open_than_are_mixed(seed, epoch, blocks):
    """Each shard is read once, in one stretch."""
    order = epoch_order(seed, epoch, sum(blocks.sizes), blocks)
    assert max(begun_and_not_finished(order, blocks)) <= blocks.shards_mixed


@given(seeds, epochs, stored(), counts)
def test_a_batch_needs_few_shards(seed, epoch, blocks, size):
    """Those open at its beginning, those open at its end, and what is so small that it lies in it whole."""
    stimuli = sum(blocks.sizes)
    shard = np.repeat(np.arange(len(blocks.sizes)), blocks.sizes)
    for step in range(steps_per_epoch(stimuli, size)):
        taken = np.bincount(shard[global_batch(seed, epoch, step, size, stimuli, blocks)], minlength=len(blocks.sizes))
        assert np.sum((taken > 0) & (taken < blocks.sizes)) <= 2 * blocks.shards_mixed


@given(seeds, epochs, stored())
def test_mixing_all_shards_is_the_full_shuffle(seed, epoch, blocks):
    stimuli, everything = sum(blocks.sizes), Blocks(blocks.sizes, len(blocks.sizes))
    assert np.array_equal(epoch_order(seed, epoch, stimuli, everything), epoch_order(seed, epoch, stimuli))


def test_shards_come_in_another_order_in_each_epoch_and_are_mixed_all_along():
    blocks = Blocks((50,) * 40, 8)
    shard = np.repeat(np.arange(40), 50)
    orders = [shard[epoch_order(0, epoch, 2000, blocks)] for epoch in range(5)]
    assert len({tuple(order) for order in orders}) == 5
    assert len({order[0] for order in orders}) > 1
    for order in orders:
        assert min(len(set(batch)) for batch in order.reshape(-1, 50)) >= 4  # half of them at the ends


# ---- from step to step ---------------------------------------------------------------------------------------------


@st.composite
def runs(draw):
    """Stimuli in shards, shuffled or by blocks, a batch, and two numbers of processes with a step to change at."""
    blocks = draw(stored())
    stimuli = sum(blocks.sizes)
    size = draw(st.integers(1, stimuli))
    step = draw(st.integers(0, steps_per_epoch(stimuli, size)))
    return stimuli, draw(st.none() | st.just(blocks)), size, draw(ranks_), draw(ranks_), step, draw(st.integers(1, 9))


@given(seeds, epochs, runs())
def test_a_run_resumed_on_other_ranks_repeats_and_skips_nothing(seed, epoch, run):
    """Whatever the order and the processes, micro-batches and workers before and after."""
    stimuli, blocks, size, before, after, changed, workers = run
    shown = []
    for step in range(steps_per_epoch(stimuli, size)):
        batch = global_batch(seed, epoch, step, size, stimuli, blocks)
        ranks = before if step < changed else after
        micro_batch_count = accumulation(len(batch), ranks, workers)
        dealt = [counted(micro_batches(batch, rank, ranks, micro_batch_count)) for rank in range(ranks)]
        assert sum(map(len, dealt)) == size
        shown.append(np.concatenate(dealt))
    together = np.concatenate(shown)
    assert np.array_equal(together, epoch_order(seed, epoch, stimuli, blocks)[: len(together)])
    assert len(together) == stimuli // size * size


# ---- ranks ---------------------------------------------------------------------------------------------------------


@st.composite
def deals(draw):
    """A global batch, the number of processes that share it, and the largest micro-batch."""
    stimuli, size, ranks = draw(counts), draw(counts), draw(ranks_)
    size = min(size, stimuli)
    per_device = draw(st.none() | st.integers(1, size))
    step = draw(st.integers(0, steps_per_epoch(stimuli, size) - 1))
    return global_batch(draw(seeds), draw(epochs), step, size, stimuli), ranks, per_device


@given(deals())
def test_the_ranks_together_take_the_global_batch_whatever_their_number(deal):
    batch, ranks, per_device = deal
    micro_batch_count = accumulation(len(batch), ranks, per_device)
    dealt = [micro_batches(batch, rank, ranks, micro_batch_count) for rank in range(ranks)]
    assert np.array_equal(np.concatenate([counted(micros) for micros in dealt]), batch)
    assert sum(micro.weight.sum() for micros in dealt for micro in micros) == len(batch)
    assert {len(micros) for micros in dealt} == {micro_batch_count}
    shares = [len(counted(micros)) for micros in dealt]
    assert max(shares) - min(shares) <= 1


@given(deals())
def test_no_micro_batch_is_empty_or_too_large_and_padding_weighs_nothing(deal):
    batch, ranks, per_device = deal
    micro_batch_count = accumulation(len(batch), ranks, per_device)
    for rank in range(ranks):
        for micro in micro_batches(batch, rank, ranks, micro_batch_count):
            assert 1 <= len(micro.positions) <= (per_device or len(batch))
            assert micro.positions.shape == micro.weight.shape
            assert set(micro.positions.tolist()) <= set(batch.tolist())
            assert set(micro.weight.tolist()) in ({0.0}, {1.0})


@given(deals())
def test_no_more_micro_batches_than_are_needed(deal):
    """Each costs a pass through the network: with one fewer, some rank would exceed per_device."""
    batch, ranks, per_device = deal
    micro_batches = accumulation(len(batch), ranks, per_device)
    if per_device is None:
        assert micro_batches == 1
    elif micro_batches > 1:
        largest = max(len(share(batch, rank, ranks)) for rank in range(ranks))
        assert largest > per_device * (micro_batches - 1)


@given(counts, ranks_)
def test_shares_are_disjoint_complete_and_even(n, ranks):
    shares = [share(np.arange(n), rank, ranks) for rank in range(ranks)]
    assert np.array_equal(np.concatenate(shares), np.arange(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# ---- evaluation ----------------------------------------------------------------------------------------------------


@given(counts, ranks_, st.integers(1, 100))
def test_evaluation_takes_every_stimulus_once_over_all_ranks(stimuli, ranks, size):
    dealt = [evaluation_batches(stimuli, rank, ranks, size) for rank in range(ranks)]
    assert np.array_equal(np.concatenate([counted(batches) for batches in dealt]), np.arange(stimuli))


@given(counts, ranks_, st.integers(1, 100))
def test_evaluation_batches_are_alike_on_every_rank(stimuli, ranks, size):
    dealt = [evaluation_batches(stimuli, rank, ranks, size) for rank in range(ranks)]
    assert {len(batches) for batches in dealt} == {math.ceil(math.ceil(stimuli / ranks) / size)}
    for batches in dealt:
        for micro in batches:
            assert micro.positions.shape == micro.weight.shape == (size,)
            assert micro.positions.dtype == np.int64
            assert 0 <= micro.positions.min() <= micro.positions.max() < stimuli


# ---- inner split ---------------------------------------------------------------------------------------------------

groups_ = st.lists(st.integers(0, 12), min_size=2, max_size=120).filter(lambda groups: len(set(groups)) > 1)
fractions = st.floats(0.01, 0.99)


@given(groups_, fractions, seeds)
def test_the_inner_split_keeps_groups_together_and_loses_nothing(groups, fraction, seed):
    groups = np.array(groups)
    split = inner_split(groups, fraction, seed)
    fit, inner = split.fit, split.inner
    assert np.array_equal(np.sort(np.concatenate([fit, inner])), np.arange(len(groups)))
    assert set(groups[fit]).isdisjoint(groups[inner])
    assert len(fit) > 0
    assert len(inner) > 0
    assert np.all(np.diff(fit) > 0)
    assert np.all(np.diff(inner) > 0)


@given(groups_, fractions, seeds)
def test_the_inner_split_exceeds_its_share_by_less_than_a_group(groups, fraction, seed):
    groups = np.array(groups)
    split = inner_split(groups, fraction, seed)
    fit, inner = split.fit, split.inner
    largest = np.unique(groups[inner], return_counts=True)[1].max()
    target = max(fraction * len(groups), 1)
    assert len(inner) - largest < target
    assert len(inner) >= target or len(set(groups[fit])) == 1  # all but the group that is left to fit


@given(st.integers(10, 200), fractions, seeds)
def test_the_inner_split_is_seeded_and_ignores_group_names(n, fraction, seed):
    names = np.array([f"stim{i:03d}" for i in range(n)])
    split = inner_split(names, fraction, seed)
    again = inner_split(np.arange(n), fraction, seed)
    assert np.array_equal(split.fit, again.fit)
    assert np.array_equal(split.inner, again.inner)
    assert len(split.inner) == min(int(np.ceil(max(fraction * n, 1))), n - 1)


def test_another_seed_gives_another_inner_split():
    splits = {tuple(inner_split(np.arange(100), 0.1, seed).inner) for seed in range(10)}
    assert len(splits) == 10


def test_a_single_group_is_never_held_out_whole():
    """There would be nothing left to fit."""
    assert len(inner_split(np.zeros(20, int), 0.1, 0).fit) > 0
