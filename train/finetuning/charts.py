"""Charts during training: losses, learning rates, speed, train scores, sites, stimuli, objects.

Charts cost next to nothing. Train scores come from the predictions that training makes anyway; figures are drawn while
they take at most `SHARE` of the time trained so far, and once more by train/evaluate.py.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from train.data.batches import Batch
from train.data.stimuli import StimulusSet
from train.distributed.engine import Engine
from train.distributed.runtime import Runtime
from train.evaluation.figures.score_charts import chart_figures, chart_site_scores
from train.evaluation.metrics import mean_score, site_scores
from train.evaluation.moments import SiteMoments
from train.evaluation.scoring import Scores, chart_names, chart_values
from train.models.network import Network
from train.run.monitor import Monitor

SHARE = 0.005
FIRST_COST = 1.5  # seconds that the first figures are assumed to take, most of it to import matplotlib
MOST_KEPT = 2048  # predictions per rank that train scores are computed from


class TrainPredictions(NamedTuple):
    """The network's outputs for a micro-batch, and its targets as in `Batch`."""

    outputs: Mapping[str, torch.Tensor]
    positions: torch.Tensor
    weight: torch.Tensor
    rates: torch.Tensor | None
    labels: torch.Tensor | None


class TrainingCharts:
    """The charts of a training.

    Args:
        network: that is trained.
        runtime: this process.
        monitor: receives the charts.
        fit: the stimuli that are trained on.
        selection: the stimuli that select.
        split: name of the split that selects.
    """

    def __init__(
        self,
        network: Network,
        runtime: Runtime,
        monitor: Monitor,
        fit: StimulusSet,
        selection: StimulusSet,
        split: str,
    ):
        self._objective, self._runtime = network.objective, runtime
        self._monitor, self._fit, self._selection, self._split = monitor, fit, selection, split
        self._kept: deque[TrainPredictions] = deque()
        self._kept_stimuli = 0
        self._trained_seconds = self._drawing_seconds = 0.0
        self._cost = FIRST_COST

    def chart_step(
        self,
        step: int,
        losses: Mapping[str, torch.Tensor],
        engine: Engine,
        images_per_second: float,
        data_wait: float,
    ) -> None:
        """Chart losses, learning rates and speed of a step; every rank must take part.

        Args:
            step: optimizer steps done.
            losses: this rank's share, by name.
            engine: has the learning rates, and the seconds of the parts of a step.
            images_per_second: over all ranks.
            data_wait: seconds that the step waited for images.
        """
        totals = self._runtime.sum(torch.stack(list(losses.values()))).tolist()
        values: dict[str, float] = {}
        for name, total in zip(losses, totals, strict=True):
            values["train/loss" if name == "loss" else f"train/loss_{name}"] = total
        for group in engine.optimizer.param_groups:
            values[f"rate/{group['part']}"] = group["lr"]
        for name, weight in self._objective.learned_weights().items():
            values[name] = float(weight)
        values["speed/images_per_second"] = images_per_second
        values["speed/data_wait_seconds"] = data_wait
        for part, seconds in engine.clock.seconds.items():
            values[f"speed/{part}_seconds"] = seconds
        self._monitor.scalars(values, step)

    def keep_predictions(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> None:
        """Keep the outputs for a micro-batch for the train scores; nothing is computed and nothing copied."""
        outputs = {name: output.detach() for name, output in outputs.items()}
        self._kept.append(TrainPredictions(outputs, batch.positions, batch.weight, batch.rates, batch.labels))
        self._kept_stimuli += len(batch.weight)
        while self._kept_stimuli - len(self._kept[0].weight) >= MOST_KEPT:
            self._kept_stimuli -= len(self._kept.popleft().weight)

    def train_scores(self) -> dict[str, float]:
        """The scores of this epoch's last predictions in training, over all ranks; every rank must take part.

        The weights changed in between and the images were augmented, so no single network would score this on train.
        Under a loss that ignores the scale of the responses, only Pearson's r is scored. With several recordings, each
        has its own scores, as `NAME/r2`, besides the mean.
        """
        predictions, self._kept, self._kept_stimuli = self._kept, deque(), 0
        of_responses, of_classes = self._response_scores(predictions), self._class_scores(predictions)
        return chart_values(
            {
                part.name: response_scores | class_scores
                for part, response_scores, class_scores in zip(
                    self._fit.recordings, of_responses, of_classes, strict=True
                )
            }
        )

    def _response_scores(self, predictions: Sequence[TrainPredictions]) -> list[dict[str, float]]:
        """For each recording, the metrics that have a value, as means over sites."""
        responses = self._objective.responses
        if responses is None:
            return [{} for _ in self._fit.recordings]
        moments = SiteMoments.zeros(responses.rate_mean.numel(), self._runtime.device)
        if predictions:
            moments = SiteMoments.of(
                prediction=torch.cat([responses.to_rates(micro_batch.outputs["rates"]) for micro_batch in predictions]),
                response=torch.cat([micro_batch.rates for micro_batch in predictions if micro_batch.rates is not None]),
                weight=torch.cat([micro_batch.weight for micro_batch in predictions]),
            )
        scores = site_scores(moments.over_ranks(self._runtime))
        shown = ("pearson_r",) if responses.needs_calibration else tuple(scores)
        means = [
            {name: mean_score(scores[name][part.columns][part.split.manifest.rates.fitted_sites()]) for name in shown}
            for part in self._fit.recordings
        ]
        return [{name: mean for name, mean in of_part.items() if np.isfinite(mean)} for of_part in means]

    def _class_scores(self, predictions: Sequence[TrainPredictions]) -> list[dict[str, float]]:
        """For each recording, the share of stimuli whose class was the likeliest."""
        if self._selection.labels is None:
            return [{} for _ in self._fit.recordings]
        device = self._runtime.device
        ends = torch.tensor([len(part) for part in self._fit.recordings], device=device).cumsum(0)
        counts = torch.zeros(len(ends), 2, dtype=torch.float64, device=device)  # correct, shown
        for micro_batch in predictions:
            correct = (micro_batch.outputs["classes"].argmax(1) == micro_batch.labels) * micro_batch.weight
            recording = torch.bucketize(micro_batch.positions, ends[:-1], right=True)
            counts.index_add_(0, recording, torch.stack((correct, micro_batch.weight), dim=1).double())
        return [{"top1": correct / shown} if shown else {} for correct, shown in self._runtime.sum(counts).tolist()]

    def chart_epoch(self, step: int, scores: Scores, seconds: float) -> None:
        """Chart the sites of the stimuli that select; draw figures if they are cheap beside the time trained so far.

        Args:
            step: optimizer steps done.
            scores: of these stimuli.
            seconds: that the epoch took.
        """
        self._trained_seconds += seconds
        board, started = self._monitor.trackers, time.monotonic()
        if board is None:
            return
        names = chart_names(self._split, scores.by_recording)
        for name, of_recording in zip(names, scores.by_recording.values(), strict=True):
            chart_site_scores(board, name, of_recording, step)
        if self._drawing_seconds + self._cost <= SHARE * self._trained_seconds:
            recordings = zip(names, scores.by_recording.values(), self._selection.recordings, strict=True)
            for name, of_recording, stimuli in recordings:
                chart_figures(board, name, of_recording, stimuli, step)
            self._cost = time.monotonic() - started
            self._drawing_seconds += self._cost
