"""What a network is to learn of its training stimuli, where that is not their recorded responses, all alike."""

from pathlib import Path

import numpy as np

from data_prep.ceiling import variance_components
from data_prep.common.errors import BadInput
from data_prep.shards.manifest import Manifest, to_json_list
from train.data.stimuli import RecordingStimuli, StimulusSet
from train.evaluation.predictions_file import predictions_of
from train.run.folder import LEFT_OUT
from train.run.recipe import Distill

LEAST_WEIGHT = 0.05  # of a site in the loss, however unreliable


def with_rates_of(manifest: Manifest, stimuli: StimulusSet) -> Manifest:
    """A manifest whose sites have the mean and standard deviation over these stimuli, each of its own recording."""
    mean, std = (
        np.concatenate(of) for of in zip(*(_mean_and_std(part.rates) for part in stimuli.recordings), strict=True)
    )
    scale = manifest.rates.model_copy(update={"mean": to_json_list(mean), "std": to_json_list(std)})
    return manifest.model_copy(update={"rates": scale})


def _mean_and_std(rates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rates = rates.astype(np.float64)
    there = ~np.isnan(rates)
    with np.errstate(invalid="ignore"):
        mean = np.where(there, rates, 0).sum(0) / there.sum(0)
        return mean, np.sqrt(np.where(there, (rates - mean) ** 2, 0).sum(0) / there.sum(0))


def site_weights(fit: StimulusSet) -> np.ndarray:
    """Each site's weight in the loss, float64 (sites,), 1 on average: its reliability over the stimuli to fit.

    A site whose reliability cannot be told has the others' mean. Each recording's weights are 1 on average.

    Raises:
        BadInput: there are no single trials.
    """
    return np.concatenate([_weights_of(part) for part in fit.recordings])


def _weights_of(fit: RecordingStimuli) -> np.ndarray:
    statistics = fit.trial_statistics()
    if statistics is None:
        raise BadInput(
            f"loss.site_weights: reliability needs single trials, which {fit.split.folder} does not have; take equal"
        )
    reliability = np.clip(variance_components(statistics).reliability, LEAST_WEIGHT, 1)
    known = ~np.isnan(reliability)
    if not known.any():
        raise BadInput(
            f"loss.site_weights: too few repetitions in {fit.split.folder} to tell a reliability; take equal"
        )
    weights = np.where(known, reliability, reliability[known].mean())
    return weights / weights.mean()


def learn_from_teacher(fit: RecordingStimuli, recipe: Distill) -> str:
    """Mix a teacher's predictions into the responses of a recording's stimuli to fit; returns what was done, in words.

    What is mixed in was predicted without the stimulus' own response: a teacher that has seen it would hand on its
    noise. A stimulus that the teacher says nothing of keeps its response; a response that is missing becomes the
    teacher's prediction.

    Raises:
        BadInput: the teacher predicts other sites, or none of the stimuli.
    """
    taught = predictions_of(Path(recipe.teacher), LEFT_OUT, fit.name)
    if taught.site_ids != fit.split.manifest.site_ids:
        raise BadInput(f"distill.teacher: {recipe.teacher} predicts other sites than {fit.split.folder} has")
    teacher = taught.rows(fit.stimulus_ids)
    known = ~np.isnan(teacher)
    if not known.any():
        raise BadInput(
            f"distill.teacher: {recipe.teacher} predicts none of the {len(fit)} stimuli of {fit.name} to fit"
        )
    mixed = np.where(np.isnan(fit.rates), teacher, (1 - recipe.weight) * fit.rates + recipe.weight * teacher)
    fit.replace_responses(np.where(known, mixed, fit.rates))
    return (
        f"{recipe.teacher} teaches {int(known.any(axis=1).sum()):,} of the stimuli of {fit.name} to fit; its "
        f"share in the responses is {recipe.weight:g}"
    )
