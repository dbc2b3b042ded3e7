"""What a search has found so far: table.md, table.csv, heatmap.png, best.yaml, and TensorBoard's HParams.

All are rewritten from the study after every trial.
"""

import csv
import io
import json
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from data_prep.common import locks
from data_prep.common.atomic_writes import write_bytes
from data_prep.shards.manifest import Manifest
from train.run.folder import RunFolder
from train.sweeping.queue import Entry, Study
from train.sweeping.search import Plan, SweepFolder
from train.sweeping.search_figures import draw_search
from train.sweeping.standings import Standings, rank

REPORTED = "val"
METRICS = {"R2": "r2", "EV": "explained_variance", "MSE": "mse", "Pearson r": "pearson_r"}


def publish(folder: SweepFolder, plan: Plan, manifest: Manifest, study: Study) -> Standings:
    """Write what is known now; of several workers that end a trial together, each writes after the other."""
    with locks.exclusive(folder.results_lock):
        standings = rank(plan, study.entries())
        write_bytes(folder.table, table(folder, standings, manifest).encode())
        write_bytes(folder.csv, _csv(folder, standings).encode())
        write_bytes(folder.heatmap, draw_search(standings))
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
