"""The mean training loss of an epoch, summed so that it survives a mid-epoch checkpoint."""

from collections.abc import Sequence

import torch

from data_prep.common.errors import DIVERGED, RunFailed
from train.distributed.runtime import Runtime
from train.run.progress import Progress


class EpochLoss:
    """Sums this rank's share of the loss over the steps of the current epoch.

    Args:
        runtime: this process.
        progress: of the run; it holds the sums that a checkpoint saved, and counts the steps that were left out.
    """

    def __init__(self, runtime: Runtime, progress: Progress):
        self._runtime, self._progress = runtime, progress
        self._sum = 0.0

    def begin(self) -> None:
        """Begin an epoch, or resume one; on another number of ranks than before, the first takes the whole sum."""
        saved = self._progress.losses
        if len(saved) == self._runtime.ranks:
            self._sum = saved[self._runtime.rank]
        else:
            self._sum = sum(saved) if self._runtime.is_main else 0.0

    def add(self, losses: Sequence[float | None]) -> None:
        """Add this rank's share of the loss of each step; None for a step that was left out."""
        for loss in losses:
            if loss is None:
                self._progress.left_out += 1
            else:
                self._sum += loss

    def of_ranks(self) -> list[float]:
        """The sum of each rank; every rank must take part."""
        sum_of_rank = torch.tensor(self._sum, dtype=torch.float64, device=self._runtime.device)
        return self._runtime.all_gather(sum_of_rank).tolist()

    def mean(self, steps: int) -> float:
        """The mean over those of the epoch's `steps` that were not left out; every rank must take part.

        Raises:
            RunFailed: all of them were.
        """
        finite_steps = steps - self._progress.left_out
        if not finite_steps:
            raise RunFailed(
                f"{DIVERGED}no step of epoch {self._progress.epoch + 1} had a finite loss and gradient; lower "
                "optimizer.lr or set optimizer.clip_norm (earlier checkpoints are kept)"
            )
        return sum(self.of_ranks()) / finite_steps
