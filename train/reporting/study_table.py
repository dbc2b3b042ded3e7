"""The study's Table I and Figure 1 with our numbers, from the folder of a study (train/study.py).

Published numbers stand beside ours only where these are of the same recording and split and of the same systems: never
beside rows of reduced size, and never beside random weights that stand for pretrained ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data_prep.common.terminal import printable
from train.evaluation.figures.figure_style import encode
from train.evaluation.figures.layer_figure import draw_layers
from train.evaluation.metrics import LOWER_IS_BETTER
from train.evaluation.metrics_file import METRICS_FILE
from train.reporting import published
from train.reporting.figures import FORMATS, ReportFigure, file_name
from train.reporting.number_formats import number
from train.reporting.report_tables import selected_on
from train.reporting.run_files import Metrics, Regression, read_metrics, read_settings
from train.reporting.sweep_results import SweepResults, is_sweep, read_sweep
from train.reporting.table import CSV, EMPTY, MARKDOWN, PAGE, TERMINAL, Cell, Column, Table
from train.run.folder import RunFolder
from train.sweeping.study.folder import RowState, StudyFacts, StudyFolder
from train.sweeping.study.rows import FAMILIES, FIGURE_ROW, ROWS, Row

EVERYWHERE = frozenset({PAGE, MARKDOWN, CSV, TERMINAL})
METRICS = ("r2", "mse", "explained_variance")
CSV_FIELDS = ("row", "family", "model", *METRICS, "selected_on", "state", "reason")
PUBLISHED_FIELDS = tuple(f"published_{metric}" for metric in METRICS)
SPLIT = "val"


@dataclass(frozen=True)
class StudyResult:
    """A row of the study, as far as it is.

    Attributes:
        row: the system.
        state: how far it is.
        metrics: its scores; None where it has none.
        found: of a search, the settings that it found best.
        has_random_weights: whether they stand for pretrained ones.
        published: the study's numbers for it, where it prints some.
    """

    row: Row
    state: RowState
    metrics: Metrics | None
    found: str
    has_random_weights: bool
    published: published.Published | None

    @property
    def regression(self) -> Regression | None:
        """The scores that the row shows: of the layer that the study names, else of the one that was chosen."""
        if self.metrics is None:
            return None
        named = self.metrics.layers.get(self.row.layer or "")
        return self.metrics.regression if named is None else named.regression

    @property
    def title(self) -> str:
        """The system, and what of it is not as in the study."""
        layer = ""
        if self.metrics is not None and self.metrics.chosen and len(self.metrics.layers) > 1:
            if self.row.layer is None:
                layer = f" - {self.metrics.chosen}"
            elif self.row.layer not in self.metrics.layers:
                layer = f" (here {self.metrics.chosen})"
        found = f": {self.found}" if self.found else ""
        return f"{self.row.model}{layer}{found}{' (RANDOM weights)' if self.has_random_weights else ''}"


@dataclass(frozen=True)
class StudyResults:
    """The results of a study so far.

    Attributes:
        name: of its folder.
        facts: what all rows have in common.
        rows: in the table's order.
    """

    name: str
    facts: StudyFacts
    rows: list[StudyResult]

    @property
    def is_comparable(self) -> bool:
        """Whether the scores so far are of the published recording and split, at full size."""
        scored = [result.metrics for result in self.rows if result.metrics is not None]
        return not self.facts.small and bool(scored) and all(map(_is_published_recording, scored))

    @property
    def tables(self) -> list[Table]:
        """The study's Table I, and its other systems."""
        printed = [result for result in self.rows if result.published is not None]
        others = [result for result in self.rows if result.published is None]
        tables = [self._table(f"{self._kind}Table I", printed, self.is_comparable)]
        if any(result.state.state != "waiting" for result in others):
            tables.append(self._table(f"{self._kind}The study's other systems", others, False))
        return tables

    @property
    def _kind(self) -> str:
        return "SMALL, not the study: " if self.facts.small else ""

    @cached_property
    def figure(self) -> ReportFigure | None:
        """The study's Figure 1: explained variance by layer of the pretrained ResNet-50; None before it is scored."""
        result = next((result for result in self.rows if result.row.name == FIGURE_ROW), None)
        if result is None or result.metrics is None:
            return None
        metrics, regression = result.metrics, result.metrics.regression
        scores = {name: layer.regression.explained_variance.per_site for name, layer in metrics.layers.items()}
        weights = "RANDOM weights" if result.has_random_weights else "pretrained"
        simulated = " (SIMULATED)" if metrics.simulated else ""
        title = (
            f"{self._kind}ResNet-50, {weights}: {metrics.recording}{simulated}, {metrics.stimuli} stimuli of {SPLIT}"
        )
        ceiling = regression.ceiling.mean if regression is not None and regression.ceiling is not None else None
        caption = f"The study's Figure 1. {title}. Explained variance of the sites by layer"
        if self.is_comparable and result.published is not None:
            caption += f"; the study has a mean of {result.published.explained_variance} at layer 3"
        figure = draw_layers(scores, metrics.chosen, title, ceiling)
        return ReportFigure(
            f"{file_name(self.name)}_figure_1", f"{caption}.", {kind: encode(figure, kind) for kind in FORMATS}
        )

    def _table(self, title: str, rows: Sequence[StudyResult], has_published: bool) -> Table:
        columns = [
            Column("", fields=("family", "row"), formats=EVERYWHERE, is_text=True, style="family"),
            Column("Model", fields=("model",), formats=EVERYWHERE, is_text=True),
            Column("R2", "↑", ("r2",), EVERYWHERE),
            Column("MSE", "↓", ("mse",), EVERYWHERE, ascending=True),
            Column("EV", "↑", ("explained_variance",), EVERYWHERE),
        ]
        if has_published:
            headings = ("published R2", "published MSE", "published EV")
            columns += [
                Column(heading, fields=(field,), formats=EVERYWHERE, style="published")
                for heading, field in zip(headings, PUBLISHED_FIELDS, strict=True)
            ]
        columns += [
            Column("selected on", fields=("selected_on",), formats=frozenset({PAGE, MARKDOWN, CSV}), is_text=True),
            Column("state", fields=("state", "reason"), formats=EVERYWHERE, is_text=True),
        ]
        best = {} if self.facts.small else {metric: _best(rows, metric) for metric in METRICS}
        cells = [_cells(result, best, has_published) for result in rows]
        return Table(title, columns, cells, notes=self._notes(rows, has_published))

    def _notes(self, rows: Sequence[StudyResult], has_published: bool) -> list[str]:
        scored = [result.metrics for result in rows if result.metrics is not None]
        notes = []
        if scored:
            first = scored[0]
            simulated = " SIMULATED: no brain took part." if first.simulated else ""
            notes.append(f"Ours: {first.recording}, {first.stimuli:,} stimuli of {SPLIT}.{simulated}")
        if self.facts.small:
            notes.append("Rows at reduced size (--small): that they run is all that they say.")
        else:
            notes.append("Bold: the best of a column, whether or not other stimuli would reverse the order.")
        if any(result.has_random_weights for result in rows):
            notes.append(
                "RANDOM weights: pretrained ones could not be had; such a row is not the system it is named after."
            )
        if has_published:
            notes.append(f"Published: {published.SOURCE}.")
            if self.facts.selects_on == "inner":
                notes.append("Ours selected epochs on a part of train; the published models were selected on val.")
        elif any(result.published is not None for result in rows):
            notes.append("The published numbers are of another recording, or of larger runs, and are not shown here.")
        return notes


def _is_published_recording(metrics: Metrics) -> bool:
    if metrics.simulated or metrics.split != SPLIT or metrics.stimuli != published.STIMULI:
        return False
    return metrics.regression is None or metrics.regression.sites == published.SITES


def _best(rows: Sequence[StudyResult], metric: str) -> float | None:
    """The best score of some rows by a metric; None where none is scored."""
    means = [mean for result in rows if (mean := _mean(result.regression, metric)) is not None]
    return (min if metric in LOWER_IS_BETTER else max)(means, default=None)


def _cells(result: StudyResult, best: Mapping[str, float | None], has_published: bool) -> list[Cell]:
    means = {metric: _mean(result.regression, metric) for metric in METRICS}
    scores = [
        Cell(number(mean), values=(mean,), is_best=mean is not None and mean == best.get(metric))
        for metric, mean in means.items()
    ]
    beside = [EMPTY] * len(PUBLISHED_FIELDS)
    if has_published and result.published is not None and not result.has_random_weights:
        numbers = (result.published.r2, result.published.mse, result.published.explained_variance)
        beside = [Cell(text, values=(float(text),)) for text in numbers]
    state, reason = result.state.state, printable(result.state.reason)
    selected = "" if result.metrics is None else selected_on(result.metrics)
    return [
        Cell(result.row.family, values=(result.row.family, result.row.name)),
        Cell(result.title, values=(result.title,)),
        *scores,
        *(beside if has_published else []),
        Cell(selected, values=(selected,)),
        Cell(state, values=(state, reason), description=reason),
    ]


def _mean(regression: Regression | None, metric: str) -> float | None:
    score = None if regression is None else regression.score(metric)
    return None if score is None else score.mean


# --------------------------------------------------------------------------------------------------------- reading


def is_study(path: Path) -> bool:
    """Whether a folder was made by train/study.py."""
    return StudyFolder(path).is_study


def read_study(path: Path) -> StudyResults:
    """Read the results so far.

    Raises:
        BadInput: a file is damaged.
    """
    folder = StudyFolder(path)
    facts, states = folder.known(), folder.read_states()
    by_row = {numbers.row: numbers for numbers in published.TABLE}
    others = [row for name, row in ROWS.items() if name in states and name not in by_row]
    rows = [*(ROWS[name] for name in by_row), *sorted(others, key=lambda row: FAMILIES.index(row.family))]
    not_asked = RowState("not asked for")
    results = [_result(folder, facts, row, states.get(row.name, not_asked), by_row.get(row.name)) for row in rows]
    return StudyResults(printable(path.absolute().name), facts, results)


def _result(
    folder: StudyFolder, facts: StudyFacts, row: Row, state: RowState, numbers: published.Published | None
) -> StudyResult:
    path = folder.run_of(row, row.steps[-1], facts)
    search = read_sweep(path) if is_sweep(path) else None
    run = path if search is None else search.best
    metrics_file = None if run is None else RunFolder(run).evaluation(SPLIT) / METRICS_FILE
    return StudyResult(
        row=row,
        state=state,
        metrics=read_metrics(metrics_file) if metrics_file is not None and metrics_file.is_file() else None,
        found="" if search is None else _found(search),
        has_random_weights=facts.has_random_weights(row),
        published=numbers,
    )


def _found(search: SweepResults) -> str:
    """The settings that a search has found best, and the number of trials that could not be compared."""
    if search.best is None:
        return ""
    optimizer = read_settings(RunFolder(search.best).recipe).get("optimizer", {})
    words = [f"{key} {printable(str(optimizer[key]))}" for key in ("name", "lr") if key in optimizer]
    return ", ".join([*words, *([f"{search.failed} trials failed"] if search.failed else [])])


def runs_of_study(path: Path) -> list[Path]:
    """The runs, probes and searches of a study, as far as they have begun.

    Raises:
        BadInput: a file is damaged.
    """
    folder = StudyFolder(path)
    facts = folder.known()
    folders = [folder.run_of(row, step, facts) for row in ROWS.values() for step in row.steps]
    return [run for run in folders if RunFolder(run).recipe.is_file()]  # a search has one too
