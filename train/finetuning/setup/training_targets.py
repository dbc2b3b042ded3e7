"""The responses that a network is trained on: as recorded, mixed with a teacher's predictions, or shuffled."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.ceiling import variance_components
from data_prep.common.errors import BadInput
from data_prep.shards.manifest import Manifest, to_json_list
from train.data.stimuli import RecordingStimuli, StimulusSet
from train.evaluation.predictions_file import predictions_of
from train.run.folder import LEFT_OUT
from train.run.recipe import Distill, Recipe

LEAST_WEIGHT = 0.05  # of a site in the loss, however unreliable


@dataclass(frozen=True)
class TrainingTargets:
    """How the responses are learned; the stimuli hold the responses themselves.

    Attributes:
        manifest: of all recordings as one; of a subset, with its sites' mean and standard deviation.
        site_weights: of each site in the loss, float64 (sites,); None if all count alike.
        notes: about the teacher, for the log.
    """

    manifest: Manifest
    site_weights: np.ndarray | None
    notes: list[str]


def set_targets(recipe: Recipe, manifest: Manifest, fit: StimulusSet, selection: StimulusSet) -> TrainingTargets:
    """Scale and weigh the sites by the recorded responses; then shuffle the responses or add a teacher's, if asked to.

    Args:
        recipe: of the run.
        manifest: of all recordings as one.
        fit: the stimuli that are trained on; their responses may be replaced.
        selection: the stimuli that select; their responses may be shuffled.

    Raises:
        BadInput: there are no single trials to weigh sites by, or the teacher does not fit.
    """
    if recipe.subset is not None and recipe.task.predicts_responses:
        manifest = with_rates_of(manifest, fit)
    weights = site_weights(fit) if recipe.loss.site_weights == "reliability" else None
    if recipe.task.shuffle_responses:
        for stimuli in (fit, selection):
            stimuli.shuffle_responses(recipe.seed)
    elif recipe.distill.teacher is not None:
        for recording in fit.recordings:
            _check_teacher(recording, recipe.distill.teacher)
    notes = []
    if recipe.distill.teacher is not None:
        notes = [mix_in_teacher(stimuli, recipe.distill.teacher, recipe.distill) for stimuli in fit.recordings]
    return TrainingTargets(manifest, weights, notes)


def with_rates_of(manifest: Manifest, stimuli: StimulusSet) -> Manifest:
    """A manifest whose sites have the mean and standard deviation over these stimuli, each of its own recording."""
    moments = [_mean_and_std(_rates(part)) for part in stimuli.recordings]
    mean = np.concatenate([mean for mean, _ in moments])
    std = np.concatenate([std for _, std in moments])
    scale = manifest.rates.model_copy(update={"mean": to_json_list(mean), "std": to_json_list(std)})
    return manifest.model_copy(update={"rates": scale})


def _rates(stimuli: RecordingStimuli) -> np.ndarray:
    assert stimuli.rates is not None  # the network predicts responses
    return stimuli.rates


def _mean_and_std(rates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rates = rates.astype(np.float64)
    recorded = ~np.isnan(rates)
    with np.errstate(invalid="ignore"):
        mean = np.where(recorded, rates, 0).sum(0) / recorded.sum(0)
        return mean, np.sqrt(np.where(recorded, (rates - mean) ** 2, 0).sum(0) / recorded.sum(0))


def site_weights(fit: StimulusSet) -> np.ndarray:
    """Each site's weight in the loss, float64 (sites,): its reliability over the stimuli that are trained on.

    A site whose reliability is unknown has the others' mean. The weights of each recording are 1 on average.

    Raises:
        BadInput: there are no single trials.
    """
    return np.concatenate([_weights_of(stimuli) for stimuli in fit.recordings])


def _weights_of(fit: RecordingStimuli) -> np.ndarray:
    statistics = fit.trial_statistics()
    if statistics is None:
        raise BadInput(
            f"loss.site_weights: reliability needs single trials, which {fit.split.folder} does not have; use equal"
        )
    reliability = np.clip(variance_components(statistics).reliability, LEAST_WEIGHT, 1)
    is_known = ~np.isnan(reliability)
    if not is_known.any():
        raise BadInput(f"loss.site_weights: {fit.split.folder} has too few repetitions for a reliability; use equal")
    weights = np.where(is_known, reliability, reliability[is_known].mean())
    return weights / weights.mean()


def _check_teacher(fit: RecordingStimuli, teacher: str) -> None:
    """Refuse a teacher that learned other responses to the same stimuli.

    Raises:
        BadInput: naming the first stimulus and site that differ.
    """
    predictions = predictions_of(Path(teacher), LEFT_OUT, fit.name)
    same_sites = predictions.site_ids == fit.split.manifest.site_ids  # others are refused when they are mixed in
    if same_sites and predictions.responses is not None:  # ensembles of earlier versions kept none
        predictions.check_responses(Path(teacher), fit.stimulus_ids, _rates(fit), str(fit.split.folder))


def mix_in_teacher(fit: RecordingStimuli, teacher: str, settings: Distill) -> str:
    """Mix a teacher's predictions into the responses of the stimuli that are trained on; returns a note for the log.

    The predictions are those made without the stimulus's own response: a teacher that has seen it would pass on its
    noise. A stimulus that the teacher does not predict keeps its response; a missing response becomes the prediction.

    Args:
        fit: of one recording.
        teacher: folder of a probe, a run or an ensemble.
        settings: with the weight of the predictions.

    Raises:
        BadInput: the teacher predicts other sites, or none of the stimuli.
    """
    predictions = predictions_of(Path(teacher), LEFT_OUT, fit.name)
    if predictions.site_ids != fit.split.manifest.site_ids:
        raise BadInput(f"distill.teacher: {teacher} predicts other sites than {fit.split.folder} has")
    predicted, rates = predictions.rows(fit.stimulus_ids), _rates(fit)
    is_predicted = ~np.isnan(predicted)
    if not is_predicted.any():
        raise BadInput(f"distill.teacher: {teacher} predicts none of the {len(fit)} training stimuli of {fit.name}")
    mixed = np.where(np.isnan(rates), predicted, (1 - settings.weight) * rates + settings.weight * predicted)
    fit.replace_responses(np.where(is_predicted, mixed, rates))
    taught = int(is_predicted.any(axis=1).sum())
    return f"{teacher} teaches {taught:,} of the training stimuli of {fit.name} with weight {settings.weight:g}"
