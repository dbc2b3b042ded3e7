"""A score, or the difference between two, as measured on a recording: what other designs would show of it."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from train.evaluation.power.components import Components, Design, joined
from train.evaluation.power.influence import CentredPredictions, PlannedMetric, ScoreMoments, scored_sites
from train.evaluation.power.trials import Trials


class Study:
    """The predictions of one model for a recording, or those of two whose scores are subtracted.

    Args:
        response: float (stimuli, sites), NaN = not recorded.
        predictions: of one model, or of two: the first less the second.
        metric: by which they are scored.
        trials: of the responses; None where there are none.
        stimulus_ids: of the rows.

    Raises:
        ValueError: fewer than two stimuli, or no site with a score.
    """

    def __init__(
        self,
        response: np.ndarray,
        predictions: Sequence[np.ndarray],
        metric: PlannedMetric,
        trials: Trials | None = None,
        stimulus_ids: Sequence[str] | None = None,
    ):
        sites = np.all([scored_sites(metric, prediction, response) for prediction in predictions], axis=0)
        if len(response) < 2 or not sites.any():
            raise ValueError("nothing to plan from: fewer than two stimuli, or no site has a score")
        self.metric, self.stimulus_ids = metric, stimulus_ids
        self._models = [CentredPredictions.of(prediction[:, sites], response[:, sites]) for prediction in predictions]
        self._signs = (1.0, -1.0)[: len(predictions)]
        self._trials, self._sites = trials, sites
        self._known: dict[float | None, Components] = {}

    @property
    def stimuli(self) -> int:
        """The number of stimuli that were scored."""
        return len(self._models[0].response)

    @property
    def sites(self) -> int:
        """The number of sites that were scored."""
        return int(self._sites.sum())

    @property
    def repetitions(self) -> float | None:
        """The number of repetitions, the harmonic mean over stimuli; None without trials."""
        return None if self._trials is None else self._trials.repetitions

    @property
    def design(self) -> Design:
        """The design that it was measured with."""
        return Design(self.stimuli, self.sites)

    def components(self, repetitions: float | None = None) -> Components:
        """The variance components with a number of repetitions; None: with those that were recorded.

        Raises:
            ValueError: a number is given, but there are no trials.
        """
        if repetitions is not None and self._trials is None:
            raise ValueError("without trials, nothing is known of other numbers of repetitions")
        if repetitions not in self._known:
            self._known[repetitions] = self._components(repetitions)
        return self._known[repetitions]

    def influence(self, repetitions: float | None) -> np.ndarray:
        """Of each stimulus on the mean over sites with a number of repetitions, less its mean: float64 (stimuli,).

        With the noise of the trials that were recorded.
        """
        return self._weighted(self._influence(self._moments(repetitions), self._models[0].response)).mean(axis=1)

    def shrinkage(self, repetitions: float | None) -> float:
        """How a difference that is the same at every site changes with the number of repetitions."""
        measured, planned = self._models[0].moments.response, self._moments(repetitions)[0].response
        return float(np.mean((measured / planned) ** self.metric.noise_power))

    def _moments(self, repetitions: float | None) -> list[ScoreMoments]:
        """Of each model, as expected with a number of repetitions."""
        measured = [model.moments for model in self._models]
        if self._trials is None or repetitions is None:
            return measured
        added = self._trials.added_noise(repetitions)[self._sites]
        return [moments.with_noise(added) for moments in measured]

    def _influence(self, moments: Sequence[ScoreMoments], dy: np.ndarray, rows: slice = slice(None)) -> np.ndarray:
        """psi up to a constant for each site: float64 (stimuli, sites)."""
        parts = zip(self._signs, self._models, moments, strict=True)
        return np.sum([sign * model.influence(self.metric, known, dy, rows) for sign, model, known in parts], axis=0)

    def _weighted(self, influence: np.ndarray, rows: slice = slice(None)) -> np.ndarray:
        """psi less its mean; 0 where nothing was recorded, and the larger elsewhere, so that it averages right."""
        recorded = self._models[0].recorded[rows]
        share = recorded.mean(axis=0)
        present = np.where(recorded, influence, 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            centred = np.where(recorded, influence - present.mean(axis=0) / share, 0) / share
        return np.nan_to_num(centred)

    def _components(self, repetitions: float | None) -> Components:
        moments, recorded = self._moments(repetitions), self._models[0].response
        variances = _variances(self._weighted(self._influence(moments, recorded)))
        if self._trials is not None and repetitions is not None:
            variances = variances * self._trials.ratios(lambda values: self._variances_of(values, moments), repetitions)
        scores = [self.metric.score(known) for known in moments]
        per_site = scores[0] - scores[1] if len(scores) > 1 else scores[0]
        components = Components.of(per_site, float(variances[0]), float(variances[1]), self.stimuli)
        return replace(components, bias=self._bias)

    @cached_property
    def _bias(self) -> float:
        """How far the value lies from that over endless stimuli, on average, because they are so few."""
        parts = zip(self._signs, self._models, strict=True)
        return float(np.sum([sign * model.bias(self.metric).mean() for sign, model in parts]))

    def _variances_of(self, average: np.ndarray, moments: Sequence[ScoreMoments]) -> np.ndarray:
        """`_variances` with averages over some of the trials in place of the responses."""
        assert self._trials is not None
        model, rows = self._models[0], self._trials.rows
        dy = average[:, self._sites] - model.response_mean
        dy = np.where(np.isnan(dy), model.response[rows], dy)
        return _variances(self._weighted(self._influence(moments, dy, rows), rows))


def _variances(influence: np.ndarray) -> np.ndarray:
    """Over stimuli: that of the influence on the mean over sites, and the mean over sites of that on one: (2,)."""
    return np.array([influence.mean(axis=1).var(ddof=1), influence.var(axis=0, ddof=1).mean()])


class JoinedStudies:
    """The same models on several recordings: the mean over these of what each shows.

    A design has its stimuli, sites and repetitions in each of the recordings. Stimuli that several recordings share
    count as such: what makes one hard for a model in all of them does not average out.

    Args:
        studies: of the recordings, at least two.
    """

    def __init__(self, studies: Sequence[Study]):
        self.studies = list(studies)
        self._known: dict[float | None, Components] = {}

    @property
    def design(self) -> Design:
        """The harmonic means over recordings of their stimuli and sites."""
        inverse_stimuli = np.mean([1 / study.stimuli for study in self.studies])
        inverse_sites = np.mean([1 / study.sites for study in self.studies])
        return Design(round(1 / inverse_stimuli), round(1 / inverse_sites))

    @property
    def repetitions(self) -> float | None:
        """The harmonic mean over recordings; None if one of them has no trials."""
        known = [study.repetitions for study in self.studies if study.repetitions is not None]
        return 1 / float(np.mean([1 / count for count in known])) if len(known) == len(self.studies) else None

    def components(self, repetitions: float | None = None) -> Components:
        """See `Study.components`."""
        if repetitions not in self._known:
            parts = [study.components(repetitions) for study in self.studies]
            pairs = itertools.combinations(self.studies, 2)
            shared = 2 * sum(_shared_covariance(one, other, repetitions) for one, other in pairs)
            self._known[repetitions] = joined(parts, shared)
        return self._known[repetitions]

    def shrinkage(self, repetitions: float | None) -> float:
        """See `Study.shrinkage`."""
        return float(np.mean([study.shrinkage(repetitions) for study in self.studies]))


def _shared_covariance(one: Study, other: Study, repetitions: float | None) -> float:
    """The covariance over shared stimuli of the influences on two means, times the share of stimuli that are shared.

    The noise of different recordings does not covary, so that of the recorded trials does not matter.
    """
    if one.stimulus_ids is None or other.stimulus_ids is None:
        return 0.0
    row_of = {stimulus: row for row, stimulus in enumerate(other.stimulus_ids)}
    pairs = [(row, row_of[stimulus]) for row, stimulus in enumerate(one.stimulus_ids) if stimulus in row_of]
    if not pairs:
        return 0.0
    rows, other_rows = np.array(pairs).T
    products = one.influence(repetitions)[rows] * other.influence(repetitions)[other_rows]
    return float(products.sum() / np.sqrt(one.stimuli * other.stimuli))
