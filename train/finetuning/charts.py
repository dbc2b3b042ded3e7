"""What TensorBoard shows of a training beside losses and rates: train scores, sites, stimuli, objects.

It is made to cost next to nothing. Train scores are those of the predictions that training makes anyway; images are
drawn when they take at most `SHARE` of the time trained so far, and once more by train/evaluate.py.
"""

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from train.data.batches import Batch
from train.data.stimuli import StimulusSet
from train.distributed.runtime import Runtime
from train.evaluation.metrics import mean_score, site_scores
from train.evaluation.moments import SiteMoments
from train.evaluation.score_charts import draw_figures, draw_numbers
from train.evaluation.scoring import Scores, chart_names, chart_values
from train.models.network import Network
from train.run.monitor import Monitor

SHARE = 0.005
FIRST_COST = 1.5  # seconds that the first images are taken to cost, most of it to import matplotlib
MOST_KEPT = 2048  # predictions of a rank that train scores rest on


@dataclass(frozen=True)
class _Said:
    """What the network said of a micro-batch, and what would have been right; as of `Batch`, without the images."""

    outputs: Mapping[str, torch.Tensor]
    positions: torch.Tensor
    weight: torch.Tensor
    rates: torch.Tensor | None
    labels: torch.Tensor | None


class Watch:
    """Watches a training.

    Args:
        network: that is trained.
        runtime: this process.
        monitor: for the charts.
        fit: the stimuli that are trained on.
        selection: the stimuli that select.
        split: what these are called.
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
        self._seen: deque[_Said] = deque()
        self._count = 0
        self._trained = self._spent = 0.0
        self._cost = FIRST_COST

    def note(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> None:
        """Remember what the network said of a micro-batch in training; nothing is computed and nothing copied."""
        outputs = {name: output.detach() for name, output in outputs.items()}
        self._seen.append(_Said(outputs, batch.positions, batch.weight, batch.rates, batch.labels))
        self._count += len(batch.weight)
        while self._count - len(self._seen[0].weight) >= MOST_KEPT:
            self._count -= len(self._seen.popleft().weight)

    def train_means(self) -> dict[str, float]:
        """The scores of the last predictions of this epoch's training, over all ranks; all ranks call it.

        The network changed while it made them, and saw the images augmented: they are not what it would score on
        train at any one time. Under a loss that knows no scale there is Pearson's r alone. Of several recordings there
        are the means over them, and each one's own, as `recording/r2`.
        """
        seen, self._seen, self._count = self._seen, deque(), 0
        rates, classes = self._response_means(seen), self._class_means(seen)
        each = {part.name: a | b for part, a, b in zip(self._fit.recordings, rates, classes, strict=True)}
        return chart_values(each)

    def _response_means(self, seen: deque[_Said]) -> list[dict[str, float]]:
        """Of each recording."""
        responses = self._objective.responses
        if responses is None:
            return [{} for _ in self._fit.recordings]
        moments = SiteMoments.zeros(responses.rate_mean.numel(), self._runtime.device)
        if seen:
            rates = torch.cat([responses.in_units(said.outputs["rates"]) for said in seen])
            target, weight = (torch.cat([getattr(said, name) for said in seen]) for name in ("rates", "weight"))
            moments = SiteMoments.of(rates, target, weight)
        scores = site_scores(moments.over_ranks(self._runtime))
        shown = ("pearson_r",) if responses.ignores_offsets else tuple(scores)
        means = [{name: mean_score(scores[name][part.columns]) for name in shown} for part in self._fit.recordings]
        return [{name: value for name, value in each.items() if np.isfinite(value)} for each in means]

    def _class_means(self, seen: deque[_Said]) -> list[dict[str, float]]:
        """Of each recording."""
        if self._selection.labels is None:
            return [{} for _ in self._fit.recordings]
        device = self._runtime.device
        ends = torch.tensor([len(part) for part in self._fit.recordings], device=device).cumsum(0)
        right = torch.zeros(len(ends), 2, dtype=torch.float64, device=device)
        for said in seen:
            hit = (said.outputs["classes"].argmax(1) == said.labels) * said.weight
            of = torch.bucketize(said.positions, ends[:-1], right=True)
            right.index_add_(0, of, torch.stack((hit, said.weight), dim=1).double())
        return [{"top1": hits / count} if count else {} for hits, count in self._runtime.sum(right).tolist()]

    def epoch(self, scored: Scores, step: int, seconds: float) -> None:
        """Chart the selecting stimuli after an epoch, images where they are cheap beside the time trained.

        Args:
            scored: of these stimuli.
            step: optimizer steps done.
            seconds: that the epoch took.
        """
        self._trained += seconds
        board, started = self._monitor.board, time.monotonic()
        if board is None:
            return
        called = chart_names(self._split, scored.by_recording)
        for name, part in zip(called, scored.by_recording.values(), strict=True):
            draw_numbers(board, name, part, step)
        if self._spent + self._cost <= SHARE * self._trained:
            for name, part, stimuli in zip(
                called, scored.by_recording.values(), self._selection.recordings, strict=True
            ):
                draw_figures(board, name, part, stimuli, step)
            self._cost = time.monotonic() - started
            self._spent += self._cost
