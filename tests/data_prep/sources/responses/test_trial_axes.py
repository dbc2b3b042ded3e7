"""Single trials: sites and repetitions are told apart, or the array is refused."""

import numpy as np
import pytest
from helpers import DATA
from hypothesis import given, settings
from hypothesis import strategies as st
from make_sources import make_folder, write_csv
from recordings import read_all

from data_prep.common.errors import BadInput
from data_prep.sources.folder import Folder
from data_prep.sources.responses.trial_axes import _order_by_numbers


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    stimuli=st.integers(20, 200),
    repetitions=st.integers(1, 8),
    sites=st.integers(1, 40),
    spread=st.sampled_from([0.0, 0.3, 3.0]),
    noise=st.sampled_from([0.3, 1.0, 3.0]),
)
def test_random_trials_are_never_taken_the_wrong_way(seed, stimuli, repetitions, sites, spread, noise):
    rng = np.random.default_rng(seed)
    tuning = rng.normal(size=(stimuli, 5)) @ rng.normal(size=(5, sites)) / np.sqrt(5)
    trials = tuning[:, None] + spread * rng.normal(size=sites) + noise * rng.normal(size=(stimuli, repetitions, sites))
    assert _order_by_numbers(trials) != "sites-repetitions"
    assert _order_by_numbers(trials.swapaxes(1, 2)) != "repetitions-sites"


@pytest.mark.skipif(not (DATA / "v4_hvm640").is_dir(), reason="the real recordings are not here")
def test_the_axes_of_a_real_recording_are_told_apart():
    trials = np.load(DATA / "v4_hvm640" / "trials.npy").astype(np.float64)
    z_scores = (trials - np.nanmean(trials, (0, 1))) / np.nanstd(trials, (0, 1))
    for part in (trials, z_scores, trials[:60, :2], trials[:, :1], z_scores[:, :3], trials[:, :, :3]):
        assert _order_by_numbers(part) == "repetitions-sites"
        assert _order_by_numbers(part.swapaxes(1, 2)) == "sites-repetitions"


@pytest.fixture
def swapped(tmp_path):
    """A folder whose trials are (stimuli, sites, repetitions), 10 sites and 3 repetitions."""
    written = make_folder(tmp_path, n=60, rates=None, trials=3)
    np.save(tmp_path / "trials.npy", written.trials.swapaxes(1, 2))
    return tmp_path, written


def test_sites_before_repetitions_are_refused_until_they_are_said(swapped):
    folder, written = swapped
    with pytest.raises(BadInput, match=r"\(60, 10, 3\) looks like .*--trial-axes sites-repetitions"):
        Folder(source=folder).open()
    write_csv(folder / "sites.csv", {"id": [f"n{k}" for k in range(10)]})
    with pytest.raises(BadInput, match=r"there are 10 sites; .*--trial-axes sites-repetitions"):
        Folder(source=folder).open()
    recording = Folder(source=folder, trial_axes="sites-repetitions").open()
    stimuli = read_all(recording)
    assert [site["id"] for site in recording.sites] == [f"n{k}" for k in range(10)]
    assert np.array_equal(np.stack([s.trials for s in stimuli]), written.trials, equal_nan=True)
    np.testing.assert_allclose(np.stack([s.rates for s in stimuli]), written.rates, rtol=1e-6)


def test_the_rates_tell_the_number_of_sites(swapped):
    folder, written = swapped
    np.save(folder / "rates.npy", written.rates)
    with pytest.raises(BadInput, match="there are 10 sites"):
        Folder(source=folder).open()


def test_numbers_that_do_not_tell_are_refused_until_the_axes_are_said(tmp_path):
    make_folder(tmp_path, n=30, rates=None, trials=3)
    np.save(tmp_path / "trials.npy", np.random.default_rng(0).normal(size=(30, 4, 5)))
    with pytest.raises(BadInput, match=r"do not tell whether the shape \(30, 4, 5\).*--trial-axes"):
        Folder(source=tmp_path).open()
    assert len(Folder(source=tmp_path, trial_axes="repetitions-sites").open().sites) == 5
    assert len(Folder(source=tmp_path, trial_axes="sites-repetitions").open().sites) == 4


def test_the_axes_are_said_of_trials_only(tmp_path):
    make_folder(tmp_path)
    with pytest.raises(BadInput, match="--trial-axes is for trials"):
        Folder(source=tmp_path, trial_axes="repetitions-sites").open()
