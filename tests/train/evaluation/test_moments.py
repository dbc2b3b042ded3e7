"""Moments merge exactly, however the stimuli are dealt out to ranks and batches."""

from functools import reduce

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from site_scores import SITES, STIMULI, assert_same_scores, make_predictions, moments, scores

from train.evaluation.metrics import site_scores
from train.evaluation.moments import SiteMoments

settings.register_profile("unhurried", deadline=None)  # the machine may be busy
settings.load_profile("unhurried")


@st.composite
def partitions(draw):
    """Which of 1, 2, 3, 7 or 64 ranks sees each stimulus, and in batches of how many; ranks may see none."""
    ranks = draw(st.sampled_from([1, 2, 3, 7, 64]))
    used = draw(st.lists(st.integers(0, ranks - 1), min_size=1, max_size=ranks))
    return ranks, draw(st.lists(st.sampled_from(used), min_size=STIMULI, max_size=STIMULI)), draw(st.integers(1, 40))


@settings(max_examples=60)
@given(partitions(), st.sampled_from([0.0, 5000.0]))
def test_any_partition_over_ranks_gives_the_same(partition, offset):
    ranks, rank_of, size = partition
    prediction, target = make_predictions(missing=0.3)
    target += np.float32(offset)
    prediction += np.float32(offset)
    per_rank = []
    for rank in range(ranks):
        mine = np.flatnonzero(np.array(rank_of) == rank)
        merged = SiteMoments.zeros(SITES)
        for start in range(0, len(mine), size):
            batch = mine[start : start + size]
            merged = merged.merge(moments(prediction[batch], target[batch]))
        per_rank.append(merged)
    assert_same_scores(site_scores(reduce(SiteMoments.merge, per_rank)), scores(prediction, target))


def test_weight_zero_leaves_a_stimulus_out_whatever_it_holds():
    prediction, target = make_predictions()
    padded_p = np.concatenate([prediction, np.full((5, SITES), np.nan, np.float32)])
    padded_y = np.concatenate([target, np.full((5, SITES), 1e30, np.float32)])
    weight = np.repeat(np.array([1, 0], np.float32), [STIMULI, 5])
    assert_same_scores(site_scores(moments(padded_p, padded_y, weight)), scores(prediction, target), rtol=1e-12)


def test_no_stimuli_give_no_scores_and_change_nothing():
    prediction, target = make_predictions()
    nothing = SiteMoments.zeros(SITES)
    assert all(np.isnan(values).all() for values in site_scores(nothing).values())
    joined = nothing.merge(moments(prediction, target)).merge(nothing)
    assert_same_scores(site_scores(joined), scores(prediction, target), rtol=1e-14)


def test_a_large_offset_does_not_cancel_when_moments_are_merged():
    """Multiples of 1/1024 stay exact when a million is added, so that nothing but the arithmetic can differ."""
    prediction, target = (np.round(x.astype(np.float64) * 1024) / 1024 for x in make_predictions())
    parts = [moments(prediction[i::7] + 1e6, target[i::7] + 1e6) for i in range(7)]
    assert_same_scores(site_scores(reduce(SiteMoments.merge, parts)), scores(prediction, target))
