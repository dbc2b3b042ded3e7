"""What the recordings of a report can decide: studies of its models, of each recording and of several joined."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from train.evaluation.power.influence import PlannedMetric
from train.evaluation.power.learning import LearningCurve, fit_learning_curve
from train.evaluation.power.planning import LEAST_STIMULI
from train.evaluation.power.study import JoinedStudies, Study
from train.reporting.groups import R2, Group
from train.reporting.power.recorded_trials import RecordedTrials
from train.reporting.reported_run import ReportedRun, ScoredRun

JOINED = "joined"


@dataclass(frozen=True)
class LearningRun:
    """A run's place on the learning curve of its system.

    Attributes:
        curve: of the system.
        stimuli: that the run was trained on.
    """

    curve: LearningCurve
    stimuli: int

    def gain(self, stimuli: float) -> float:
        """What the score would gain with another number of training stimuli."""
        return self.curve.at(stimuli) - self.curve.at(self.stimuli)


def pairs_of(models: int) -> int:
    """The number of pairs of models; 1 of a single one."""
    return max(models * (models - 1) // 2, 1)


class GroupPower:
    """The models of a group that can be planned from, and studies of them.

    Args:
        group: runs that were scored on the same stimuli and sites.
        recorded: the trials of these.
        metric: that is planned.
    """

    def __init__(self, group: Group, recorded: RecordedTrials, metric: PlannedMetric):
        self.group, self.recorded, self.metric = group, recorded, metric
        self._studies: dict[tuple[int, ...], Study | None] = {}

    @cached_property
    def models(self) -> list[int]:
        """The indices of the runs with predictions, the best by the metric first.

        Of a system that was trained on several numbers of stimuli, only the runs on most of them.
        """
        scores: dict[int, float] = {}
        for index, (scored, paired) in enumerate(zip(self.group.runs, self.group.is_paired, strict=True)):
            score = scored.regression.score(self.metric.key)
            if not paired or score is None or score.mean is None or self._is_part(scored):
                continue
            if self.study(index) is not None:
                scores[index] = score.mean
        return sorted(scores, key=lambda index: -scores[index])

    @property
    def best(self) -> list[int]:
        """The two best of `models`, or the only one that can be studied."""
        return self.models[:2] if self.study(*self.models[:2]) is not None else self.models[:1]

    def _is_part(self, scored: ScoredRun) -> bool:
        """Whether another run of its system was trained on more stimuli."""
        return any(scored in point.runs for curve in self.group.curves for point in curve.points[:-1])

    @property
    def comparisons(self) -> int:
        """The number of pairs of models; 1 of a single one."""
        return pairs_of(len(self.models))

    @property
    def left_out(self) -> list[str]:
        """The titles of runs that have scores, but no predictions to plan from."""
        parts = (self._is_part(scored) for scored in self.group.runs)
        return [
            scored.run.title
            for index, (scored, is_part) in enumerate(zip(self.group.runs, parts, strict=True))
            if index not in self.models and not is_part
        ]

    def run(self, index: int) -> ReportedRun:
        """A run by its index."""
        return self.group.runs[index].run

    def study(self, *indices: int) -> Study | None:
        """Of a run's score, or of that of the first of two less that of the second; None where nothing is scored."""
        if indices not in self._studies:
            self._studies[indices] = self._new_study([self.group.runs[index] for index in indices])
        return self._studies[indices]

    def _new_study(self, runs: Sequence[ScoredRun]) -> Study | None:
        predictions = [scored.run.predictions for scored in runs]
        known = [scored for scored in predictions if scored is not None]
        arrays = [array for scored in known for array in (scored.prediction, scored.response)]
        if len(known) < len(runs) or any(np.isinf(array).any() for array in arrays):
            return None
        first = known[0]
        if len(first.response) < LEAST_STIMULI:
            return None
        try:
            return Study(
                first.response,
                [scored.prediction for scored in known],
                self.metric,
                self.recorded.trials,
                first.stimulus_ids,
            )
        except ValueError:
            return None

    def learning(self, index: int) -> LearningRun | None:
        """A run's place on its system's learning curve; None where that is not known, and for metrics but R2."""
        scored = self.group.runs[index]
        stimuli = scored.metrics.training_stimuli
        if self.metric.key != R2.key or stimuli is None:
            return None
        for curve in self.group.curves:
            if any(scored in point.runs for point in curve.points):
                fitted = fit_learning_curve(
                    [point.stimuli for point in curve.points], [point.mean for point in curve.points]
                )
                return None if fitted is None else LearningRun(fitted, stimuli)
        return None

    def share(self, indices: Sequence[int]) -> float | None:
        """The share of the stimuli that were scored, of those trained on and scored; None where it is not known."""
        trained = [self.group.runs[index].metrics.training_stimuli for index in indices]
        known = [stimuli for stimuli in trained if stimuli is not None]
        if not known or len(known) < len(trained):
            return None
        return self.group.stimuli / (self.group.stimuli + max(known))


@dataclass(frozen=True)
class JoinedPower:
    """Models that were scored on several recordings.

    Attributes:
        groups: of the recordings.
        best: of each group, the indices of the two best by the mean over recordings, or of the only one.
        study: of their difference, or of the score.
        comparisons: the number of pairs of models that were scored on all; 1 of a single one.
    """

    groups: list[GroupPower]
    best: list[list[int]]
    study: JoinedStudies
    comparisons: int

    @property
    def runs(self) -> list[Path]:
        """The folders of the best."""
        return [self.groups[0].run(index).path.resolve() for index in self.best[0]]

    @property
    def titles(self) -> list[str]:
        """Of the best, without a recording, from the one where a run has most to beware of: seen images, say."""
        of_groups = [[power.run(index) for index in best] for power, best in zip(self.groups, self.best, strict=True)]
        return [
            max((run.title.replace(f": {run.recording}", "", 1) for run in of_model), key=len)
            for of_model in zip(*of_groups, strict=True)
        ]

    @property
    def title(self) -> str:
        """The recordings."""
        return " + ".join(power.group.recording for power in self.groups)


def join(groups: Sequence[GroupPower]) -> JoinedPower | None:
    """The two best of the models that were scored on all recordings, or the only one; None where there is none.

    A run on several recordings is in the group of each.
    """
    if len(groups) < 2 or len({power.group.recording for power in groups}) < len(groups):
        return None
    indices = [{power.run(index).path.resolve(): index for index in power.models} for power in groups]
    shared = [path for path in indices[0] if all(path in others for others in indices)]
    if not shared:
        return None

    def mean_score(path: Path) -> float:
        studies = [power.study(by_path[path]) for power, by_path in zip(groups, indices, strict=True)]
        return sum(study.components().value for study in studies if study is not None) / len(groups)

    paths = sorted(shared, key=mean_score, reverse=True)[:2]
    best = [[by_path[path] for path in paths] for by_path in indices]
    studies = [power.study(*of_group) for power, of_group in zip(groups, best, strict=True)]
    known = [study for study in studies if study is not None]
    if len(known) < len(studies):
        return None
    return JoinedPower(list(groups), best, JoinedStudies(known), pairs_of(len(shared)))
