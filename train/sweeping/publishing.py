"""Publishes the results of a search so far: table.md, table.csv, heatmap.png, best.yaml, and TensorBoard's HParams.

All are written again from the study after every trial.
"""

import csv
import io
import json
from typing import Any, Literal

from torch.utils.tensorboard import SummaryWriter

from data_prep.common import locks
from data_prep.common.atomic_writes import write_bytes
from data_prep.common.markdown import markdown_table
from data_prep.common.safe_reading import parse_json, read_regular_file
from data_prep.shards.manifest import Manifest
from train.evaluation.metrics import TITLES
from train.evaluation.metrics_file import METRICS_FILE
from train.evaluation.seen_stimuli import mark_of, seen_in
from train.run.folder import RunFolder
from train.sweeping.plan import Plan
from train.sweeping.queue import Queue, TrialStatus
from train.sweeping.search_figures import draw_search
from train.sweeping.standings import Standings, rank
from train.sweeping.sweep_folder import SweepFolder

REPORTED_SPLIT: Literal["val"] = "val"
METRICS = ("r2", "explained_variance", "mse", "pearson_r")


def publish(folder: SweepFolder, plan: Plan, manifest: Manifest, study: Queue) -> Standings:
    """Write the results so far; workers that end a trial together write one after the other."""
    with locks.exclusive(folder.results_lock):
        standings = rank(plan, study.trials())
        write_bytes(folder.table, _results_text(folder, standings, manifest).encode())
        write_bytes(folder.csv, _csv_table(folder, standings).encode())
        write_bytes(folder.heatmap, draw_search(standings))
        if standings.best is not None:
            write_bytes(folder.best, _best_recipe(folder, standings, standings.best).encode())
        for trial in standings.trials:
            _write_hparams(folder, standings, trial)
    return standings


# --------------------------------------------------------------------------------------------------------- tables


def _columns(standings: Standings, metric: str) -> list[str]:
    columns = ["trial", *standings.plan.keys, f"{metric} on inner"]
    if standings.plan.seeds:
        columns.append(f"mean over {len(standings.plan.seeds)} seeds")
    return [*columns, "best epoch", "epochs", "seconds"]


def _cells(standings: Standings, trial: TrialStatus) -> list[Any]:
    cells = [trial.run, *(trial.settings.get(key, "") for key in standings.plan.keys), trial.value]
    if standings.plan.seeds:
        cells.append(standings.means.get(trial.run))
    return [*cells, *(trial.facts.get(key) for key in ("best_epoch", "epochs", "seconds"))]


def _results_text(folder: SweepFolder, standings: Standings, manifest: Manifest) -> str:
    """The search as a Markdown table, the best trial first, and how to read it."""
    header = [*_columns(standings, TITLES[standings.plan.metric]), "state"]
    rows = []
    for trial in standings.trials:
        reason = f": {trial.reason.replace('|', '/')}" if trial.reason else ""
        rows.append([*map(_cell_text, _cells(standings, trial)), f"{trial.state}{reason}"])
    table = markdown_table(header, rows)
    return "\n".join([table, "", *_notes(standings, manifest), *_reported_scores(folder, standings), ""])


def _cell_text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _notes(standings: Standings, manifest: Manifest) -> list[str]:
    """Which stimuli selected the best trial, and which did not."""
    base, seeds = standings.plan.base, standings.plan.seeds
    direction = "lower" if standings.lower_is_better else "higher"
    drawn = "drawn by each seed" if seeds else f"the same for all trials (seed {base.seed})"
    notes = [
        f"Selected by {TITLES[standings.plan.metric]} ({direction} is better) on the inner split, "
        f"{100 * base.early_stopping.inner_fraction:g} % of train, {drawn}. No trial was fitted to these stimuli, and "
        "they are not reported: val and test selected nothing."
    ]
    if seeds:
        notes.append(
            f"Settings are ranked by their mean over the seeds {', '.join(map(str, seeds))}; best.yaml has the best "
            "setting with its first seed, because scores of two seeds are scores on different stimuli."
        )
    if manifest.simulated:
        notes.append("The recording is SIMULATED: no brain took part.")
    return notes


def _reported_scores(folder: SweepFolder, standings: Standings) -> list[str]:
    """The best run's scores on the reported split, once the search is over and it has been scored."""
    if not standings.settled or standings.best is None:
        return []
    path = RunFolder(folder.run(standings.best.run)).evaluation(REPORTED_SPLIT) / METRICS_FILE
    if not path.is_file():
        return []
    metrics = parse_json(read_regular_file(path))
    scores = []
    for key in METRICS:
        block = metrics.get("regression", {}).get(key)
        if block and block["mean"] is not None:
            interval = " [{:.4f}, {:.4f}]".format(*block["ci95"]) if block.get("ci95") else ""
            scores.append(f"{TITLES[key]} {block['mean']:.4f}{interval}")
    top1 = metrics.get("classification", {}).get("top1")
    if top1 is not None:
        scores.append(f"{TITLES['top1']} {top1:.4f}")
    shown = ", ".join(scores) or "no score has a value"
    seen = f"(seen before: {mark_of(seen_in(metrics))})"
    return ["", f"Reported on {REPORTED_SPLIT}, which selected nothing: trial {standings.best.run}: {shown} {seen}"]


def _csv_table(folder: SweepFolder, standings: Standings) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_columns(standings, standings.plan.metric), "state", "reason", "run"])
    for trial in standings.trials:
        writer.writerow([*_cells(standings, trial), trial.state, trial.reason, folder.run(trial.run)])
    return text.getvalue()


def _best_recipe(folder: SweepFolder, standings: Standings, best: TrialStatus) -> str:
    value = f"{TITLES[standings.plan.metric]} {best.value:.4g} on inner after epoch {best.facts['best_epoch']}"
    so_far = "" if standings.settled else ", of the trials so far"
    recipe = read_regular_file(folder.trial_recipe(best.run)).decode()
    return f"# The best trial of {folder.path.name}{so_far}: {best.run}, {value}.\n{recipe}"


# ----------------------------------------------------------------------------------------------------- TensorBoard


def _write_hparams(folder: SweepFolder, standings: Standings, trial: TrialStatus) -> None:
    """Write a trial's settings and value for TensorBoard's HParams page, once, when it has ended."""
    target = folder.tensorboard / trial.run
    if trial.state not in ("done", "failed") or target.exists():
        return
    settings = {key: _hparam(value) for key, value in trial.settings.items()}
    scores = {} if trial.value is None else {f"inner/{standings.plan.metric}": trial.value} | trial.facts
    with SummaryWriter(str(target)) as board:
        board.add_hparams(settings, scores, run_name=".")


def _hparam(value: Any) -> str | int | float | bool:
    """A setting as a number, text or truth value, which is all that HParams knows."""
    return value if isinstance(value, str | int | float | bool) else json.dumps(value)
