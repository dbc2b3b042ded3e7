"""Reports steps whose loss or gradient is not finite, which the engine leaves out, and ends a run with too many."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from data_prep.common.errors import DIVERGED, RunFailed
from train.data.batches import Batch
from train.data.stimuli import StimulusSet
from train.distributed.engine import StepOutcome
from train.distributed.runtime import Runtime
from train.models.batch_norm import batch_norm_statistics
from train.models.network import Network

NAMED = 8  # stimuli in a warning


class Shown(NamedTuple):
    """The stimuli of a micro-batch: positions and weight as in `Batch`, on the host."""

    positions: torch.Tensor
    weight: torch.Tensor


class Step(NamedTuple):
    """A step that the host has not looked at yet.

    Attributes:
        number: from 1.
        shown: to this rank, by micro-batch.
        loss: float (), this rank's share, on the device.
        outcome: of the step.
    """

    number: int
    shown: list[Shown]
    loss: torch.Tensor
    outcome: StepOutcome


class NonFiniteSteps:
    """Watches the losses without waiting for the device: steps are recorded, and read together every few steps.

    BatchNorm updates its running statistics before anybody knows whether a step is finite. So those of the last read
    without a bad step are kept, and restored when a step was left out and they are no longer finite.

    A float16 gradient that overflows while the loss is finite is no bad step but how the scale of the loss adapts; it
    is left out without a warning and does not count towards the limit. Once the scale is down to 1, it does.

    Args:
        network: whose statistics are kept.
        stimuli: that are trained on, for their ids.
        runtime: this process.
        limit: bad steps in a row at which the run ends.
        warn: receives warnings.
    """

    def __init__(
        self, network: Network, stimuli: StimulusSet, runtime: Runtime, limit: int, warn: Callable[[str], None]
    ):
        self._network, self._stimuli, self._runtime, self._limit, self._warn = network, stimuli, runtime, limit, warn
        self._unread: list[Step] = []
        self._bad_in_a_row = 0
        self._good_statistics = self._copy_of_statistics()

    def record(self, number: int, micro_batches: Sequence[Batch], loss: torch.Tensor, outcome: StepOutcome) -> None:
        """Record a step until the next `read`.

        Args:
            number: of the step, from 1.
            micro_batches: of this rank, on the host.
            loss: float (), this rank's share.
            outcome: of the step, on the device.
        """
        # Whole batches are not kept: that would keep their images from being overwritten by later ones.
        shown = [Shown(batch.positions, batch.weight) for batch in micro_batches]
        self._unread.append(Step(number, shown, loss, outcome))

    def read(self) -> list[float | None]:
        """Read the recorded steps and warn of the bad ones; every rank must take part.

        Returns:
            This rank's share of the loss of each step; None for a bad one.

        Raises:
            RunFailed: too many steps in a row were bad.
        """
        if not self._unread:
            return []
        steps, self._unread = self._unread, []
        losses = torch.stack([step.loss for step in steps]).tolist()
        left_out = torch.stack([step.outcome.left_out for step in steps]).bool().tolist()
        bad = [False] * len(steps)
        if any(left_out):
            bad = self._report(steps, losses, left_out)
        if any(bad):
            self._restore_statistics()
        else:
            self._good_statistics = self._copy_of_statistics()
        for is_bad, is_left_out in zip(bad, left_out, strict=True):
            if is_bad:
                self._bad_in_a_row += 1
            elif not is_left_out:
                self._bad_in_a_row = 0
            if self._bad_in_a_row >= self._limit:
                raise RunFailed(
                    f"{DIVERGED}{self._bad_in_a_row} steps in a row had a loss or a gradient that is not finite; lower "
                    "optimizer.lr or set optimizer.clip_norm (earlier checkpoints are kept)"
                )
        return [None if is_bad else loss for loss, is_bad in zip(losses, bad, strict=True)]

    def _report(self, steps: list[Step], losses: list[float], left_out: list[bool]) -> list[bool]:
        """Warn of each bad step, with the stimuli of the ranks whose loss was not finite.

        Returns:
            Whether each step is bad; the same on every rank.
        """
        suspects = [
            None if math.isfinite(loss) else self._ids(step.shown) for step, loss in zip(steps, losses, strict=True)
        ]
        suspects_of_ranks = self._runtime.gather_objects(suspects)
        may_be_scale = torch.stack([step.outcome.may_be_scale for step in steps]).tolist()
        bad = []
        for index, step in enumerate(steps):
            suspects_of_step = [suspects[index] for suspects in suspects_of_ranks]
            loss_is_finite = all(suspects is None for suspects in suspects_of_step)
            bad.append(left_out[index] and not (may_be_scale[index] and loss_is_finite))
            if bad[-1]:
                self._warn(f"warning: step {step.number} is left out: {_cause(suspects_of_step)}")
        return bad

    def _ids(self, shown: list[Shown]) -> list[str]:
        positions = torch.cat([positions[weight > 0] for positions, weight in shown])
        return [self._stimuli.stimulus_ids[position] for position in positions.tolist()]

    def _copy_of_statistics(self) -> dict[str, torch.Tensor]:
        return {name: statistic.clone() for name, statistic in batch_norm_statistics(self._network)}

    def _restore_statistics(self) -> None:
        for name, statistic in batch_norm_statistics(self._network):
            if not bool(torch.isfinite(statistic).all()):
                statistic.copy_(self._good_statistics[name])


def _cause(suspects_of_ranks: list[list[str] | None]) -> str:
    """Why a step was left out.

    Args:
        suspects_of_ranks: stimuli that each rank saw in the step; None where its loss was finite.
    """
    sightings = []
    for rank, suspects in enumerate(suspects_of_ranks):
        if suspects is not None:
            more = f" and {len(suspects) - NAMED} more" if len(suspects) > NAMED else ""
            sightings.append(f"rank {rank}, which saw {', '.join(suspects[:NAMED])}{more}")
    if not sightings:
        return "the gradient was not finite, though the loss was"
    return f"the loss was not finite on {'; and on '.join(sightings)}"
