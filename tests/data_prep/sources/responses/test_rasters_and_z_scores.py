"""The source `folder` with rasters instead of rates, baselines, and z-scores within sessions."""

import numpy as np
import pytest
from make_sources import make_folder

from data_prep.common.errors import BadInput
from data_prep.recording import trial_average
from data_prep.shards.packing import pack
from data_prep.sources.folder import Folder


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


def z_scored_within(sessions, trials):
    """Trials (stimuli, repetitions, sites) as z-scores of each session; `sessions` is (stimuli, repetitions)."""
    scored = np.empty(trials.shape)
    for session in np.unique(sessions):
        shown = sessions == session
        scored[shown] = (trials[shown] - np.nanmean(trials[shown], axis=0)) / np.nanstd(trials[shown], axis=0)
    return scored


def test_trials_are_z_scored_within_the_sessions_of_a_column(tmp_path):
    written = make_folder(tmp_path, n=20, sites=3, rates=None, trials=3)
    recording = Folder(source=tmp_path, z_score=True, sessions="session").open()
    expected = z_scored_within(np.repeat(np.arange(20) // 5, 3).reshape(20, 3), written.trials)
    for i, stimulus in enumerate(recording.read(range(20))):
        np.testing.assert_allclose(stimulus.trials, expected[i], rtol=1e-4, atol=1e-5)
    assert recording.units == "z-score within sessions"
    assert recording.provenance["z_scored_within"] == "session"


def test_sessions_may_be_given_for_every_presentation(tmp_path):
    written = make_folder(tmp_path, n=20, sites=3, rates=None, trials=3)
    sessions = np.random.default_rng(1).integers(4, 7, (20, 3))
    np.save(tmp_path / "sessions.npy", sessions)
    recording = Folder(source=tmp_path, z_score=True, sessions="sessions.npy").open()
    expected = z_scored_within(sessions, written.trials)
    packed_trials = np.stack([stimulus.trials for stimulus in recording.read(range(20))])
    np.testing.assert_allclose(packed_trials, expected, rtol=1e-4, atol=1e-5)


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
