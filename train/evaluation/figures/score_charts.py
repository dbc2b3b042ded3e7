"""Charts of a scored split for its trackers: scores over sites, best and worst sites and stimuli, confusions."""

import numpy as np

from train.data.stimuli import RecordingStimuli
from train.evaluation.figures.figure_style import encode
from train.evaluation.figures.prediction_figures import draw_confusion, draw_extremes, draw_sites, mean_errors
from train.evaluation.metrics import site_scores
from train.evaluation.scoring import RecordingScores
from train.run.trackers import Tracker

MAX_PREDICTIONS = 4_000_000  # stimuli x sites; of more, no figures are drawn
MAX_CLASSES = 100


def chart_site_scores(board: Tracker, split: str, scores: RecordingScores, step: int) -> None:
    """Add a histogram of R2 over sites."""
    if scores.moments is None:
        return
    r2 = site_scores(scores.moments)["r2"]
    if np.isfinite(r2).any():
        board.histogram(f"{split}/r2_of_sites", r2[np.isfinite(r2)], step)


def chart_figures(board: Tracker, split: str, scores: RecordingScores, stimuli: RecordingStimuli, step: int) -> None:
    """Add figures of the predictions of a split, if they were kept."""
    if scores.rates is not None and stimuli.rates is not None and scores.rates.size <= MAX_PREDICTIONS:
        _chart_sites(board, split, scores, scores.rates, stimuli.rates, stimuli, step)
        _chart_extremes(board, split, mean_errors(scores.rates, stimuli.rates), stimuli, step)
    classes = stimuli.split.manifest.classes or []
    if scores.classes is not None and stimuli.labels is not None and len(classes) <= MAX_CLASSES:
        figure = draw_confusion(classes, stimuli.labels, scores.classes, f"{split}, step {step}")
        board.figure(f"{split}/confusion matrix", encode(figure), step)


def _chart_sites(
    board: Tracker,
    split: str,
    scores: RecordingScores,
    prediction: np.ndarray,
    response: np.ndarray,
    stimuli: RecordingStimuli,
    step: int,
) -> None:
    assert scores.moments is not None, "predictions of known responses have moments"
    r2 = site_scores(scores.moments)["r2"]
    if np.isfinite(r2).any():
        figure = draw_sites(prediction, response, r2, stimuli.split.manifest.site_ids)
        board.figure(f"{split}/best, median and worst site", encode(figure), step)


def _chart_extremes(board: Tracker, split: str, errors: np.ndarray, stimuli: RecordingStimuli, step: int) -> None:
    """Show the most over- and underestimated stimuli; images of remote shards are not fetched for that."""
    if np.isfinite(errors).any() and not stimuli.split.is_remote:
        figure = draw_extremes(errors, lambda positions: stimuli.images(positions).numpy(), stimuli.names())
        board.figure(f"{split}/most over- and underestimated", encode(figure), step)
