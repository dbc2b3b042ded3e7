"""Codes for missing responses are warned of, and ordinary responses are not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from make_sources import make_folder

from data_prep.shards.folder import ShardFolder
from data_prep.shards.missing_codes import code_warnings, ends_of, merged_ends
from data_prep.shards.packing import pack
from data_prep.shards.summary import summary
from data_prep.sources.folder import Folder


def warnings_of(responses):
    return list(code_warnings("rates", ends_of(responses)))


def ordinary(kind, rng, stimuli=200, sites=20):
    """Responses of 20 sites, float32, some of them missing."""
    scale = rng.uniform(1, 30, sites)
    responses = {
        "rates": rng.gamma(2, scale, (stimuli, sites)),
        "averages of few trials": rng.poisson(scale / 5, (4, stimuli, sites)).mean(0),
        "counts": rng.poisson(scale / 10, (stimuli, sites)),
        "z-scores": rng.standard_t(4, (stimuli, sites)),
        "above baseline": rng.poisson(4, (stimuli, sites)) - rng.poisson(4, (stimuli, sites)),
    }[kind].astype(np.float32)
    responses[rng.random(responses.shape) < 0.05] = np.nan
    return responses


KINDS = ("rates", "averages of few trials", "counts", "z-scores", "above baseline")


@pytest.mark.parametrize("kind", KINDS)
def test_ordinary_responses_raise_no_alarm(kind):
    rng = np.random.default_rng(0)
    assert not [warning for _ in range(50) for warning in warnings_of(ordinary(kind, rng))]
    assert not [warning for _ in range(50) for warning in warnings_of(ordinary(kind, rng, 40, 3))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("code", [-999, 9999, -1e30, 1e20])
def test_a_code_that_repeats_is_found(kind, code):
    responses = ordinary(kind, np.random.default_rng(1))
    responses.flat[[5, 1700]] = code
    (warning,) = warnings_of(responses)
    assert f"{np.float32(code):g} occurs 2 times among the rates" in warning
    assert "NaN" in warning


def test_a_usual_code_is_found_even_where_it_occurs_once():
    responses = ordinary("rates", np.random.default_rng(2))
    responses[7, 3] = -9999
    assert "-9999 occurs once" in warnings_of(responses)[0]
    responses[7, 3] = 1234  # one strange response is for the user to judge
    assert warnings_of(responses) == []


def test_minus_one_among_rates_is_found_and_among_differences_it_is_none():
    responses = ordinary("rates", np.random.default_rng(3))
    responses[:5, 3] = -1
    assert "-1 occurs 5 times" in warnings_of(responses)[0]
    assert warnings_of(np.where(np.isnan(responses), 0, responses) - 4) == []


def test_two_codes_are_both_found():
    responses = ordinary("rates", np.random.default_rng(4))
    responses[:4, 0], responses[:6, 1] = -999, 9999
    assert len(warnings_of(responses)) == 2


@given(st.lists(st.lists(st.integers(-3, 6), max_size=8), min_size=1, max_size=5))
def test_notes_of_parts_merge_to_those_of_all(parts):
    arrays = [np.array(part, np.float32) for part in parts]
    assert merged_ends(map(ends_of, arrays)) == ends_of(np.concatenate(arrays))


def test_packing_warns_of_codes_in_rates_and_in_trials(tmp_path):
    """The mean of trials hides a code, so the trials themselves are looked at."""
    make_folder(tmp_path / "src", n=24, splits=True)
    rates = np.load(tmp_path / "src" / "rates.npy")
    for name, values in (("rates", rates), ("trials", np.repeat(rates[:, None], 3, axis=1))):
        source = tmp_path / name
        (tmp_path / "src" / "rates.npy").unlink(missing_ok=True)
        (tmp_path / "src" / "trials.npy").unlink(missing_ok=True)
        values = values.copy()
        values.flat[[2, 50]] = -999
        np.save(tmp_path / "src" / f"{name}.npy", values)
        axes = {"trial_axes": "repetitions-sites"} if name == "trials" else {}
        folder = pack(Folder(source=tmp_path / "src", **axes).open(), source, 7, 1)
        assert f"-999 occurs 2 times among the {name}" in summary(folder)
        assert "-999" in " ".join(ShardFolder(source).manifest.provenance["warnings"])
