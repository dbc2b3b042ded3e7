"""What keeps a run from being faster: a loader that is waited for, or a process that the others wait for."""

import statistics
from collections.abc import Sequence

LOADER_LIMITS = 0.2  # of the time
DRIFTS = 1.5  # times as long as the others
WORTH_SAYING = 0.1  # of a step


class Pace:
    """Says each remark once in a run."""

    def __init__(self):
        self._said: set[str] = set()

    def remarks(
        self, *, waited: float, trained: float, steps: int, busy: Sequence[float], hosts: Sequence[str]
    ) -> list[str]:
        """Sentences about the epoch that has ended.

        Args:
            waited: seconds that this process waited for images.
            trained: seconds of the epoch.
            steps: of the epoch.
            busy: of each rank, seconds of its own work per step.
            hosts: of each rank.
        """
        found = {}
        if waited > LOADER_LIMITS * trained:
            found["loader"] = (
                f"note: the loader limits the speed: {waited / trained:.0%} of the time is waiting for images; "
                "raise loader.workers, or let loader.cache keep the images"
            )
        slowest, usual = max(busy), statistics.median_low(busy)
        if slowest > DRIFTS * usual > 0 and slowest - usual > WORTH_SAYING * trained / steps:
            rank = busy.index(slowest)
            found["drift"] = (
                f"note: rank {rank} on {hosts[rank]} needs {slowest / usual:.1f} times as long for its part of a step "
                "as the others, and they wait for it"
            )
        new = [sentence for kind, sentence in found.items() if kind not in self._said]
        self._said |= found.keys()
        return new
