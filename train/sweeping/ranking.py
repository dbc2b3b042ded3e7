"""What a search has found so far: table.md, table.csv, heatmap.png, best.yaml, and TensorBoard's HParams.

Everything is made anew from the study after every trial, and replaced in one go.
"""

import csv
import io
import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from data_prep.common import locks
from data_prep.common.atomic_writes import write_bytes
from data_prep.shards.manifest import Manifest
from train.evaluation import plots
from train.evaluation.metrics import LOWER_IS_BETTER
from train.run.folder import RunFolder
from train.sweeping.queue import Entry, Study
from train.sweeping.search import SEED, Plan, SweepFolder, as_choice

REPORTED = "val"
METRICS = {"R2": "r2", "EV": "explained_variance", "MSE": "mse", "Pearson r": "pearson_r"}


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


def publish(folder: SweepFolder, plan: Plan, manifest: Manifest, study: Study) -> Standings:
    """Write what is known now; of several workers that end a trial together, each writes after the other."""
    with locks.exclusive(folder.results_lock):
        standings = rank(plan, study.entries())
        write_bytes(folder.table, table(folder, standings, manifest).encode())
        write_bytes(folder.csv, _csv(folder, standings).encode())
        write_bytes(folder.heatmap, figure(standings))
        if best := standings.best:
            write_bytes(folder.best, _best_recipe(folder, standings, best).encode())
        for entry in standings.entries:
            _write_hparams(folder, standings, entry)
    return standings


# --------------------------------------------------------------------------------------------------------- tables


def _columns(standings: Standings) -> list[str]:
    mean = [f"mean over {len(standings.plan.seeds)} seeds"] * bool(standings.plan.seeds)
    return [
        "trial",
        *standings.plan.keys,
        f"{standings.plan.metric} on inner",
        *mean,
        "best epoch",
        "epochs",
        "seconds",
    ]


def _cells(standings: Standings, entry: Entry) -> list[Any]:
    facts = entry.facts or {}
    mean = [standings.means.get(entry.run)] * bool(standings.plan.seeds)
    settings = [entry.settings.get(key, "") for key in standings.plan.keys]
    return [entry.run, *settings, entry.value, *mean, *(facts.get(key) for key in ("best_epoch", "epochs", "seconds"))]


def table(folder: SweepFolder, standings: Standings, manifest: Manifest) -> str:
    """The search as a Markdown table, the best trial first, and what one must know to read it."""
    header = [*_columns(standings), "state"]
    lines = [f"| {' | '.join(header)} |", f"| {' | '.join(['---'] * len(header))} |"]
    for entry in standings.entries:
        state = entry.state + (f": {entry.reason.replace('|', '/')}" if entry.reason else "")
        lines.append(f"| {' | '.join([*map(_shown, _cells(standings, entry)), state])} |")
    return "\n".join([*lines, "", *notes(standings, manifest), *reported(folder, standings), ""])


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def notes(standings: Standings, manifest: Manifest) -> list[str]:
    """On which stimuli the search chose, and on which it did not."""
    early, seeds = standings.plan.base.early_stopping, standings.plan.seeds
    direction = "lower" if standings.lower_is_better else "higher"
    part = f"{100 * early.inner_fraction:g} % of train"
    drawn = "drawn anew by each seed" if seeds else f"the same for all trials (seed {standings.plan.base.seed})"
    found = [
        f"Chosen by {standings.plan.metric} ({direction} is better) on the inner split: {part}, "
        f"{drawn}, which no trial was fitted to. It is not a split that is reported: val and test chose nothing."
    ]
    if seeds:
        found.append(
            f"Settings are in the order of their mean over the seeds {', '.join(map(str, seeds))}; best.yaml has the "
            "best setting and its first seed, since values of two seeds are values on other stimuli."
        )
    if manifest.simulated:
        found.append("The recording is SIMULATED: no brain took part.")
    return found


def reported(folder: SweepFolder, standings: Standings) -> list[str]:
    """The best run's score on the split that is reported, once the search is over and it has been scored."""
    if not standings.settled or standings.best is None:
        return []
    path = RunFolder(folder.run(standings.best.run)).evaluation(REPORTED) / "metrics.json"
    if not path.is_file():
        return []
    metrics = json.loads(path.read_text(encoding="utf-8"))
    scores = [
        f"{name} {block['mean']:.4f}" + (" [{:.4f}, {:.4f}]".format(*block["ci95"]) if block.get("ci95") else "")
        for name, key in METRICS.items()
        if (block := metrics.get("regression", {}).get(key)) and block["mean"] is not None
    ]
    if (top1 := metrics.get("classification", {}).get("top1")) is not None:
        scores.append(f"top1 {top1:.4f}")
    return ["", f"Reported on {REPORTED}, which chose nothing: trial {standings.best.run}: {', '.join(scores)}"]


def _csv(folder: SweepFolder, standings: Standings) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_columns(standings), "state", "reason", "run"])
    for entry in standings.entries:
        writer.writerow([*_cells(standings, entry), entry.state, entry.reason, folder.run(entry.run)])
    return text.getvalue()


def _best_recipe(folder: SweepFolder, standings: Standings, best: Entry) -> str:
    value = f"{standings.plan.metric} {best.value:.4g} on inner after epoch {best.facts['best_epoch']}"
    so_far = "" if standings.settled else ", of the trials so far"
    recipe = folder.trial_recipe(best.run).read_text(encoding="utf-8")
    return f"# The best trial of {folder.path.name}{so_far}: {best.run}, {value}.\n{recipe}"


# -------------------------------------------------------------------------------------------------------- figures


def figure(standings: Standings) -> bytes:
    """The value over the two settings that vary first, the best over all others."""
    plan = standings.plan
    several = [key for key in plan.keys if key != SEED and (key in plan.ranges or len(plan.choices[key]) > 1)]
    shown = several[:2] or [key for key in plan.keys if key != SEED][:1]
    x, y = axis(plan, shown[0]), axis(plan, shown[1]) if len(shown) > 1 else None
    if y is not None and x.values and not _numeric(x) and (not y.values or _numeric(y)):
        x, y = y, x
    mean = f", mean over {len(plan.seeds)} seeds" if plan.seeds else ""
    others = f"\nin each place the best over {', '.join(several[2:])}" if several[2:] else ""
    how = {
        "title": f"{plan.metric} on the inner split{mean}{others}",
        "label": f"{plan.metric} ({'lower' if standings.lower_is_better else 'higher'} is better)",
    }
    points = _points(standings, x, y)
    if y is None:
        return plots.curve(x, points, **how)
    draw = plots.heat_map if x.values and y.values else plots.scatter
    return draw(x, y, points, lower_is_better=standings.lower_is_better, **how)


def axis(plan: Plan, key: str) -> plots.Axis:
    """A setting as an axis; numbers ascend."""
    if key in plan.ranges:
        return plots.Axis(key, [], plan.ranges[key].log)
    values = plan.choices[key]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return plots.Axis(key, sorted(values) if numbers else [as_choice(value) for value in values])


def _numeric(axis: plots.Axis) -> bool:
    return all(isinstance(value, int | float) for value in axis.values)


def _points(standings: Standings, x: plots.Axis, y: plots.Axis | None) -> list[plots.Point]:
    """One point per pair of values: the best there is."""
    best: dict[tuple, plots.Point] = {}
    order = {"done": 0, "failed": 2, "running": 1, "waiting": 1}
    for entry in sorted(standings.entries, key=lambda entry: order[entry.state]):  # stable: the best stays first
        if entry.settings:
            place = as_choice(entry.settings[x.name]), None if y is None else as_choice(entry.settings[y.name])
            state = entry.state if entry.state in ("done", "failed") else "waiting"
            state = "failed" if entry.run in standings.unsafe else state
            best.setdefault(place, plots.Point(*place, state, standings.means.get(entry.run)))
    return list(best.values())


# ----------------------------------------------------------------------------------------------------- TensorBoard


def _write_hparams(folder: SweepFolder, standings: Standings, entry: Entry) -> None:
    """A trial's settings and value for TensorBoard's HParams page, written once, when it has ended."""
    target = folder.tensorboard / entry.run
    if entry.state not in ("done", "failed") or target.exists():
        return
    settings = {key: _plain(value) for key, value in entry.settings.items()}
    found = {} if entry.value is None else {f"inner/{standings.plan.metric}": entry.value} | (entry.facts or {})
    with SummaryWriter(str(target)) as board:
        board.add_hparams(settings, found, run_name=".")


def _plain(value: Any) -> Any:
    """HParams knows numbers, texts and truth values."""
    return value if isinstance(value, str | int | float | bool) else json.dumps(value)
