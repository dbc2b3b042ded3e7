"""What slows a run down: a loader that the network waits for, or a process that the others wait for."""

import statistics
from collections.abc import Sequence

from train.finetuning.epoch_log import TrainedEpoch

LARGEST_DATA_WAIT = 0.2  # share of an epoch's time
SLOW_RANK = 1.5  # times as long as the other ranks
LEAST_DELAY = 0.1  # share of a step's time
LEAST_STEPS = 10  # before anything is said of the loader


class Bottlenecks:
    """Finds what slows a run down; mentions each kind of bottleneck once in a run."""

    def __init__(self) -> None:
        self._mentioned: set[str] = set()
        self._has_started = False
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0  # since the loader was judged last

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
        share = self._share_waited(epoch)
        if share > LARGEST_DATA_WAIT:
            notes["loader"] = (
                f"note: the loader limits the speed: {share:.0%} of the time is "
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

    def _share_waited(self, epoch: TrainedEpoch) -> float:
        """The share of the time that was spent waiting for images; 0 until there were enough steps to tell.

        What precedes the first step of all does not count: the decoding processes start then.
        """
        start_up = 0.0 if self._has_started else epoch.first_wait_seconds
        self._has_started = True
        self._steps += epoch.steps
        self._seconds += epoch.seconds - start_up
        self._waited += epoch.data_wait_seconds - start_up
        if self._steps < LEAST_STEPS:
            return 0.0
        share = self._waited / max(self._seconds, 1e-9)
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        return share
