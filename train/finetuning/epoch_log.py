"""What a training writes after each epoch: a line in the log, points in TensorBoard, and a line of history.jsonl."""

from collections.abc import Mapping
from dataclasses import dataclass

from data_prep.common.progress import rate_text
from data_prep.shards.manifest import to_json_list
from train.evaluation.metrics import TITLES
from train.evaluation.scoring import Scores
from train.run.monitor import Monitor
from train.run.progress import Progress


@dataclass(frozen=True)
class TrainedEpoch:
    """One pass over the training stimuli, or what was left of it when the run was resumed.

    Attributes:
        loss: mean over the steps of the whole epoch.
        train_scores: mean over sites of each metric, of the predictions that training made.
        steps: optimizer steps taken.
        images_per_second: over all processes.
        seconds: that training took.
        data_wait_seconds: of these, spent waiting for images.
        first_wait_seconds: of these, before the first step.
    """

    loss: float
    train_scores: Mapping[str, float]
    steps: int
    images_per_second: float
    seconds: float
    data_wait_seconds: float
    first_wait_seconds: float


class EpochLog:
    """Writes the scores of the stimuli that select.

    Args:
        monitor: log and charts.
        progress: of the run.
        epochs: of the whole run.
    """

    def __init__(self, monitor: Monitor, progress: Progress, epochs: int):
        self._monitor, self._progress, self._epochs = monitor, progress, epochs

    def start(self, scores: Scores, score_seconds: float) -> None:
        """Write the scores before the first step."""
        self._monitor.log(f"start  {self._described(scores)}  *")
        self._chart(scores, {})
        self._append_to_history(scores, True, {"train_seconds": 0.0, "score_seconds": score_seconds})

    def epoch(self, trained: TrainedEpoch, scores: Scores, is_best: bool, score_seconds: float) -> None:
        """Write the scores after an epoch, and how it was trained."""
        self._monitor.log(
            f"epoch {self._progress.epoch:>3}/{self._epochs}  loss {trained.loss:.4f}  {self._described(scores)}  "
            f"{rate_text(trained.images_per_second)} images/s{'  *' if is_best else ''}"
        )
        self._chart(scores, trained.train_scores)
        facts = {
            "loss": trained.loss,
            "images_per_second": trained.images_per_second,
            "train_seconds": trained.seconds,
            "score_seconds": score_seconds,
        }
        self._append_to_history(scores, is_best, facts)

    def end(self, stopped_early: bool) -> None:
        """Log why training ended, and which epoch is the best."""
        progress = self._progress
        reason = "stopped early" if stopped_early else "all epochs done"
        best = float("nan") if progress.best is None else progress.best
        when = f"after epoch {progress.best_epoch}" if progress.best_epoch else "at the start: no epoch improved on it"
        self._monitor.log(
            f"{reason}: best {TITLES[progress.selection_metric]} {best:.4f} on {progress.selection_split} {when}"
        )

    def _described(self, scores: Scores) -> str:
        """Every metric; with several recordings, also the selection metric of each."""
        metric = self._progress.selection_metric
        text = "  ".join(f"{TITLES[name]} {value:.4f}" for name, value in scores.means().items())
        if len(scores.by_recording) > 1:
            values = [f"{name} {scored.means()[metric]:.4f}" for name, scored in scores.by_recording.items()]
            text += f"  ({TITLES[metric]}: {', '.join(values)})"
        return f"{self._progress.selection_split}: {text}"

    def _chart(self, scores: Scores, train_scores: Mapping[str, float]) -> None:
        split = self._progress.selection_split
        points = {f"{split}/{name}": value for name, value in scores.chart_values().items()}
        points |= {f"train/{name}": value for name, value in train_scores.items()}
        points["selection/value"] = scores.means()[self._progress.selection_metric]
        self._monitor.scalars(points, self._progress.step)

    def _append_to_history(self, scores: Scores, is_best: bool, facts: Mapping[str, float]) -> None:
        progress = self._progress
        line = {
            "epoch": progress.epoch,
            "step": progress.step,
            progress.selection_split: _finite_or_none(scores.means()),
        }
        if len(scores.by_recording) > 1:
            line["recordings"] = {name: _finite_or_none(scored.means()) for name, scored in scores.by_recording.items()}
        self._monitor.add_epoch(line | {"best": is_best} | dict(facts))


def _finite_or_none(means: Mapping[str, float]) -> dict[str, float | None]:
    return dict(zip(means, to_json_list(means.values()), strict=True))
