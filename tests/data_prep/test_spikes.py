"""Spikes to responses: counts, rates, baselines and z-scores."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.common.errors import BadInput
from data_prep.spikes import SessionScale, per_second, raster_counts, spike_counts


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 400)), st.lists(st.integers(0, 300), min_size=1, max_size=5), st.integers(1, 90))
def test_counts_are_those_of_looking_at_every_spike(spikes, onsets, width):
    windows = [(0, width), (-50, 20)]
    expected = [[sum(a <= spike - onset < b for spike in spikes) for a, b in windows] for onset in onsets]
    assert spike_counts(np.sort(spikes), np.array(onsets, float), windows).tolist() == expected


def test_a_presentation_that_did_not_happen_has_no_count():
    assert np.isnan(spike_counts(np.array([1.0]), np.array([0.0, np.nan]), [(0, 2)])).ravel().tolist() == [False, True]


def test_spike_times_out_of_order_and_windows_the_wrong_way_round_are_refused():
    with pytest.raises(BadInput, match="ascending"):
        spike_counts(np.array([2.0, 1.0]), np.zeros(1), [(0, 1)])
    with pytest.raises(BadInput, match="start before it ends"):
        spike_counts(np.array([1.0]), np.zeros(1), [(3, 3)])


def test_rasters_and_spike_times_agree():
    rng = np.random.default_rng(0)
    raster = (rng.uniform(size=(6, 500)) < 0.05).astype(np.int8)
    raster[4] = -1
    window = (70.0, 170.0)
    counts = raster_counts(raster, -100, window)
    expected = [spike_counts(np.flatnonzero(row == 1) - 100.0, np.zeros(1), [window])[0, 0] for row in raster]
    assert counts[[0, 1, 2, 3, 5]].tolist() == [expected[k] for k in (0, 1, 2, 3, 5)]
    assert np.isnan(counts[4])
    np.testing.assert_allclose(per_second(counts, window)[0], counts[0] / 0.1)


@pytest.mark.parametrize(
    ("window", "words"), [((0, 401), "-100 to 400"), ((-101, 5), "-100 to 400"), ((0.5, 9), "bin")]
)
def test_windows_outside_the_rasters_are_refused(window, words):
    with pytest.raises(BadInput, match=words):
        raster_counts(np.zeros((2, 500), np.int8), -100, window)


def test_z_scores_are_those_of_each_session():
    rng = np.random.default_rng(0)
    responses = rng.normal(5, 2, (30, 3))
    responses[3, 1] = np.nan
    responses[10:20, 2] = 7.0  # constant within its session
    session = np.repeat([0, 1, 2], 10)
    scale = SessionScale(3, 3)
    scale.add(responses, session)
    scored = scale.z_score(responses, session)
    for number in range(3):
        rows = session == number
        expected = (responses[rows] - np.nanmean(responses[rows], 0)) / np.nanstd(responses[rows], 0).clip(1e-300)
        np.testing.assert_allclose(scored[rows][:, :2], expected[:, :2], rtol=1e-10)
    assert np.isnan(scored[10:20, 2]).all()
    assert np.isnan(scored[3, 1])


def test_sessions_may_be_added_block_by_block():
    rng = np.random.default_rng(0)
    responses, session = rng.normal(1000, 2, (40, 3)), rng.integers(0, 2, 40)
    at_once, blocks = SessionScale(2, 3), SessionScale(2, 3)
    at_once.add(responses, session)
    for start in range(0, 40, 7):
        blocks.add(responses[start : start + 7], session[start : start + 7])
    np.testing.assert_allclose(blocks.mean, at_once.mean, rtol=1e-12)
    np.testing.assert_allclose(blocks.std, at_once.std, rtol=1e-10)
