"""Spikes to responses: counts, rates, baselines and z-scores."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_sources import make_folder

from data_prep.common.errors import BadInput
from data_prep.recording import trial_average
from data_prep.shards.packing import pack
from data_prep.sources.folder import Folder
from data_prep.spikes import SessionScale, per_second, raster_counts, spike_counts, z_score_within


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
    sessions = np.repeat(["a", "b", "c"], 10)
    scored = z_score_within(responses, sessions)
    for name in "abc":
        rows = sessions == name
        expected = (responses[rows] - np.nanmean(responses[rows], 0)) / np.nanstd(responses[rows], 0).clip(1e-300)
        np.testing.assert_allclose(scored[rows][:, :2], expected[:, :2], rtol=1e-10)
    assert np.isnan(scored[10:20, 2]).all()
    assert np.isnan(scored[3, 1])


def test_sessions_may_be_taken_in_block_by_block():
    rng = np.random.default_rng(0)
    responses, session = rng.normal(1000, 2, (40, 3)), rng.integers(0, 2, 40)
    whole, parts = SessionScale(2, 3), SessionScale(2, 3)
    whole.add(responses, session)
    for start in range(0, 40, 7):
        parts.add(responses[start : start + 7], session[start : start + 7])
    np.testing.assert_allclose(parts.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(parts.std, whole.std, rtol=1e-10)


# ---- the source `folder` -------------------------------------------------------------------------------------------


@pytest.fixture
def rasters(tmp_path):
    """A folder with rasters instead of rates: 20 stimuli, 4 repetitions, 3 sites, 300 ms from 50 ms before onset."""
    make_folder(tmp_path / "src", n=20, sites=3, rates=None, trials=2)
    (tmp_path / "src" / "trials.npy").unlink()
    array = (np.random.default_rng(0).uniform(size=(20, 4, 3, 300)) < 0.1).astype(np.int8)
    array[::3, 3] = -1
    np.save(tmp_path / "src" / "rasters.npy", array)
    return tmp_path / "src", array


def expected_trials(array, first, last):
    counts = array[..., first:last].sum(-1) / ((last - first) / 1000)
    return np.where(array[..., 0] < 0, np.nan, counts)


def test_rasters_become_trials_in_spikes_per_second(rasters, tmp_path):
    source, array = rasters
    options = {"window_ms": (70, 170), "raster_start_ms": -50}
    folder = pack(Folder(source=source, **options).open(), tmp_path / "out", stimuli_per_shard=50, workers=1)
    assert folder.manifest.rates.units == "spikes/s"
    expected = expected_trials(array, 120, 220)
    for split in map(folder.split, folder.manifest.splits):
        rows = [int(name.removeprefix("stim")) for name in split.stimulus_ids]
        np.testing.assert_allclose(split.trials(), expected[rows], rtol=1e-6)
        np.testing.assert_allclose(split.rates(), trial_average(expected[rows]), rtol=1e-6)


def test_the_baseline_of_each_trial_is_subtracted(rasters):
    source, array = rasters
    options = {"window_ms": (70, 170), "raster_start_ms": -50, "baseline_ms": (-50, 0)}
    recording = Folder(source=source, **options).open()
    expected = expected_trials(array, 120, 220) - expected_trials(array, 0, 50)
    for i, stimulus in enumerate(recording.read(range(20))):
        np.testing.assert_allclose(stimulus.trials, expected[i], rtol=1e-5)
    assert recording.units == "spikes/s above baseline"


def test_trials_are_z_scored_within_the_sessions_of_a_column(tmp_path):
    made = make_folder(tmp_path, n=20, sites=3, rates=None, trials=3)
    recording = Folder(source=tmp_path, z_score=True, sessions="session").open()
    flat = made.trials.reshape(-1, 3)
    expected = z_score_within(flat, np.repeat(np.arange(20) // 5, 3)).reshape(made.trials.shape)
    for i, stimulus in enumerate(recording.read(range(20))):
        np.testing.assert_allclose(stimulus.trials, expected[i], rtol=1e-4, atol=1e-5)
    assert recording.units == "z-score within sessions"
    assert recording.provenance["z_scored_within"] == "session"


def test_sessions_may_be_told_for_every_presentation(tmp_path):
    made = make_folder(tmp_path, n=20, sites=3, rates=None, trials=3)
    sessions = np.random.default_rng(1).integers(4, 7, (20, 3))
    np.save(tmp_path / "sessions.npy", sessions)
    recording = Folder(source=tmp_path, z_score=True, sessions="sessions.npy").open()
    expected = z_score_within(made.trials.reshape(-1, 3), sessions.ravel()).reshape(made.trials.shape)
    found = np.stack([stimulus.trials for stimulus in recording.read(range(20))])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "--window-ms"),
        ({"window_ms": (70, 400)}, "0 to 300 ms"),
        ({"window_ms": (70, 170), "baseline_ms": (-50, 0)}, "--baseline-ms"),
        ({"window_ms": (70, 170), "sessions": "session"}, "without --z-score"),
        ({"window_ms": (70, 170), "z_score": True, "sessions": "day"}, "no column 'day'"),
    ],
)
def test_options_that_do_not_fit_are_refused(rasters, options, words):
    with pytest.raises(BadInput, match=words):
        Folder(source=rasters[0], **options).open()


def test_a_baseline_without_rasters_is_refused(tmp_path):
    make_folder(tmp_path, n=10)
    with pytest.raises(BadInput, match="for rasters"):
        Folder(source=tmp_path, baseline_ms=(-50, 0)).open()
