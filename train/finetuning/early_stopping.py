"""Early stopping: which epoch is the best so far, and when to stop waiting for a better one."""

import math

from data_prep.common.errors import DIVERGED, RunFailed
from train.data.stimuli import StimulusSet
from train.evaluation.metrics import LOWER_IS_BETTER
from train.evaluation.scoring import Scores
from train.run.progress import Progress


class EarlyStopping:
    """Compares each epoch with the best before it. All ranks see the same reduced scores and decide alike.

    Args:
        patience: epochs in a row without improvement after which training stops.
        progress: of the run; it names the metric and the split that select, and holds the best epoch.
        selection: the stimuli that select, for error messages.
    """

    def __init__(self, patience: int, progress: Progress, selection: StimulusSet):
        self._patience, self._progress, self._selection = patience, progress, selection

    @property
    def out_of_patience(self) -> bool:
        """Whether too many epochs in a row were no better than the best."""
        return self._progress.epochs_without_improvement >= self._patience

    def update(self, scores: Scores) -> bool:
        """Compare the current epoch with the best so far, and record it if it is better; returns whether it is.

        Raises:
            RunFailed: the selection metric has no value.
        """
        progress = self._progress
        value = scores.means()[progress.selection_metric]
        if math.isnan(value):
            raise RunFailed(self._why_undefined(scores))
        sign = -1 if progress.selection_metric in LOWER_IS_BETTER else 1
        if progress.best is not None and sign * value <= sign * progress.best:
            return False
        progress.best = value
        progress.best_epoch, progress.best_step = progress.epoch, progress.step
        return True

    def _why_undefined(self, scores: Scores) -> str:
        if scores.moments is not None and not scores.moments.is_finite():
            return f"{DIVERGED}its predictions are not finite; lower optimizer.lr or set optimizer.clip_norm"
        metric, split = self._progress.selection_metric, self._progress.selection_split
        recording, stimuli = next(
            (part.name, len(part))
            for part in self._selection.recordings
            if math.isnan(scores.by_recording[part.name].means()[metric])
        )
        return (
            f"{metric} is undefined on the {stimuli} stimuli of {split} of {recording}: they are too few, or "
            "their responses or predictions are constant; raise early_stopping.inner_fraction or choose another "
            "early_stopping.metric"
        )
