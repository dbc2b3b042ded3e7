"""Predicts a split with a network, over all ranks, and scores the predictions."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from data_prep.common.errors import BadInput
from data_prep.common.progress import Progress
from train.data.batches import Batch
from train.data.loader import evaluation_loader, rank_positions
from train.data.stimuli import RecordingStimuli
from train.distributed.runtime import Runtime
from train.evaluation.classification import ClassCounts
from train.evaluation.metrics import mean_score, site_scores
from train.evaluation.moments import SiteMoments
from train.models.network import Network


@dataclass(frozen=True)
class RecordingScores:
    """A network's predictions of a recording's split, and their scores; the same on every rank.

    Attributes:
        moments: of responses and predictions; sites that could not be fitted (`Rates.fitted_sites`) count for nothing.
            None where the network predicts none or there are no responses.
        counts: correct classifications; None where the network predicts no classes or there are no labels.
        rates: predictions in the recording's units, float32 (stimuli, sites), in the order of the split; None where
            the network predicts none or they were not kept.
        classes: likeliest class, int64 (stimuli,), in the order of the split; None likewise.
    """

    moments: SiteMoments | None
    counts: ClassCounts | None
    rates: np.ndarray | None
    classes: np.ndarray | None = None

    def means(self) -> dict[str, float]:
        """Every metric's mean over sites, and the accuracy "top1"."""
        means: dict[str, float] = {}
        if self.moments is not None:
            means |= {name: mean_score(per_site) for name, per_site in site_scores(self.moments).items()}
        if self.counts is not None:
            means["top1"] = self.counts.accuracy()
        return means


@dataclass(frozen=True)
class Scores:
    """Scores of one or several recordings, each on its own stimuli.

    Attributes:
        by_recording: by the recording's name.
    """

    by_recording: dict[str, RecordingScores]

    def means(self) -> dict[str, float]:
        """Every metric's mean over recordings; NaN if it has no value for one of them."""
        return mean_over_recordings([scores.means() for scores in self.by_recording.values()])

    def chart_values(self) -> dict[str, float]:
        """`means`, and with several recordings the metrics of each."""
        return chart_values({name: scores.means() for name, scores in self.by_recording.items()})

    @property
    def moments(self) -> SiteMoments | None:
        """Of the sites of all recordings, one recording after the other."""
        recordings = [scores.moments for scores in self.by_recording.values() if scores.moments is not None]
        return SiteMoments.side_by_side(recordings) if recordings else None


def mean_over_recordings(recordings: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean over recordings of every metric that all of them have."""
    shared = [name for name in recordings[0] if all(name in metrics for metrics in recordings)]
    return {name: float(np.mean([metrics[name] for metrics in recordings])) for name in shared}


def chart_values(by_recording: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Metrics under the names of their charts: `r2` is the mean; with several recordings, `NAME/r2` is that of NAME."""
    values = mean_over_recordings(list(by_recording.values()))
    if len(by_recording) > 1:
        for recording, metrics in by_recording.items():
            values |= {f"{recording}/{name}": value for name, value in metrics.items()}
    return values


def chart_names(split: str, recordings: Iterable[str]) -> list[str]:
    """The name of a split in the charts of each recording: `split`, or with several recordings `split/NAME`."""
    names = list(recordings)
    return [split] if len(names) == 1 else [f"{split}/{name}" for name in names]


@torch.no_grad()
def score(
    network: Network,
    stimuli: RecordingStimuli,
    runtime: Runtime,
    *,
    batch_size: int,
    workers: int,
    keep_predictions: bool,
    label: str = "",
) -> RecordingScores:
    """Predict every stimulus once, over all ranks, in float32 and with the network in evaluation mode.

    Args:
        network: on the runtime's device.
        stimuli: of a recording; `stimuli.columns` are its sites among the network's outputs.
        runtime: this process.
        batch_size: stimuli per forward pass.
        workers: decoding processes.
        keep_predictions: whether to gather the predictions of all stimuli.
        label: of the progress bar; no bar without one.

    Raises:
        Stopped: a process was asked to stop.
        RuntimeError: the ranks together did not see every stimulus once.
    """
    was_training = network.training
    network.eval()
    scorer = _RankScorer(network, stimuli, runtime, keep_predictions)
    loader = evaluation_loader(
        stimuli, size=batch_size, rank=runtime.rank, ranks=runtime.ranks, workers=workers, pin=runtime.on_gpu
    )
    with Progress(len(stimuli), label, silent=not (label and runtime.is_main)) as progress:
        for batch in loader:
            runtime.beat()
            count = int(batch.weight.sum())
            batch = batch.to(runtime.device)
            scorer.add(network(batch.images), batch, count)
            progress.advance(min(count * runtime.ranks, len(stimuli) - progress.done))
    network.train(was_training)
    return scorer.over_ranks()


class _RankScorer:
    """Accumulates the predictions of this rank's share of the stimuli, and their moments and counts."""

    def __init__(self, network: Network, stimuli: RecordingStimuli, runtime: Runtime, keep_predictions: bool):
        self._runtime, self._stimuli, self._keep = runtime, stimuli, keep_predictions
        self._responses = network.objective.responses
        self._classifies = "classes" in network.heads
        self._seen = 0
        rows = len(rank_positions(len(stimuli), runtime.rank, runtime.ranks)) if keep_predictions else 0
        device, sites = runtime.device, 0
        self._moments: SiteMoments | None = None
        self._fitted = stimuli.split.manifest.rates.fitted_sites()
        if self._responses is not None:
            sites = self._responses.rate_mean[stimuli.columns].numel()
            if stimuli.rates is not None:
                self._moments = SiteMoments.zeros(sites, device)
        self._counts: ClassCounts | None = None
        if self._classifies and stimuli.labels is not None:
            head = network.heads["classes"]
            assert isinstance(head, nn.Linear)
            self._counts = ClassCounts.zeros(head.out_features, device)
        self._rates = torch.empty(rows, sites, device=device)
        self._classes = torch.empty(rows, dtype=torch.int64, device=device)

    def add(self, outputs: Mapping[str, torch.Tensor], batch: Batch, count: int) -> None:
        """Add a batch; stimuli after the first `count` are padding."""
        rows = slice(self._seen, self._seen + count)
        if self._responses is not None:
            rates = self._responses.to_rates(outputs["rates"])[:, self._stimuli.columns]
            if self._moments is not None:
                assert batch.rates is not None
                self._moments = self._moments.merge(SiteMoments.of(rates, batch.rates, batch.weight))
            if self._keep:
                self._rates[rows] = rates[:count]
        if self._counts is not None:
            assert batch.labels is not None
            self._counts.add(outputs["classes"], batch.labels, batch.weight)
        if self._keep and self._classifies:
            self._classes[rows] = outputs["classes"][:count].argmax(1)
        self._seen += count

    def over_ranks(self) -> RecordingScores:
        """The scores over all ranks.

        Raises:
            RuntimeError: the ranks together did not see every stimulus once.
        """
        runtime, expected = self._runtime, len(self._stimuli)
        total = int(runtime.sum(torch.tensor(self._seen, device=runtime.device)))
        if total != expected:
            raise RuntimeError(f"the ranks evaluated {total} stimuli, but the split has {expected}")
        return RecordingScores(
            moments=None if self._moments is None else self._moments.over_ranks(runtime).only(self._fitted),
            counts=None if self._counts is None else self._counts.over_ranks(runtime),
            rates=runtime.gather_rows(self._rates) if self._keep and self._responses is not None else None,
            classes=runtime.gather_rows(self._classes) if self._keep and self._classifies else None,
        )


def check_enough_stimuli(stimuli: RecordingStimuli, ranks: int, split: str) -> None:
    """Refuse more processes than stimuli.

    Raises:
        BadInput: there are more.
    """
    if len(stimuli) < ranks:
        raise BadInput(f"{ranks} processes cannot share the {len(stimuli)} stimuli of {split!r}; start fewer processes")
