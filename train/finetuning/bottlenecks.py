"""What slows a run down: a loader that the network waits for, or a process that the others wait for."""

import statistics
from collections.abc import Sequence

from train.finetuning.epoch_log import TrainedEpoch

LARGEST_DATA_WAIT = 0.2  # share of an epoch's time
SLOW_RANK = 1.5  # times as long as the other ranks
LEAST_DELAY = 0.1  # share of a step's time


class Bottlenecks:
    """Finds what slows a run down; mentions each kind of bottleneck once in a run."""

    def __init__(self) -> None:
        self._mentioned: set[str] = set()

    def notes(self, epoch: TrainedEpoch, busy: Sequence[float], hosts: Sequence[str]) -> list[str]:
        """Sentences for the log about the epoch that has ended.

        Args:
            epoch: as this process trained it.
            busy: seconds of its own work per step, of each rank.
            hosts: machine of each rank.
        """
        if not epoch.steps:
            return []
        notes = {}
        if epoch.data_wait_seconds > LARGEST_DATA_WAIT * epoch.seconds:
            notes["loader"] = (
                f"note: the loader limits the speed: {epoch.data_wait_seconds / epoch.seconds:.0%} of the time is "
                "spent waiting for images; raise loader.workers, or let loader.cache keep the images"
            )
        slowest, usual = max(busy), statistics.median_low(busy)
        if slowest > SLOW_RANK * usual > 0 and slowest - usual > LEAST_DELAY * epoch.seconds / epoch.steps:
            rank = busy.index(slowest)
            notes["rank"] = (
                f"note: rank {rank} on {hosts[rank]} takes {slowest / usual:.1f} times as long for its part of a step "
                "as the others, which wait for it"
            )
        new = [sentence for kind, sentence in notes.items() if kind not in self._mentioned]
        self._mentioned |= notes.keys()
        return new
