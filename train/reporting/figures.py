"""The figures of a report, drawn for a paper: vector graphics that are legible in print and with any colour vision."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from train.evaluation.figures.figure_style import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    FileFormat,
    encode,
    escape_formulas,
    finish,
    known_scores,
    new_figure,
    shorten,
)
from train.evaluation.figures.layer_figure import draw_layers, layer_label
from train.evaluation.figures.prediction_figures import draw_confusion
from train.evaluation.metrics import LOWER_IS_BETTER, TITLES
from train.reporting.data_efficiency import describe_gains, have_seeds
from train.reporting.groups import R2, Group
from train.reporting.reported_run import ReportedRun, ScoredRun
from train.reporting.run_files import Metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS: tuple[FileFormat, ...] = ("svg", "pdf", "png")
COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, "0.35")
LINES = ("-", "--", ":", "-.")
WIDTH = 7.0  # inches, two columns of a journal
MOST_CURVES = 12
LOWEST_SHOWN = -0.5  # R2 has no lower bound: a hopeless site must not make all others look alike
MOST_CLASSES = 80
LEAST_GAP = 0.08  # between two ticks' labels, as a fraction of a logarithmic axis
METRIC_LABELS = TITLES | {"r2": "R²"}


@dataclass(frozen=True)
class ReportFigure:
    """A figure in all its formats.

    Attributes:
        name: of its files.
        caption: what it shows, also for people who cannot see it.
        files: its bytes by format.
        is_heat_map: whether brightness stands for numbers, so that a dark page must not invert it.
    """

    name: str
    caption: str
    files: dict[FileFormat, bytes]
    is_heat_map: bool = False


class EpochValue(NamedTuple):
    """A value after an epoch."""

    epoch: int
    value: float


def report_figure(name: str, caption: str, figure: "Figure", is_heat_map: bool = False) -> ReportFigure:
    """A drawn figure in all formats."""
    return ReportFigure(name, caption, {kind: encode(figure, kind) for kind in FORMATS}, is_heat_map)


def file_name(name: str) -> str:
    """A run's name as a part of a file's name."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in name)[:80]


# ----------------------------------------------------------------------------------------------------- of one group


def group_figures(group: Group, pair: tuple[Path, Path] | None, suffix: str) -> Iterator[ReportFigure]:
    """Draw every figure that the group has data for.

    Args:
        group: runs that can be compared.
        pair: the runs to compare site by site; by default the two best.
        suffix: of the files' names, which distinguishes groups.
    """
    caption = f"R2 of every site (dots), its mean with the 95 % interval over stimuli (ring). {group.title}."
    yield report_figure(f"sites{suffix}", caption, draw_site_scores(group))
    if group.curves:
        yield report_figure(f"data_efficiency{suffix}", _efficiency_caption(group), draw_data_efficiency(group))
    for scored in group.runs:
        if len(scored.metrics.layers) > 1:
            yield _layer_figure(group, scored, suffix)
    runs = [scored for path in pair or () for scored in group.runs if scored.run.path == path]
    if len(runs) != 2:
        runs = [group.runs[index] for index in group.ranking[1::-1]]
    if len(runs) == 2:
        below, above = runs
        caption = f"R2 site by site: {below.run.title} and {above.run.title}; above the line the second is better."
        yield report_figure(f"site_by_site{suffix}", caption, draw_site_by_site(below, above))


def _layer_figure(group: Group, scored: ScoredRun, suffix: str) -> ReportFigure:
    name, metrics = scored.run.name, scored.metrics
    scores = {layer: block.regression.explained_variance.per_site for layer, block in metrics.layers.items()}
    figure = draw_layers(scores, metrics.chosen, name, group.ceiling.mean if group.ceiling else None)
    caption = f"{name}: explained variance by layer, its distribution over sites. {_best_layers(metrics)}{group.title}."
    return report_figure(f"layers_{file_name(name)}{suffix}", caption, figure)


def _best_layers(metrics: Metrics) -> str:
    """The layers that may be the best by R2, in a sentence; empty where that is not known."""
    standings = {name: layer.standing for name, layer in metrics.layers.items() if layer.standing is not None}
    if not standings:
        return ""
    first = sorted(
        (-standing.ranks.probability[0], name) for name, standing in standings.items() if standing.ranks.best == 1
    )
    names = [f"{layer_label(name)} (best on {-share:.0%} of resamples)" for share, name in first]
    return f"Best by R2, adjusted for {len(standings)} layers: {' or '.join(names)}. "


def draw_site_scores(group: Group) -> "Figure":
    """The sites' R2, a line of dots per model, the best on top."""
    runs = [group.runs[index] for index in group.ranking[::-1]]
    figure = new_figure(WIDTH, 0.42 * len(runs) + 1.3)
    axes = figure.add_subplot()
    low = _lowest([value for scored in runs for value in known_scores(scored.regression.r2.per_site)])
    for index, scored in enumerate(runs):
        _draw_sites_of(axes, index, scored, low)
    axes.axvline(0, color="0.7", linewidth=0.6, zorder=0)
    if (ceiling := group.ceiling_of(R2)) is not None:
        axes.axvline(ceiling, color="black", linestyle="--", linewidth=1)
        axes.text(ceiling, len(runs) - 0.45, "ceiling", ha="center", va="bottom", fontsize=8)
    axes.set_yticks(range(len(runs)), [escape_formulas(shorten(scored.run.title)) for scored in runs], fontsize=9)
    axes.set_ylim(-0.6, len(runs) - 0.4)
    axes.set_xlabel("R² of a site")
    axes.grid(axis="x", color="0.92", zorder=0)
    axes.set_axisbelow(True)
    return finish(figure, axes, "")


def _draw_sites_of(axes: "Axes", index: int, scored: ScoredRun, low: float) -> None:
    """Dots at a height; triangles stand for sites below the axis's end."""
    r2 = scored.regression.r2
    values = known_scores(r2.per_site)
    heights = index + np.random.default_rng(0).uniform(-0.27, 0.27, len(values))
    inside = values >= low
    shown = np.maximum(values, low)
    axes.scatter(shown[inside], heights[inside], s=9, color=BLUE, alpha=0.35, linewidths=0)
    axes.scatter(shown[~inside], heights[~inside], s=12, color=BLUE, alpha=0.35, marker="<", linewidths=0)
    if r2.ci95:
        axes.plot(r2.ci95, [index, index], color="black", linewidth=2, solid_capstyle="butt")
    if r2.mean is not None:
        axes.plot(max(r2.mean, low), index, "o", color="white", markeredgecolor="black", markersize=6)


def _lowest(values: Sequence[float]) -> float:
    """Where an axis of R2 begins: at the lowest value, unless that is hopeless."""
    return max(min(values, default=0.0), LOWEST_SHOWN)


def draw_site_by_site(below: ScoredRun, above: ScoredRun) -> "Figure":
    """The sites' R2 under one model against that under another."""
    x, y = (np.array(scored.regression.r2.per_site, dtype=float) for scored in (below, above))  # None becomes NaN
    both = np.isfinite(x) & np.isfinite(y)
    x, y = x[both], y[both]
    figure = new_figure(4.2, 4.2)
    axes = figure.add_subplot()
    low, high = _lowest([*x, *y]), max([*x, *y, 0.05])
    margin = 0.05 * (high - low)
    ends = (low - margin, high + margin)
    axes.plot(ends, ends, color="0.6", linewidth=0.8, zorder=0)
    better = y > x
    for sites, colour, marker in ((better, VERMILLION, "o"), (~better, BLUE, "s")):
        shown_x, shown_y = np.maximum(x[sites], low), np.maximum(y[sites], low)
        axes.scatter(shown_x, shown_y, s=22, color=colour, alpha=0.65, marker=marker, linewidths=0)
    above_count, below_count = np.count_nonzero(better), np.count_nonzero(x > y)
    corner = axes.transAxes
    axes.text(0.04, 0.96, f"better at {above_count} sites", transform=corner, va="top", color=VERMILLION, fontsize=9)
    axes.text(0.96, 0.04, f"better at {below_count} sites", transform=corner, ha="right", color=BLUE, fontsize=9)
    axes.set(xlim=ends, ylim=ends, aspect="equal")
    axes.set_xlabel(f"R², {escape_formulas(shorten(below.run.title, 34))}")
    axes.set_ylabel(f"R², {escape_formulas(shorten(above.run.title, 34))}")
    return finish(figure, axes, "")


def draw_data_efficiency(group: Group) -> "Figure":
    """R2 by the number of training stimuli, a line per system."""
    curves, seeds = group.curves[:MOST_CURVES], have_seeds(group.curves)
    figure = new_figure(WIDTH, 3.4 + 0.19 * math.ceil(len(curves) / 2))
    axes = figure.add_subplot()
    shown: list[float] = []
    for index, curve in enumerate(curves):
        sizes, means = [point.stimuli for point in curve.points], [point.mean for point in curve.points]
        bands = [point.spread if seeds else point.ci95 for point in curve.points]
        low, high = np.array([(np.nan, np.nan) if band is None else band for band in bands]).T
        axes.fill_between(sizes, low, high, color=_colour(index), alpha=0.13, linewidth=0)
        _draw_line(axes, index, sizes, means, escape_formulas(shorten(curve.name, 40)), marker="o")
        shown += means
    if (ceiling := group.ceiling_of(R2)) is not None:
        axes.axhline(ceiling, color="black", linestyle="--", linewidth=1)
        axes.text(0.01, ceiling, "ceiling", transform=axes.get_yaxis_transform(), va="bottom", fontsize=8)
        shown.append(ceiling)
    _cut_off_hopeless(axes, shown)
    axes.set_xscale("log")
    ticks = _readable_ticks(group.training_sizes)
    axes.set_xticks(ticks, [f"{size:,}" for size in ticks])
    axes.minorticks_off()
    axes.set(xlabel="training stimuli", ylabel="R², mean over sites")
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return finish(figure, axes, "")


def _readable_ticks(sizes: Sequence[int]) -> list[int]:
    """Those of some ascending numbers whose labels do not overlap on a logarithmic axis, including the largest."""
    ticks = [sizes[-1]]
    for size in reversed(sizes):
        if ticks[0] / size >= (sizes[-1] / sizes[0]) ** LEAST_GAP:
            ticks.insert(0, size)
    return ticks


def _efficiency_caption(group: Group) -> str:
    curves = group.curves
    first = f" (the first {MOST_CURVES} of {len(curves)} systems)" if len(curves) > MOST_CURVES else ""
    band = "from the lowest to the highest of several seeds" if have_seeds(curves) else "95 % interval over stimuli"
    sentences = [f"R2 by the number of training stimuli{first}; band: {band}.", describe_gains(curves)]
    return " ".join(sentence for sentence in (*sentences, f"{group.title}.") if sentence)


# ----------------------------------------------------------------------------------------------------- of all runs


def training_figure(runs: Sequence[ReportedRun]) -> ReportFigure | None:
    """The learning curves of the runs that have some; None where none has."""
    trained = [run for run in runs if len(run.epochs) > 1]
    if not trained:
        return None
    first = f" (the first {MOST_CURVES} of {len(trained)} runs)" if len(trained) > MOST_CURVES else ""
    caption = f"Training loss and selection metric by epoch; the ring is the best epoch{first}."
    return report_figure("learning_curves", caption, draw_learning_curves(trained[:MOST_CURVES]))


def draw_learning_curves(runs: Sequence[ReportedRun]) -> "Figure":
    """Loss and selection metric by epoch; the ring is the best epoch."""
    figure = new_figure(WIDTH, 2.9 + 0.19 * math.ceil(len(runs) / 2))
    left, right = figure.subplots(1, 2)
    shown: list[float] = []
    for index, run in enumerate(runs):
        losses = [EpochValue(line["epoch"], line["loss"]) for line in run.epochs if _is_number(line.get("loss"))]
        _draw_epochs(left, index, losses, escape_formulas(shorten(run.name, 40)))
        selection = Selection.of(run)
        values = selection.values(run.epochs)
        _draw_epochs(right, index, values)
        shown += [value for _, value in values]
        best = [line for line in run.epochs if line.get("best")][-1:]
        for epoch, value in selection.values(best):
            right.plot(epoch, value, "o", color="white", markeredgecolor=_colour(index), markersize=6, zorder=4)
    _cut_off_hopeless(right, shown)
    for axes, label in ((left, "training loss"), (right, _selection_label(runs))):
        axes.set(xlabel="epoch", ylabel=label)
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.xaxis.get_major_locator().set_params(integer=True)
        finish(figure, axes, "")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


@dataclass(frozen=True)
class Selection:
    """The split and the metric that select a run's epoch."""

    split: str
    metric: str

    @classmethod
    def of(cls, run: ReportedRun) -> "Selection":
        """As the run's recipe says; the default metric follows from task and loss."""
        metric = "pearson_r" if run.setting("loss.responses") == "correlation" else "r2"
        if run.setting("task.kind") == "classification":
            metric = "top1"
        split = run.setting("early_stopping.split") or "inner"
        return cls(str(split), str(run.setting("early_stopping.metric") or metric))

    @property
    def label(self) -> str:
        """For an axis."""
        direction = " (lower is better)" if self.metric in LOWER_IS_BETTER else ""
        return f"{METRIC_LABELS.get(self.metric, self.metric)} on {self.split}{direction}"

    def values(self, epochs: Sequence[dict]) -> list[EpochValue]:
        """The metric at those epochs that have it."""
        scores = [(line["epoch"], line.get(self.split)) for line in epochs]
        return [
            EpochValue(epoch, score[self.metric])
            for epoch, score in scores
            if isinstance(score, dict) and _is_number(score.get(self.metric))
        ]


def _selection_label(runs: Sequence[ReportedRun]) -> str:
    labels = {Selection.of(run).label for run in runs}
    return labels.pop() if len(labels) == 1 else "selection metric"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _draw_epochs(axes: "Axes", index: int, values: Sequence[EpochValue], label: str = "") -> None:
    _draw_line(axes, index, [epoch for epoch, _ in values], [value for _, value in values], label)


def _draw_line(axes: "Axes", index: int, x: Sequence[float], y: Sequence[float], label: str, marker: str = "") -> None:
    """One of several curves, in its colour and line style."""
    line = LINES[index // len(COLOURS) % len(LINES)]
    axes.plot(x, y, linewidth=1.5, linestyle=line, color=_colour(index), marker=marker, markersize=5, label=label)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _cut_off_hopeless(axes: "Axes", values: Sequence[float]) -> None:
    """Leave out hopeless values, as of first epochs, where they would flatten all others."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if low < LOWEST_SHOWN <= high:
        axes.set_ylim(LOWEST_SHOWN, high + 0.05 * (high - LOWEST_SHOWN))


def confusion_figures(runs: Sequence[ReportedRun]) -> Iterator[ReportFigure]:
    """A confusion matrix for each run that predicts classes, unless these are too many to read."""
    for run in runs:
        classes = run.class_predictions
        if classes is not None and len(classes.names) <= MOST_CLASSES:
            figure = draw_confusion(classes.names, classes.shown, classes.predicted, run.name)
            caption = f"{run.name}: predicted classes by the class that was shown; rows add up to 1."
            yield report_figure(f"confusion_{file_name(run.name)}", caption, figure, is_heat_map=True)
