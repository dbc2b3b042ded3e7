"""TensorBoard's figures of a split that was scored: sites, stimuli, objects."""

import numpy as np

from train.data.stimuli import RecordingStimuli
from train.evaluation.figure_style import encoded
from train.evaluation.metrics import site_scores
from train.evaluation.prediction_figures import draw_confusion, draw_extremes, draw_sites, mean_errors
from train.evaluation.scoring import RecordingScores
from train.run.tensorboard import TensorBoard

MOST_NUMBERS = 4_000_000  # stimuli x sites of which images are drawn
MOST_CLASSES = 100


def draw_numbers(board: TensorBoard, split: str, scored: RecordingScores, step: int) -> None:
    """The distribution of the sites' R2."""
    if scored.moments is None:
        return
    r2 = site_scores(scored.moments)["r2"]
    if np.isfinite(r2).any():
        board.histogram(f"{split}/r2_of_sites", r2[np.isfinite(r2)], step)


def draw_figures(board: TensorBoard, split: str, scored: RecordingScores, stimuli: RecordingStimuli, step: int) -> None:
    """Sites, stimuli and objects of a split that was scored and whose predictions were kept.

    Images of remote stimuli are not fetched for it.
    """
    if (
        scored.moments is not None
        and scored.rates is not None
        and stimuli.rates is not None
        and scored.rates.size <= MOST_NUMBERS
    ):
        r2 = site_scores(scored.moments)["r2"]
        if np.isfinite(r2).any():
            sites = [str(site["id"]) for site in stimuli.split.manifest.sites]
            figure = draw_sites(scored.rates, stimuli.rates, r2, sites)
            board.figure(f"{split}/best, median and worst site", encoded(figure), step)
        errors = mean_errors(scored.rates, stimuli.rates)
        if np.isfinite(errors).any() and not stimuli.split.is_remote:
            board.figure(f"{split}/most over- and underestimated", _extremes(errors, stimuli), step)
    classes = stimuli.split.manifest.classes or []
    if scored.classes is not None and stimuli.labels is not None and len(classes) <= MOST_CLASSES:
        figure = draw_confusion(classes, stimuli.labels, scored.classes, f"{split}, step {step}")
        board.figure(f"{split}/which object was named for which", encoded(figure), step)


def _extremes(errors: np.ndarray, stimuli: RecordingStimuli) -> bytes:
    return encoded(draw_extremes(errors, lambda chosen: stimuli.images(chosen).numpy(), stimuli.names()))
