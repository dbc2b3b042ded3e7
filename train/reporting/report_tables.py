"""The tables of a report: models, their leads, data efficiency, classifiers, searches, published numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from train.evaluation.comparison import Lead
from train.evaluation.metrics import LOWER_IS_BETTER
from train.evaluation.seen_stimuli import Seen, mark_of
from train.reporting import papers_metrics, published
from train.reporting.data_efficiency import Curve, Point, curve_notes
from train.reporting.groups import METRICS, R2, RESAMPLES, Group, Metric, seen_notes
from train.reporting.number_formats import duration, interval, number, parameter_count
from train.reporting.reported_run import ReportedRun, ScoredClassifier, ScoredRun
from train.reporting.run_files import Metrics, Score
from train.reporting.sweep_results import SweepResults
from train.reporting.table import CSV, EMPTY, MARKDOWN, PAGE, TERMINAL, Cell, Column, Table, Value

CSV_ONLY = frozenset({CSV})
TABLES = frozenset({PAGE, MARKDOWN, CSV})
EVERYWHERE = frozenset({PAGE, MARKDOWN, CSV, TERMINAL})
SCORE_PARTS = ("", "_low", "_high", "_lead", "_lead_low", "_lead_high")
MODEL = Column("model", is_text=True)
MOST_RANKS = 6  # that a table has room for


def _csv_columns(*fields: str) -> list[Column]:
    return [Column(field, fields=(field,), formats=CSV_ONLY) for field in fields]


# Facts about a run, in the order of table.csv; the scores of responses stand between the two lists.
FACTS_BEFORE_SCORES = [
    *_csv_columns("recording", "simulated", "split", "stimuli", "sites"),
    Column("model", fields=("model",), formats=EVERYWHERE, is_text=True),
    Column("family", fields=("family",), formats=TABLES, is_text=True, style="family"),
    *_csv_columns("what", "run", "training_stimuli", "curve"),
]
FACTS_AFTER_SCORES = [
    *_csv_columns("top1", "top5", "balanced_accuracy"),
    Column("parameters", fields=("parameters", "parameters_fitted"), formats=TABLES),
    Column("training", fields=("training_seconds",), formats=TABLES),
    Column("hardware", fields=("hardware",), formats=TABLES, is_text=True, style="wide"),
    Column("selected on", fields=("selected_on",), formats=EVERYWHERE, is_text=True),
    Column("seen", fields=("seen", "seen_stimuli", "seen_dropped"), formats=EVERYWHERE, is_text=True),
    *_csv_columns("control", "git_commit", "data", "command"),
]
CLASSIFIER_COLUMNS = [
    Column("model", fields=("model",), formats=EVERYWHERE, is_text=True),
    Column("recording", fields=("recording",), formats=EVERYWHERE, is_text=True),
    Column("stimuli", fields=("stimuli",), formats=TABLES),
    Column("top-1", "↑", fields=("top1",), formats=EVERYWHERE),
    Column("top-5", "↑", fields=("top5",), formats=TABLES),
    Column("balanced accuracy", "↑", fields=("balanced_accuracy",), formats=EVERYWHERE),
    Column("selected on", fields=("selected_on",), formats=TABLES, is_text=True),
    Column("seen", fields=("seen",), formats=EVERYWHERE, is_text=True),
]


def _score_column(metric: Metric, group: Group | None = None) -> Column:
    """A metric's column; only table.csv shows one that no run of the group has."""
    column = Column(
        metric.title,
        metric.arrow,
        fields=tuple(f"{metric.key}{part}" for part in SCORE_PARTS),
        formats=CSV_ONLY,
        ascending=metric.key in LOWER_IS_BETTER,
        has_bar=metric is R2,
    )
    if group is None or metric not in group.metrics:
        return column
    formats = EVERYWHERE if metric.is_main else frozenset({MARKDOWN, CSV})
    return replace(column, formats=formats, relative_to=group.ceilings_of(metric))


CSV_COLUMNS = [
    *FACTS_BEFORE_SCORES,
    *(_score_column(metric) for metric in METRICS),
    papers_metrics.CSV_COLUMN,
    *FACTS_AFTER_SCORES,
]
CSV_FIELDS = [field for column in CSV_COLUMNS for field in column.fields]


# ---------------------------------------------------------------------------------------------------------- models


def comparison_table(group: Group, anchors: Mapping[str, str]) -> Table:
    """The models of a group, a row each.

    Args:
        group: the runs.
        anchors: of the runs on the page, by name.
    """
    columns = [
        *FACTS_BEFORE_SCORES,
        *(_score_column(metric, group) for metric in METRICS),
        papers_metrics.CSV_COLUMN,
        *FACTS_AFTER_SCORES,
    ]
    return Table(
        group.title,
        columns,
        [_comparison_row(group, index, scored, anchors) for index, scored in enumerate(group.runs)],
        _ceiling_row(group, columns) if group.ceiling else None,
        group.notes,
        group.ranking,
    )


def _comparison_row(group: Group, index: int, scored: ScoredRun, anchors: Mapping[str, str]) -> list[Cell]:
    run = scored.run
    facts = _facts(run, scored.metrics, anchors.get(run.name, ""))
    facts["sites"] = _csv_cell(scored.regression.sites or None)
    facts["curve"] = _csv_cell(
        next((curve.name for curve in group.curves for point in curve.points if scored in point.runs), None)
    )
    scores = [_metric_cell(group, index, metric) for metric in METRICS]
    scores.append(papers_metrics.papers_metrics_cell(scored.regression))
    before = [facts[column.title] for column in FACTS_BEFORE_SCORES]
    return [*before, *scores, *(facts[column.title] for column in FACTS_AFTER_SCORES)]


def _metric_cell(group: Group, index: int, metric: Metric) -> Cell:
    score = group.runs[index].regression.score(metric.key)
    lead = next((lead for lead in group.leads.get(metric.key, []) if lead.better == index), None)
    return _score_cell(score, lead, group.is_best(index, metric))


def _score_cell(score: Score | None, lead: Lead | None, is_best: bool) -> Cell:
    if score is None:
        return Cell("-", values=(None,))
    low, high = score.ci95 or (None, None)
    lead_low, lead_high = lead.interval if lead and lead.interval else (None, None)
    values = (score.mean, low, high, lead.difference if lead else None, lead_low, lead_high)
    return Cell(number(score.mean), interval(score.ci95), values, is_best)


def _ceiling_row(group: Group, columns: Sequence[Column]) -> list[Cell]:
    ceilings = {metric.title: group.ceiling_of(metric) for metric in METRICS}
    cells = {title: Cell(number(ceiling), values=(ceiling,)) for title, ceiling in ceilings.items()}
    cells["model"] = Cell("ceiling")
    return [cells.get(column.title, EMPTY) for column in columns]


def _facts(run: ReportedRun, metrics: Metrics, anchor: str) -> dict[str, Cell]:
    """What is known of a run besides its scores for responses, by column."""
    classes = metrics.classification
    values: dict[str, Value] = {
        "recording": metrics.recording,
        "simulated": metrics.simulated,
        "split": metrics.split,
        "sites": None,
        "what": run.description,
        "run": str(run.path),
        "training_stimuli": metrics.training_stimuli,
        "curve": None,
        "top1": classes.top1 if classes else None,
        "top5": classes.top5 if classes else None,
        "balanced_accuracy": classes.balanced_accuracy if classes else None,
        "control": metrics.control,
        "git_commit": run.environment.git_commit,
        "data": run.environment.data,
        "command": run.command,
    }
    return {name: _csv_cell(value) for name, value in values.items()} | {
        "stimuli": Cell(f"{metrics.stimuli:,} of {metrics.split}", values=(metrics.stimuli,)),
        "model": Cell(run.title, values=(run.title,), description=run.description, link=anchor),
        "family": _text_cell(run.family),
        "parameters": size_cell(run),
        "training": Cell(duration(run.seconds), values=(run.seconds,)),
        "hardware": _text_cell(run.hardware),
        "selected on": _text_cell(selected_on(metrics)),
        "seen": _seen_cell(metrics.seen),
    }


def size_cell(run: ReportedRun) -> Cell:
    """A model's parameters, and those that were fitted where these are fewer."""
    size = run.size
    if size is None:
        return Cell("-", values=(None, None))
    detail = "" if size.all == size.fitted else f"({parameter_count(size.fitted)} fitted)"
    return Cell(parameter_count(size.all), detail, (size.all, size.fitted))


def selected_on(metrics: Metrics) -> str:
    """The stimuli that selected a run's epoch, layer or penalty."""
    return ", ".join(metrics.selected_on) or "-"


def _seen_cell(seen: Seen | None) -> Cell:
    """The scored stimuli that were fitted before."""
    counts = (None, None) if seen is None else (seen.leaks, seen.dropped)
    return Cell(mark_of(seen), values=(mark_of(seen), *counts))


def _text_cell(text: str) -> Cell:
    return Cell(text, values=(text,))


def _csv_cell(value: Value) -> Cell:
    return Cell("" if value is None else str(value), values=(value,))


def lead_table(group: Group) -> Table | None:
    """Each model's lead over the next best in R2; None of a single model."""
    leads = group.leads.get(R2.key, [])
    if not leads:
        return None
    columns = [MODEL, Column("ahead of", is_text=True), Column("difference in R2"), Column("95 % interval")]
    columns += [Column("adjusted"), Column("excludes 0", is_text=True)]
    rows = [_lead_row(group, lead) for lead in leads]
    note = "Adjusted: the intervals of all pairs of models hold together with 95 %. Both must exclude 0."
    return Table("Each model against the next best, on the same stimuli", columns, rows, notes=[note])


def _lead_row(group: Group, lead: Lead) -> list[Cell]:
    difference = Cell(number(lead.difference), values=(lead.difference,))
    titles = [_text_cell(group.runs[index].run.title) for index in (lead.better, lead.worse)]
    if lead.interval is None:
        return [*titles, difference, *2 * [Cell("-", values=(None,))], _text_cell("-")]
    cells = [Cell(interval(ends), values=ends or (None,)) for ends in (lead.interval, lead.adjusted)]
    return [*titles, difference, *cells, _text_cell("yes" if lead.is_certain else "no")]


def rank_table(group: Group) -> Table | None:
    """How probable each rank is of each model; None where fewer than two can be compared."""
    standings = group.standings
    if not standings:
        return None
    shown = min(len(standings), MOST_RANKS)
    columns = [MODEL, Column("R2", "↑"), Column("possible ranks", ascending=True)]
    columns += [Column(f"rank {rank}") for rank in range(1, shown + 1)]
    notes = [
        f"In brackets the 95 % interval over stimuli, adjusted: those of all {len(standings)} models hold together.",
        "Possible ranks: those of all models hold together with 95 %, over other stimuli.",
        f"Rank 1, 2, ...: how often the model has this rank on {RESAMPLES:,} resamples of the stimuli. Equal models "
        "share theirs evenly, so this is no test.",
    ]
    if shown < len(standings):
        notes.append(f"power.json has the probabilities of all {len(standings)} ranks.")
    rows = [_rank_row(group, index, shown) for index in group.ranking if index in standings]
    return Table("Ranks by R2", columns, rows, notes=notes)


def _rank_row(group: Group, index: int, shown: int) -> list[Cell]:
    standing, scored = group.standings[index], group.runs[index]
    ranks = f"{standing.best}" if standing.best == standing.worst else f"{standing.best} to {standing.worst}"
    score = scored.regression.r2.mean
    cells = [_text_cell(scored.run.title), Cell(number(score), interval(standing.interval), (score,))]
    cells.append(Cell(ranks, values=(standing.best,)))
    return [*cells, *(Cell(_probability(p), values=(p,)) for p in standing.probabilities[:shown])]


def _probability(probability: float) -> str:
    """In percent, where nothing looks certain that is not."""
    if probability in (0, 1):
        return f"{probability:.0%}"
    return "< 1%" if probability < 0.01 else "> 99%" if probability > 0.99 else f"{probability:.0%}"


def curve_table(group: Group) -> Table | None:
    """R2 by training stimuli, a row per system; None where no system was trained on several numbers of stimuli."""
    if not group.curves:
        return None
    sizes = group.training_sizes
    columns = [Column("training stimuli", is_text=True), *(Column(f"{size:,}") for size in sizes)]
    columns.append(Column("per doubling"))
    rows = [_curve_row(curve, sizes) for curve in group.curves]
    return Table("Score against training stimuli", columns, rows, notes=curve_notes(group.curves))


def _curve_row(curve: Curve, sizes: Sequence[int]) -> list[Cell]:
    description = curve.description if curve.description != curve.name else ""
    name = Cell(curve.name, values=(curve.name,), description=description)
    points = [_point_cell(curve.at(size)) for size in sizes]
    return [name, *points, Cell(number(curve.gain), values=(curve.gain,))]


def _point_cell(point: Point | None) -> Cell:
    if point is None:
        return Cell("-", values=(None,))
    spread = point.spread
    detail = f"({spread[0]:.3f} to {spread[1]:.3f})" if spread else interval(point.ci95)
    return Cell(number(point.mean), detail, (point.mean,))


# ------------------------------------------------------------------------------------- classifiers, searches, others


def classifier_table(classifiers: Sequence[ScoredClassifier]) -> Table | None:
    """The runs that predict classes; None where there are none."""
    if not classifiers:
        return None
    rows = [_classifier_row(scored) for scored in classifiers]
    notes = seen_notes([(scored.run.title, scored.metrics) for scored in classifiers])
    return Table("Object classification", CLASSIFIER_COLUMNS, rows, notes=notes)


def _classifier_row(scored: ScoredClassifier) -> list[Cell]:
    run, metrics, scores = scored.run, scored.metrics, scored.classification
    facts = _facts(run, metrics, "")
    accuracies = [
        Cell(number(accuracy), values=(accuracy,)) for accuracy in (scores.top1, scores.top5, scores.balanced_accuracy)
    ]
    return [facts["model"], facts["recording"], facts["stimuli"], *accuracies, facts["selected on"], facts["seen"]]


def csv_table(classifiers: Sequence[ScoredClassifier]) -> Table:
    """The rows that table.csv has besides those of the comparisons: runs that predict classes alone."""
    columns = [*FACTS_BEFORE_SCORES, *FACTS_AFTER_SCORES]
    facts = [_facts(scored.run, scored.metrics, "") for scored in classifiers if scored.metrics.regression is None]
    return Table("", columns, [[cells[column.title] for column in columns] for cells in facts])


def sweep_table(sweep: SweepResults) -> Table:
    """The trials of a search."""
    columns = [Column(title, is_text=True) for title in sweep.header]
    return Table(f"Search {sweep.name}", columns, [[_text_cell(text) for text in row] for row in sweep.rows])


def published_table() -> Table:
    """The study's published numbers."""
    columns = [MODEL, Column("family", is_text=True, style="family")]
    columns += [Column("R2", "↑"), Column("MSE", "↓", ascending=True), Column("EV", "↑")]
    rows = [
        [_text_cell(text) for text in (row.model, row.family, row.r2, row.mse, row.explained_variance)]
        for row in published.TABLE
    ]
    return Table("For reference: the study's published numbers", columns, rows)
