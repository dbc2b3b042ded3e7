"""Scores of the stimuli that select the best epoch, with the network that is going to be saved."""

from dataclasses import dataclass

from train.data.stimuli import StimulusSet
from train.distributed.runtime import Runtime
from train.evaluation.scoring import Scores, score
from train.finetuning.ema import RunningAverage
from train.models.batch_norm import batch_norm_statistics
from train.models.losses import Correlation
from train.models.network import Network


@dataclass(frozen=True)
class SelectionScoring:
    """Scores a network between epochs.

    Attributes:
        network: that is trained.
        average: running average of its weights, which is scored instead; or None.
        fit: the stimuli that are trained on.
        selection: the stimuli that select.
        runtime: this process.
        batch_size: stimuli per forward pass.
        workers: decoding processes per rank.
    """

    network: Network
    average: RunningAverage | None
    fit: StimulusSet
    selection: StimulusSet
    runtime: Runtime
    batch_size: int
    workers: int

    def scores(self) -> Scores:
        """Score the selection; every rank must take part.

        A loss that ignores the scale of the responses leaves it open; it is set first, by least squares on the stimuli
        that are trained on.
        """
        network = self.network
        self._average_batch_norm(network)
        if self.average is not None:
            network = self.average.network
            self.average.gather()
            self._average_batch_norm(network)
        responses = network.objective.responses
        if isinstance(responses, Correlation):
            responses.reset()
            moments = self._score(network, self.fit, keep_predictions=False).moments
            assert moments is not None  # the network predicts responses
            responses.calibrate(moments.least_squares_lines())
        return self._score(network, self.selection, keep_predictions=True)

    def _average_batch_norm(self, network: Network) -> None:
        """Average BatchNorm's running statistics over ranks, in place."""
        if self.runtime.ranks > 1:
            for _, statistic in batch_norm_statistics(network):
                statistic.copy_(self.runtime.mean(statistic))

    def _score(self, network: Network, stimuli: StimulusSet, *, keep_predictions: bool) -> Scores:
        return Scores(
            {
                recording.name: score(
                    network,
                    recording,
                    self.runtime,
                    batch_size=self.batch_size,
                    workers=self.workers,
                    keep_predictions=keep_predictions,
                )
                for recording in stimuli.recordings
            }
        )
