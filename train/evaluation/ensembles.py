"""Combines the predictions of several runs and probes into one predictor: their mean, or weights learned per site."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from data_prep.common.errors import BadInput
from data_prep.shards.folder import ShardFolder
from data_prep.shards.image_identity import first_copies
from data_prep.shards.manifest import Manifest
from train.data.bad_samples import BadSamples
from train.data.seen import images_of_split
from train.data.stimuli import RecordingStimuli
from train.evaluation.options import Combine
from train.evaluation.predictions_file import PREDICTIONS_FILE, Predictions, predictions_of
from train.evaluation.seen_stimuli import Seen
from train.regression.stacking import MIN_STIMULI, stack
from train.run.folder import LEFT_OUT, RunFolder
from train.run.recipe import Recipe


@dataclass(frozen=True)
class Member:
    """Runs that differ in seed or fold only, which count as one predictor; or a single probe or ensemble.

    Attributes:
        runs: folders.
        recording: whose responses they predict here.
    """

    runs: tuple[Path, ...]
    recording: str

    def predict(self, split: str, stimulus_ids: Sequence[str]) -> np.ndarray:
        """The mean over its runs, (stimuli, sites)."""
        predictions = [predictions_of(run, split, self.recording).rows(stimulus_ids) for run in self.runs]
        return np.mean(predictions, axis=0)

    @property
    def has_left_out(self) -> bool:
        """Whether each of its runs predicts the training stimuli that it was not fitted on."""
        folders = [RunFolder(run).results_on(LEFT_OUT, self.recording) for run in self.runs]
        return all((folder / PREDICTIONS_FILE).exists() for folder in folders)

    @cached_property
    def left_out(self) -> dict[str, np.ndarray]:
        """By training stimulus, the mean prediction, (sites,), over those of its runs that were not fitted on it."""
        predictions: dict[str, list[np.ndarray]] = {}
        for run in self.runs:
            of_run = predictions_of(run, LEFT_OUT, self.recording)
            for stimulus, rates in zip(of_run.stimulus_ids, of_run.rates, strict=True):
                predictions.setdefault(stimulus, []).append(rates)
        return {stimulus: np.mean(rates, axis=0) for stimulus, rates in predictions.items()}


def group_into_members(runs: Sequence[Path], recipes: Sequence[Recipe | None], recording: str) -> list[Member]:
    """Group runs whose recipes differ in seed or fold only into one member; the order stays.

    Args:
        runs: folders.
        recipes: of fine-tuned runs; None for a probe or an ensemble.
        recording: whose responses they are to predict.
    """
    groups: dict[str, list[Path]] = {}
    for run, recipe in zip(runs, recipes, strict=True):
        key = str(run)
        if recipe is not None:
            settings = recipe.model_dump(
                mode="json", exclude={"seed": True, "trackers": True, "early_stopping": {"fold"}}
            )
            key = json.dumps(settings, sort_keys=True)
        groups.setdefault(key, []).append(run)
    return [Member(tuple(group), recording) for group in groups.values()]


@dataclass(frozen=True)
class EnsemblePredictions:
    """What an ensemble predicts for a recording.

    Attributes:
        rates: of the split's stimuli, in order, float32 (stimuli, sites).
        left_out: of the training stimuli that no member was fitted on; None if a member has no such predictions.
        weights: learned, (members, sites); None for the mean.
        mean: of the responses they were learned on, (sites,); None for the mean.
    """

    rates: np.ndarray
    left_out: Predictions | None
    weights: np.ndarray | None = None
    mean: np.ndarray | None = None


@dataclass(frozen=True)
class ScoredStimuli:
    """The stimuli that an ensemble predicts.

    Attributes:
        stimuli: of the split, with their responses if there are any.
        seen: which of them its members have seen.
    """

    stimuli: RecordingStimuli
    seen: Seen


class Ensemble:
    """Members that are combined to predict a split of a recording.

    Args:
        members: at least one.
        combine: the mean over all runs, or weights per site and member, learned on stimuli that no member was fitted on
            (`train/regression/stacking.py`).
        shards: of the recording.
        split: to predict.
        scored: its stimuli that are predicted and scored.
        bad_samples: records which stimuli cannot be read.
        has_left_out: whether the fine-tuned members predict what they left out; probes and ensembles have files of it.
    """

    def __init__(
        self,
        members: Sequence[Member],
        combine: Combine,
        shards: ShardFolder,
        split: str,
        scored: ScoredStimuli,
        bad_samples: BadSamples,
        *,
        has_left_out: bool,
    ):
        self._has_left_out = has_left_out
        self.members, self.combine, self.shards, self.split = list(members), combine, shards, split
        self.stimuli, self.seen, self.bad_samples = scored.stimuli, scored.seen, bad_samples

    @property
    def manifest(self) -> Manifest:
        """Of the recording."""
        return self.shards.manifest

    @property
    def recording(self) -> str:
        """The recording's name."""
        return self.manifest.name

    @property
    def runs(self) -> list[Path]:
        """Of all members."""
        return [run for member in self.members for run in member.runs]

    def check_predictions(self, run: Path) -> None:
        """Refuse a run without predictions of the split, or with predictions for other sites or responses.

        Raises:
            BadInput: naming the file.
        """
        predictions, where = predictions_of(run, self.split, self.recording), str(self.shards.folder)
        if predictions.site_ids != self.manifest.site_ids:
            raise BadInput(f"{run} predicts other sites than those of {where}")
        if self.stimuli.rates is not None:
            predictions.check_responses(run, self.stimuli.stimulus_ids, self.stimuli.rates, where)

    def predict(self) -> EnsemblePredictions:
        """Combine the members' predictions; weights are learned first.

        Raises:
            BadInput: a member predicts other sites or not all stimuli, or too few stimuli were left out to learn from.
        """
        predictions = self._member_predictions()
        if self.combine == "stack":
            return self._stacked(predictions)
        rates, left_out = self._mean(predictions), None
        if self._has_left_out and all(member.has_left_out for member in self.members):
            stimulus_ids = self._left_out_by_all()
            if stimulus_ids:
                left_out_rates = self._mean(self._member_left_out(stimulus_ids))
                left_out = self._left_out_predictions(stimulus_ids, left_out_rates)
        return EnsemblePredictions(rates, left_out)

    def _member_predictions(self) -> list[np.ndarray]:
        """Each member's predictions for the split, (stimuli, sites)."""
        for run in self.runs:
            self.check_predictions(run)
        stimulus_ids = self.stimuli.stimulus_ids
        predictions = [member.predict(self.split, stimulus_ids) for member in self.members]
        for member, rates in zip(self.members, predictions, strict=True):
            missing = int(np.isnan(rates).all(axis=1).sum())
            if missing:
                raise BadInput(
                    f"{member.runs[0]} has no predictions for {missing} of the {len(stimulus_ids)} stimuli of "
                    f"{self.split}; score it again"
                )
        return predictions

    def _mean(self, predictions: Sequence[np.ndarray]) -> np.ndarray:
        """The mean over all runs, whichever member they belong to."""
        runs = [len(member.runs) for member in self.members]
        return np.average(predictions, axis=0, weights=runs).astype(np.float32)

    def _stacked(self, predictions: Sequence[np.ndarray]) -> EnsemblePredictions:
        stimulus_ids = self._left_out_by_all()
        if len(stimulus_ids) < MIN_STIMULI:
            raise BadInput(
                f"only {len(stimulus_ids)} training stimuli were left out by all members, too few to learn weights "
                "from; train folds (early_stopping.folds), or use --combine mean"
            )
        rates = self._train_rates(stimulus_ids)
        for run in self.runs:
            left_out_of_run = predictions_of(run, LEFT_OUT, self.recording)
            if left_out_of_run.responses is not None:  # ensembles of earlier versions kept none
                left_out_of_run.check_responses(run, stimulus_ids, rates, str(self.shards.folder))
        stacked = stack(self._member_left_out(stimulus_ids), rates, predictions, self._train_copies(stimulus_ids))
        left_out = self._left_out_predictions(stimulus_ids, stacked.left_out)
        return EnsemblePredictions(stacked.prediction, left_out, stacked.weights, stacked.mean)

    def _left_out_predictions(self, stimulus_ids: list[str], rates: np.ndarray) -> Predictions:
        return Predictions(stimulus_ids, self.manifest.site_ids, rates, self._train_rates(stimulus_ids))

    def _left_out_by_all(self) -> list[str]:
        """The training stimuli that no member was fitted on, in the order of the split."""
        train = self.shards.split("train").stimulus_ids
        return [stimulus for stimulus in train if all(stimulus in member.left_out for member in self.members)]

    def _member_left_out(self, stimulus_ids: Sequence[str]) -> list[np.ndarray]:
        """Each member's predictions for training stimuli that it was not fitted on, (stimuli, sites)."""
        return [np.array([member.left_out[stimulus] for stimulus in stimulus_ids]) for member in self.members]

    def _train_rates(self, stimulus_ids: Sequence[str]) -> np.ndarray:
        return self.shards.split("train").rates(self._train_positions(stimulus_ids))

    def _train_copies(self, stimulus_ids: Sequence[str]) -> np.ndarray | None:
        """For each, the position among them of the first with the same image; None if all images differ."""
        copies = first_copies(images_of_split(self.shards, "train").at(self._train_positions(stimulus_ids)))
        return None if np.array_equal(copies, np.arange(len(copies))) else copies

    def _train_positions(self, stimulus_ids: Sequence[str]) -> np.ndarray:
        position_of = {name: position for position, name in enumerate(self.shards.split("train").stimulus_ids)}
        return np.array([position_of[stimulus] for stimulus in stimulus_ids], np.int64)
