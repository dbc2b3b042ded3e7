"""The simulated recording is the same on every machine and matches its own description."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from data_prep.common.errors import BadInput
from data_prep.recording import trial_average
from data_prep.sources.simulated import Simulated
from data_prep.sources.simulation import population
from data_prep.sources.simulation.drawing import Pose, draw_scene
from data_prep.sources.simulation.objects import CATEGORIES, make_body
from data_prep.sources.simulation.population import draw_trials, true_reliability

SMALL = {"stimuli": 128, "sites": 12, "image_size": 48}


@pytest.fixture(scope="module")
def recording():
    return Simulated(**SMALL).open()


@pytest.fixture(scope="module")
def stimuli(recording):
    return list(recording.read(range(128)))


def same(one, other) -> bool:
    arrays = ("rates", "trials", "truth")
    equal = all(np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays)
    return equal and (one.id, one.image, one.meta) == (other.id, other.image, other.meta)


def test_says_that_it_is_simulated(recording):
    assert recording.simulated is True
    assert "simulated" in recording.name
    assert "simulated" in recording.provenance["source"]
    assert "simulated" in recording.units
    assert {site["region"] for site in recording.sites} == {"IT (simulated)"}
    assert len({site["id"] for site in recording.sites}) == 12
    assert len({id(site) for site in recording.sites}) == 12


def test_64_objects_in_8_categories(recording, stimuli):
    assert len(set(recording.objects)) == 64
    assert {stimulus.meta["category"] for stimulus in stimuli} == set(CATEGORIES)
    assert [stimulus.meta["object"] for stimulus in stimuli] == recording.objects
    assert all(recording.objects.count(name) == 2 for name in recording.objects)


def test_neither_reading_order_nor_pickling_matters(stimuli):
    other = pickle.loads(pickle.dumps(Simulated(**SMALL).open()))
    order = np.random.default_rng(0).permutation(128)[:20]
    assert all(same(stimuli[i], stimulus) for i, stimulus in zip(order, other.read(order), strict=True))


def test_a_stimulus_does_not_depend_on_how_many_there_are(stimuli):
    fewer = Simulated(**SMALL | {"stimuli": 64}).open()
    assert all(same(one, other) for one, other in zip(stimuli, fewer.read(range(64)), strict=False))


def test_rates_do_not_depend_on_the_image_size(stimuli):
    larger = next(Simulated(**SMALL | {"stimuli": 64, "image_size": 96}).open().read([5]))
    assert np.array_equal(larger.trials, stimuli[5].trials)
    assert larger.image != stimuli[5].image


def test_another_seed_is_another_recording(stimuli):
    other = next(Simulated(**SMALL | {"stimuli": 64, "seed": 1}).open().read([0]))
    assert other.image != stimuli[0].image
    assert not np.array_equal(other.truth, stimuli[0].truth)
    assert not np.array_equal(other.trials, stimuli[0].trials)


def test_images_are_jpegs_of_the_size_asked_for(stimuli):
    for stimulus in stimuli[:5]:
        with Image.open(io.BytesIO(stimulus.image)) as image:
            assert (image.format, image.size, image.mode) == ("JPEG", (48, 48), "RGB")
            assert np.asarray(image).std() > 10


def test_trials_are_counts_and_average_to_the_rates(stimuli):
    for stimulus in stimuli:
        assert stimulus.trials.shape == (28, 12)
        assert stimulus.trials.dtype == stimulus.rates.dtype == stimulus.truth.dtype == np.float32
        assert np.array_equal(stimulus.rates, trial_average(stimulus.trials))
        assert stimulus.trials.min() >= 0
        assert np.array_equal(stimulus.trials, np.round(stimulus.trials / 10) * 10)  # whole spikes in 0.1 s


def test_trials_are_unbiased_and_as_variable_as_stated():
    rates = np.array([2.0, 10.0, 40.0])
    trials = draw_trials(rates, 40_000, np.random.default_rng(0)).astype(np.float64)
    variance = rates / 0.1 + 0.05 * rates**2
    assert np.all(np.abs(trials.mean(0) - rates) < 5 * np.sqrt(variance / 40_000))
    np.testing.assert_allclose(trials.var(0), variance, rtol=0.05)


def test_true_reliability_agrees_with_the_trials(recording, stimuli):
    truth = np.stack([stimulus.truth for stimulus in stimuli]).astype(np.float64)
    error = np.stack([stimulus.rates for stimulus in stimuli]) - truth
    empirical = truth.var(0) / (truth.var(0) + (error**2).mean(0))
    # The noise variance is estimated from 128 averages: sd of 13 %, so at most 0.032 on a reliability.
    np.testing.assert_allclose(recording.truth["reliability"], empirical, atol=0.12)
    assert abs(np.mean(recording.truth["reliability"]) - empirical.mean()) < 0.03
    assert np.all(np.abs(error.mean(0)) < 5 * np.sqrt((error**2).mean(0) / 128))


def test_true_reliability_bounds_what_the_truth_explains():
    rng = np.random.default_rng(3)
    truth = rng.uniform(2, 30, (4000, 3)).astype(np.float32)
    rates = np.stack([trial_average(draw_trials(row, 8, rng)) for row in truth])
    r2 = np.array([np.corrcoef(truth[:, s], rates[:, s])[0, 1] ** 2 for s in range(3)])
    np.testing.assert_allclose(true_reliability(truth, 8), r2, atol=0.04)


def test_splits_are_81_9_10():
    splits = Simulated(stimuli=200, sites=2).open().splits
    assert [splits.count(name) for name in ("train", "val", "test")] == [162, 18, 20]


def test_the_image_follows_the_pose():
    def drawn_at(x: float, y: float) -> np.ndarray:
        with_object, without = (
            draw_scene(make_body("fruit", 0, 0), Pose(x, y, size, 0, 0, 0), np.random.default_rng(1), 64).astype(int)
            for size in (0.5, 1e-3)
        )
        rows, columns = np.nonzero(np.abs(with_object - without).sum(2) > 40)
        return np.array([columns.mean() / 32 - 1, 1 - rows.mean() / 32])

    np.testing.assert_allclose(drawn_at(0.4, -0.3) - drawn_at(-0.2, 0.2), [0.6, -0.5], atol=0.08)


def test_bad_options_are_refused():
    for bad in (
        {"stimuli": 63},
        {"repetitions": 1},
        {"image_size": 8},
        {"seed": -1},
        {"val_fraction": 1.0},
        {"site": 3},
    ):
        with pytest.raises(ValidationError, match=next(iter(bad))):
            Simulated(**bad)
    with pytest.raises(BadInput, match=r"val_fraction 0\.5 and test_fraction 0\.6"):
        Simulated(val_fraction=0.5, test_fraction=0.6).open()


def test_many_stimuli_are_drawn_by_several_processes(monkeypatch):
    """Their features are those that one process computes."""
    expected = population.features_of_some(3, range(7))
    monkeypatch.setattr(population, "MANY_STIMULI", 5)
    monkeypatch.setattr(population, "PART", 3)
    np.testing.assert_array_equal(population.stimulus_features(3, 7), expected)
