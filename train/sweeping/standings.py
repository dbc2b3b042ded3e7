"""The points of a search in order, the best first."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from train.evaluation.metrics import LOWER_IS_BETTER
from train.sweeping.queue import Entry
from train.sweeping.search import SEED, Plan, as_choice


@dataclass(frozen=True)
class Standings:
    """All points of a search, in order.

    Attributes:
        plan: what is searched.
        entries: the best first; then those that failed, run and wait.
        means: per run, the mean over the seeds of its setting; its own value where the seed does not vary.
        unsafe: runs whose setting failed with another seed.
    """

    plan: Plan
    entries: list[Entry]
    means: dict[str, float]
    unsafe: frozenset[str]

    @property
    def lower_is_better(self) -> bool:
        """The direction of the metric that trials are compared by."""
        return self.plan.metric in LOWER_IS_BETTER

    @property
    def best(self) -> Entry | None:
        """The trial that is chosen: of the best setting, the one with the first seed."""
        return self.entries[0] if self.entries and self.entries[0].state == "done" else None

    @property
    def settled(self) -> bool:
        """Whether no point waits or runs."""
        return all(entry.state in ("done", "failed") for entry in self.entries)

    def summary(self) -> str:
        """How far the search is, in a line."""
        count = Counter(entry.state for entry in self.entries)
        ended = count["done"] + count["failed"]
        parts = [f"{ended} of {len(self.entries)} trials ended"]
        parts += [f"{count[state]} {state}" for state in ("failed", "running", "waiting") if count[state]]
        if self.best:
            parts.append(f"best {self.plan.metric} {self.best.value:.4f} ({self.best.run})")
        return ", ".join(parts)


def rank(plan: Plan, entries: Sequence[Entry]) -> Standings:
    """Put the points of a search in order.

    Where the seed varies, a setting counts by its mean over seeds: one that is best with one seed was lucky twice, in
    its weights and in the stimuli it was judged on. A setting that failed with one seed comes after all that did not.
    """
    sign = 1 if plan.metric in LOWER_IS_BETTER else -1
    of_setting: dict[tuple, list[Entry]] = {}
    for entry in entries:
        of_setting.setdefault(_setting(entry), []).append(entry)
    means, keys = {}, {}
    for together in of_setting.values():
        values = [entry.value for entry in together if entry.value is not None]
        failed = any(entry.state == "failed" for entry in together)
        for entry in together:
            if entry.value is not None:
                means[entry.run] = statistics.fmean(values)
                keys[entry.run] = (0, failed, sign * means[entry.run], together[0].run)
    last = {"failed": 1, "running": 2, "waiting": 3}
    ordered = sorted(entries, key=lambda entry: (*keys.get(entry.run, (last.get(entry.state), 0, 0, "")), entry.run))
    return Standings(plan, ordered, means, frozenset(run for run, key in keys.items() if key[1]))


def _setting(entry: Entry) -> tuple:
    """What a point shares with its repetitions under other seeds."""
    if not entry.settings:  # not sampled yet
        return (entry.run,)
    return tuple((key, as_choice(value)) for key, value in entry.settings.items() if key != SEED)
