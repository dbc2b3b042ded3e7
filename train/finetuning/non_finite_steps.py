"""Steps whose loss or gradient is not finite: left out by the engine, named here, and bounded in number."""

import math
from collections.abc import Callable, Sequence

import torch

from data_prep.common.errors import DIVERGED, RunFailed
from train.data.batches import Batch
from train.data.stimuli import StimulusSet
from train.distributed.engine import batch_norm_statistics
from train.distributed.runtime import Runtime
from train.models.network import Network

SHOWN = 8  # stimuli that a warning names


class FiniteSteps:
    """Keeps an eye on the steps without waiting for the device: what it has to know is read every few steps.

    BatchNorm's running statistics see the activations before anybody knows what becomes of them, so those of the last
    good look are kept, and come back when a step was left out and they are no longer finite.

    Args:
        network: whose statistics are kept.
        stimuli: to fit, for their names.
        runtime: this process.
        limit: end the run after so many bad steps in a row.
        say: where warnings go.
    """

    def __init__(
        self, network: Network, stimuli: StimulusSet, runtime: Runtime, limit: int, say: Callable[[str], None]
    ):
        self._network, self._stimuli, self._runtime, self._limit, self._say = network, stimuli, runtime, limit, say
        self._noted: list[tuple[int, list[torch.Tensor], torch.Tensor, torch.Tensor]] = []
        self._in_a_row = 0
        self._kept = self._statistics()

    def _statistics(self) -> dict[str, torch.Tensor]:
        return {name: statistic.clone() for name, statistic in batch_norm_statistics(self._network)}

    def note(self, step: int, micros: Sequence[Batch], loss: torch.Tensor, left_out: torch.Tensor) -> None:
        """Remember a step until the next look.

        Args:
            step: its number, from 1.
            micros: what this rank computed in it, on the host.
            loss: this rank's part of the loss, ().
            left_out: whether the engine left the step out, bool (), the same on every rank.
        """
        seen = [micro.positions[micro.weight > 0] for micro in micros]  # copies: batches' memory is reused
        self._noted.append((step, seen, loss, left_out))

    def look(self) -> list[float | None]:
        """Say which of the noted steps were left out, and why; every rank must take part.

        Returns:
            Of each step, this rank's part of the loss, None where it was left out.

        Raises:
            RunFailed: too many in a row.
        """
        if not self._noted:
            return []
        noted, self._noted = self._noted, []
        losses = torch.stack([loss for *_, loss, _ in noted]).tolist()
        left_out = torch.stack([bad for *_, bad in noted]).tolist()
        if any(left_out):
            own = [
                None if math.isfinite(loss) else self._names(torch.cat(seen))
                for (_, seen, *_), loss in zip(noted, losses, strict=True)
            ]
            everyone = self._runtime.gather_objects(own)
            for number, (step, *_) in enumerate(noted):
                if left_out[number]:
                    self._warn(step, [names[number] for names in everyone])
            self._restore()
        else:
            self._kept = self._statistics()
        for bad in left_out:
            self._in_a_row = self._in_a_row + 1 if bad else 0
            if self._in_a_row >= self._limit:
                raise RunFailed(
                    f"{DIVERGED}{self._in_a_row} steps in a row had a loss or a gradient that is not finite; lower "
                    "optimizer.lr or set optimizer.clip_norm (the checkpoints before are kept)"
                )
        return [None if bad else loss for loss, bad in zip(losses, left_out, strict=True)]

    def _names(self, positions: torch.Tensor) -> list[str]:
        return [self._stimuli.stimulus_ids[position] for position in positions.tolist()]

    def _warn(self, step: int, names: list[list[str] | None]) -> None:
        guilty = [
            f"rank {rank}, which saw {', '.join(own[:SHOWN])}{f' and {len(own) - SHOWN} more' * (len(own) > SHOWN)}"
            for rank, own in enumerate(names)
            if own is not None
        ]
        where = (
            f"the loss was not finite on {'; and on '.join(guilty)}"
            if guilty
            else ("the gradient was not finite, though the loss was")
        )
        self._say(f"warning: step {step} is left out: {where}")

    def _restore(self) -> None:
        for name, statistic in batch_norm_statistics(self._network):
            if not bool(torch.isfinite(statistic).all()):
                statistic.copy_(self._kept[name])
