"""Scores by the metrics that other papers report: squared correlation, its noise-corrected form, and Brain-Score's."""

from train.reporting.groups import Group
from train.reporting.number_formats import interval, number
from train.reporting.run_files import BrainScoreForm, Regression, Score
from train.reporting.table import CSV, Cell, Column, Table, Value

CSV_COLUMN = Column(
    "metrics of other papers",
    fields=(
        *("squared_pearson_r", "squared_pearson_r_low", "squared_pearson_r_high"),
        *("squared_pearson_r_median", "squared_pearson_r_median_low", "squared_pearson_r_median_high"),
        *("r2_er", "r2_er_low", "r2_er_high", "r2_er_median", "r2_er_median_low", "r2_er_median_high"),
        *("brain_score", "brain_score_low", "brain_score_high"),
        *("brain_score_before_2026_01", "brain_score_before_2026_01_low", "brain_score_before_2026_01_high"),
    ),
    formats=frozenset({CSV}),
)
TITLES = ("r², mean", "r², median", "r²_ER, mean", "r²_ER, median", "Brain-Score", "Brain-Score before 2026")
NOTE = (
    "Compare with papers by the metric that they report (docs/metrics.md says which and how it is computed). These are "
    "correlations: unlike R2 they do not penalise predictions of a wrong mean, scale or sign."
)


def papers_metrics_table(group: Group) -> Table | None:
    """The models of a group by the metrics of other papers; None where no run has them (those of earlier versions)."""
    scores = [_scores(scored.regression) for scored in group.runs]
    known = [index for index in range(len(TITLES)) if any(of_run[index].values[0] is not None for of_run in scores)]
    if not known:
        return None
    columns = [Column("model", is_text=True), *(Column(TITLES[index], "↑") for index in known)]
    models = [Cell(scored.run.title, values=(scored.run.title,)) for scored in group.runs]
    rows = [[model, *(of_run[index] for index in known)] for model, of_run in zip(models, scores, strict=True)]
    return Table("Metrics of other papers", columns, rows, notes=[NOTE])


def papers_metrics_cell(regression: Regression) -> Cell:
    """All digits of a run's scores, for `CSV_COLUMN`."""
    values: list[Value] = [value for cell in _scores(regression) for value in cell.values]
    return Cell("", values=tuple(values))


def _scores(regression: Regression) -> list[Cell]:
    """A run's cells, one for each of `TITLES`."""
    plain, corrected, brain_score = regression.squared_pearson_r, regression.r2_er, regression.brain_score
    earlier = None if brain_score is None else brain_score.before_2026_01
    return [
        *(_mean(plain), _median(plain)),
        *(_mean(corrected), _median(corrected)),
        *(_brain_score(brain_score), _brain_score(earlier)),
    ]


def _mean(score: Score | None) -> Cell:
    return _cell(None, None) if score is None else _cell(score.mean, score.ci95)


def _median(score: Score | None) -> Cell:
    return _cell(None, None) if score is None else _cell(score.median, score.median_ci95)


def _brain_score(form: BrainScoreForm | None) -> Cell:
    return _cell(None, None) if form is None else _cell(form.score, form.ci95)


def _cell(value: float | None, ends: tuple[float, float] | None) -> Cell:
    return Cell(number(value), interval(ends), (value, *(ends or (None, None))))
