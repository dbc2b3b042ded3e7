"""The trials of a search in order, the best first."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from train.evaluation.metrics import LOWER_IS_BETTER, TITLES
from train.sweeping.plan import SEED, Plan, as_choice
from train.sweeping.queue import TrialStatus

PLACES = {"done": 0, "failed": 1, "running": 2, "waiting": 3}


@dataclass(frozen=True)
class Standings:
    """All trials of a search, in order.

    Attributes:
        plan: what is searched.
        trials: the best first; then those that failed, those that run and those that wait.
        means: per run, the mean over the seeds of its setting; its own value where the seed does not vary.
        unsafe: runs whose setting failed with another seed.
    """

    plan: Plan
    trials: list[TrialStatus]
    means: dict[str, float]
    unsafe: frozenset[str]

    @property
    def lower_is_better(self) -> bool:
        """The direction of the metric that trials are compared by."""
        return self.plan.metric in LOWER_IS_BETTER

    @property
    def best(self) -> TrialStatus | None:
        """The trial that is chosen: of the best setting, the one with the first seed."""
        return self.trials[0] if self.trials and self.trials[0].state == "done" else None

    @property
    def settled(self) -> bool:
        """Whether no trial waits or runs."""
        return all(trial.state in ("done", "failed") for trial in self.trials)

    def summary(self) -> str:
        """How far the search is, in a line."""
        count = Counter(trial.state for trial in self.trials)
        ended = count["done"] + count["failed"]
        phrases = [f"{ended} of {len(self.trials)} trials ended"]
        phrases += [f"{count[state]} {state}" for state in ("failed", "running", "waiting") if count[state]]
        if self.best and self.best.value is not None:
            phrases.append(f"best {TITLES[self.plan.metric]} {self.best.value:.4f} ({self.best.run})")
        return ", ".join(phrases)


def rank(plan: Plan, trials: Sequence[TrialStatus]) -> Standings:
    """Put the trials of a search in order.

    Where the seed varies, a setting counts by its mean over seeds: one that is best with one seed was lucky twice, in
    its weights and in the stimuli it was judged on. A setting that failed with one seed comes after all that did not.
    """
    sign = 1 if plan.metric in LOWER_IS_BETTER else -1
    by_setting: dict[tuple, list[TrialStatus]] = {}
    for trial in trials:
        by_setting.setdefault(_setting(trial), []).append(trial)
    means: dict[str, float] = {}
    unsafe: set[str] = set()
    keys = {trial.run: (PLACES[trial.state], False, 0.0, "", trial.run) for trial in trials}
    for repetitions in by_setting.values():
        values = [trial.value for trial in repetitions if trial.value is not None]
        one_failed = any(trial.state == "failed" for trial in repetitions)
        for trial in repetitions:
            if trial.value is None:
                continue
            means[trial.run] = statistics.fmean(values)
            if one_failed:
                unsafe.add(trial.run)
            keys[trial.run] = (PLACES["done"], one_failed, sign * means[trial.run], repetitions[0].run, trial.run)
    return Standings(plan, sorted(trials, key=lambda trial: keys[trial.run]), means, frozenset(unsafe))


def _setting(trial: TrialStatus) -> tuple:
    """The settings that a trial shares with its repetitions under other seeds."""
    if not trial.settings:  # not sampled yet
        return (trial.run,)
    return tuple((key, as_choice(value)) for key, value in trial.settings.items() if key != SEED)
