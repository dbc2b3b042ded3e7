"""Predicted variances of scores and differences agree with closed forms, and with what other designs really show."""

from dataclasses import replace

import numpy as np
import pytest
from site_scores import scores

from train.evaluation.power.components import POPULATIONS, Components, Design
from train.evaluation.power.influence import PLANNED, CentredPredictions
from train.evaluation.power.planning import power
from train.evaluation.power.study import JoinedStudies, Study
from train.evaluation.power.trials import Trials

SITES = 12
MIX = np.random.default_rng(3).normal(size=(4, SITES)) / 2


class Brain:
    """Sites that mix four features of the stimuli; trial noise is partly shared by all sites.

    Models know the features to some degree, and err on their own.
    """

    def __init__(self, noise=1.5, shares=(0.8, 0.6)):
        self.noise, self.shares = noise, shares

    def draw(self, rng, stimuli, repetitions):
        """Trials, and the predictions of each model."""
        features = rng.normal(size=(stimuli, 4))
        signal = features @ MIX
        shared = rng.normal(size=(stimuli, repetitions, 1))
        own = rng.normal(size=(stimuli, repetitions, SITES))
        trials = signal[:, None] + self.noise * (np.sqrt(0.3) * shared + np.sqrt(0.7) * own)
        models = [share * signal + 0.4 * rng.normal(size=(stimuli, 4)) @ MIX for share in self.shares]
        return trials, models


def spread(brain, metric, stimuli, repetitions, draws=200):
    """The standard deviations, over draws of stimuli and trials, of the first model's score and of the lead."""
    rng, means = np.random.default_rng(stimuli + repetitions), []
    for _ in range(draws):
        trials, models = brain.draw(rng, stimuli, repetitions)
        average = trials.mean(axis=1)
        means.append([scores(model, average)[metric].mean() for model in models])
    first, second = np.transpose(means)
    return {"score": first.std(), "lead": (first - second).std()}


@pytest.mark.parametrize("metric", PLANNED)
def test_the_influence_is_the_derivative_of_the_score(metric):
    """In the weight of a stimulus."""
    trials, (model, _) = Brain().draw(np.random.default_rng(0), 40, 3)
    response, planned = trials.mean(axis=1), PLANNED[metric]
    centred = CentredPredictions.of(model, response)
    psi = centred.influence(planned, centred.moments, centred.response, slice(None))
    psi -= psi.mean(axis=0)
    np.testing.assert_allclose(planned.score(centred.moments), scores(model, response)[metric])
    copies = 2000  # of all stimuli, against which one more is an infinitesimal weight
    for row in (0, 7):
        repeated = [
            np.concatenate([np.tile(values, (copies, 1)), values[row : row + 1]]) for values in (model, response)
        ]
        derivative = (scores(*repeated)[metric] - scores(model, response)[metric]) * (40 * copies + 1)
        np.testing.assert_allclose(derivative, psi[row], rtol=0.02, atol=2e-3)


def test_the_bias_is_that_of_the_jackknife():
    trials, (model, _) = Brain().draw(np.random.default_rng(0), 30, 3)
    response = trials.mean(axis=1)
    response[:5, 0] = np.nan
    for metric in PLANNED:
        whole = scores(model, response)[metric]
        each = np.array([scores(np.delete(model, k, 0), np.delete(response, k, 0))[metric] for k in range(30)])
        expected = 29 * (each.mean(axis=0) - whole)
        found = CentredPredictions.of(model, response).bias(PLANNED[metric])
        np.testing.assert_allclose(found[1:], expected[1:], rtol=1e-6, atol=1e-9)
        few = each[5:, 0]  # the others change nothing at the first site
        assert found[0] == pytest.approx(24 * (few.mean() - whole[0]))


@pytest.mark.parametrize("metric", ["r2", "pearson_r"])
def test_a_study_foretells_the_spread_with_other_numbers_of_stimuli_and_repetitions(metric):
    """From one study of 1,200 stimuli with 6 repetitions."""
    brain = Brain()
    trials, models = brain.draw(np.random.default_rng(0), 1200, 6)
    known = Trials.of(trials)
    for stimuli, repetitions in ((150, 2), (150, 6), (150, 24)):
        design, seen = Design(stimuli, SITES), spread(brain, metric, stimuli, repetitions)
        for name, predictions in (("score", models[:1]), ("lead", models)):
            components = Study(trials.mean(axis=1), predictions, PLANNED[metric], known).components(repetitions)
            error = components.standard_error(design, "stimuli")
            assert error == pytest.approx(seen[name], rel=0.15), (name, repetitions)


def test_the_score_with_other_numbers_of_repetitions_is_foretold():
    trials, models = Brain().draw(np.random.default_rng(2), 4000, 8)
    study = Study(trials[:, :4].mean(axis=1), models[:1], PLANNED["r2"], Trials.of(trials[:, :4]))
    for repetitions in (2, 8):
        seen = scores(models[0], trials[:, :repetitions].mean(axis=1))["r2"].mean()
        assert study.components(repetitions).value == pytest.approx(seen, abs=0.01)
    difference = Study(trials[:, :4].mean(axis=1), models, PLANNED["r2"], Trials.of(trials[:, :4]))
    shrunk = difference.components(2).value / difference.components(4).value
    assert difference.shrinkage(2) / difference.shrinkage(4) == pytest.approx(shrunk, rel=0.1)


def test_nothing_changes_at_the_number_of_repetitions_that_was_recorded():
    trials, models = Brain().draw(np.random.default_rng(4), 100, 4)
    study = Study(trials.mean(axis=1), models, PLANNED["r2"], Trials.of(trials))
    assert study.repetitions == pytest.approx(4)
    for name, value in vars(study.components()).items():
        assert vars(study.components(4))[name] == pytest.approx(value), name


def test_missing_trials_and_responses_are_left_out():
    rng = np.random.default_rng(5)
    trials, models = Brain().draw(rng, 500, 6)
    whole = Study(trials.mean(axis=1), models, PLANNED["r2"], Trials.of(trials))
    trials[rng.random(500) < 0.5, 4:] = np.nan
    gone = rng.random((500, SITES)) < 0.2
    trials = np.where(gone[:, None], np.nan, trials)
    response = np.where(gone, np.nan, np.nanmean(np.where(gone[:, None], 0, trials), axis=1))
    study = Study(response, models, PLANNED["r2"], Trials.of(trials))
    assert study.repetitions == pytest.approx(1 / np.mean([1 / 4, 1 / 6]), rel=0.05)
    design = Design(500, SITES)
    error = {part: part.components(3).standard_error(design, "stimuli") for part in (whole, study)}
    assert error[study] == pytest.approx(error[whole] * np.sqrt(1 / 0.9), rel=0.15)


def test_without_trials_other_numbers_of_repetitions_are_refused():
    trials, models = Brain().draw(np.random.default_rng(6), 50, 2)
    study = Study(trials.mean(axis=1), models, PLANNED["r2"])
    assert study.repetitions is None
    with pytest.raises(ValueError, match="without trials"):
        study.components(3)
    assert Trials.of(trials[:, :1]) is None


# ------------------------------------------------------------------------------------------------ crossed effects


def crossed(rng, stimuli, sites, stimulus=0.4, site=0.2, rest=1.0):
    """Scores around 0.3 with these variance components: (stimuli, sites)."""
    effects = np.sqrt(stimulus) * rng.normal(size=(stimuli, 1)) + np.sqrt(site) * rng.normal(size=sites)
    return 0.3 + effects + np.sqrt(rest) * rng.normal(size=(stimuli, sites))


def components_of(values):
    psi = values - values.mean(axis=0)
    mean_influence, site_influence = psi.mean(axis=1).var(ddof=1), psi.var(axis=0, ddof=1).mean()
    return Components.of(values.mean(axis=0), mean_influence, site_influence, len(values))


def test_variance_components_are_unbiased():
    rng = np.random.default_rng(0)
    found = [components_of(crossed(rng, 40, 20)) for _ in range(300)]
    for name, truth in (("value", 0.3), ("stimulus", 0.4), ("site", 0.2), ("rest", 1.0)):
        values = np.array([getattr(one, name) for one in found])
        assert abs(values.mean() - truth) < 4 * values.std() / np.sqrt(len(values)), name


@pytest.mark.parametrize("population", POPULATIONS)
def test_an_interval_holds_for_the_population_that_it_speaks_of(population):
    """Stimuli, sites or both are drawn again and again; the truth is the mean over endless ones of these."""
    rng, design, held, draws = np.random.default_rng(1), Design(40, 15), 0, 600
    for _ in range(draws):
        stimulus, site = np.sqrt(0.4) * rng.normal(size=(40, 1)), np.sqrt(0.2) * rng.normal(size=15)
        values = 0.3 + stimulus + site + rng.normal(size=(40, 15))
        # Endless stimuli leave the effects of these sites, and the other way round.
        truth = 0.3 + {"stimuli": site.mean(), "sites": stimulus.mean(), "both": 0}[population]
        low, high = components_of(values).interval(design, population)
        held += low <= truth <= high
    assert abs(held / draws - 0.95) < 3 * np.sqrt(0.95 * 0.05 / draws)


def test_more_sites_do_not_help_where_they_share_what_makes_stimuli_hard():
    components = Components(value=0.1, stimulus=0.4, site=0.2, rest=1.0)
    few, many = Design(100, 10), Design(100, 10**6)
    assert components.variance(few, "stimuli") == pytest.approx(0.4 / 100 + 1 / 1000)
    assert components.variance(few, "sites") == pytest.approx(0.2 / 10 + 1 / 1000)
    assert components.variance(few, "both") == pytest.approx(0.4 / 100 + 0.2 / 10 + 1 / 1000)
    assert components.variance(many, "both") == pytest.approx(0.4 / 100, rel=0.01)
    assert components.half_width(replace(few, stimuli=1), "stimuli") == np.inf
    assert components.half_width(replace(few, sites=1), "both") == np.inf


def test_one_site_tells_nothing_of_others():
    alone = components_of(crossed(np.random.default_rng(2), 50, 1))
    design = Design(50, 20)
    assert alone.half_width(Design(50, 1), "stimuli") == pytest.approx(2.0096 * np.sqrt(alone.stimulus / 50), rel=1e-3)
    assert alone.half_width(design, "sites") == alone.half_width(design, "both") == np.inf
    assert power(1.0, alone.standard_error(design, "both"), alone.freedom(design, "both"), 0.95) == 0


# ----------------------------------------------------------------------------------------------------- recordings


def test_two_recordings_of_the_same_stimuli_count_as_one_with_the_sites_of_both():
    trials, models = Brain().draw(np.random.default_rng(7), 200, 2)
    response, ids = trials.mean(axis=1), [f"s{k}" for k in range(200)]
    halves = [slice(0, 6), slice(6, 12)]
    parts = [
        Study(response[:, half], [model[:, half] for model in models], PLANNED["r2"], stimulus_ids=ids)
        for half in halves
    ]
    whole = Study(response, models, PLANNED["r2"]).components()
    joined = JoinedStudies(parts)
    assert joined.design == Design(200, 6)
    assert joined.components().value == pytest.approx(whole.value)
    error = joined.components().standard_error(joined.design, "stimuli")
    assert error == pytest.approx(whole.standard_error(Design(200, 12), "stimuli"), rel=0.01)


def test_stimuli_that_recordings_share_count_with_as_few_repetitions_as_are_planned():
    """What two recordings of 8 repetitions foretell for 1 is what their first trials show."""
    rng, ids = np.random.default_rng(10), [f"s{k}" for k in range(3000)]
    signal, models = Brain(noise=0).draw(rng, 3000, 8)
    parts = [signal + 1.5 * rng.normal(size=signal.shape) for _ in range(2)]

    def joined(repetitions):
        taken = [part[:, :repetitions] for part in parts]
        return JoinedStudies(
            [Study(part.mean(axis=1), models, PLANNED["r2"], Trials.of(part), stimulus_ids=ids) for part in taken]
        )

    foretold, seen = joined(8).components(1), joined(1).components()
    assert foretold.stimulus == pytest.approx(seen.stimulus, rel=0.1)


def test_recordings_of_other_stimuli_are_independent():
    studies = []
    for seed in (8, 9):
        trials, models = Brain().draw(np.random.default_rng(seed), 200, 2)
        ids = [f"{seed}_{k}" for k in range(200)]
        studies.append(Study(trials.mean(axis=1), models, PLANNED["r2"], stimulus_ids=ids))
    joined, design = JoinedStudies(studies), Design(200, SITES)
    parts = [study.components().variance(design, "both") for study in studies]
    assert joined.components().variance(design, "both") == pytest.approx(sum(parts) / 4)
    assert joined.repetitions is None
