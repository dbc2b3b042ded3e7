"""The figures of a report, drawn for a paper: vector graphics, legible in print, told apart by any colour vision."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from train.evaluation.metrics import LOWER_IS_BETTER
from train.evaluation.plots import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    draw_layers,
    encoded,
    finished,
    known,
    new_figure,
    plain,
)
from train.evaluation.prediction_plots import draw_confusion, short
from train.reporting.data_efficiency import gains, have_seeds
from train.reporting.rows import Row
from train.reporting.tables import Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("svg", "pdf", "png")
COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, "0.35")
LINES = ("-", "--", ":", "-.")
WIDTH = 7.0  # inches, two columns of a journal
MOST_CURVES = 12
LEAST_SHOWN = -0.5  # R2 has no lower bound: a hopeless site must not make all others look alike
MOST_CLASSES = 80
LEAST_BETWEEN = 0.08  # two ticks' labels, as a part of a logarithmic axis
CONFUSION = "confusion"  # begins the names of such figures


@dataclass(frozen=True)
class Figure:
    """A figure in all its formats.

    Attributes:
        name: of its files.
        caption: what it shows, for people who cannot see it as well.
        files: its bytes by format.
    """

    name: str
    caption: str
    files: dict[str, bytes]


def figures(
    groups: Sequence[Group], rows: Sequence[Row], pair: tuple[Path, Path] | None
) -> Iterator[tuple[Group | None, Figure]]:
    """Draw everything that there is data for, each with the group it belongs to.

    Args:
        groups: of runs that can be compared.
        rows: all runs, scored or not.
        pair: whose sites are compared one by one; by default the two best of each group.
    """
    for number, group in enumerate(groups):
        suffix = f"_{number + 1}" if len(groups) > 1 else ""
        for name, caption, figure in _of_group(group, pair):
            yield group, _figure(f"{name}{suffix}", caption, figure)
    curves = [row for row in rows if len(row.epochs) > 1]
    if curves:
        yield None, _figure("learning_curves", _learning_caption(curves), learning_curves(curves))
    for row in rows:
        if row.classes is not None and len(row.classes["class_id"]) <= MOST_CLASSES:
            caption = f"{row.name}: which object was named for which; rows add up to 1."
            yield None, _figure(f"{CONFUSION}_{file_name(row.name)}", caption, confusion(row))


def _of_group(group: Group, pair: tuple[Path, Path] | None) -> Iterator[tuple[str, str, "Figure"]]:
    yield (
        "sites",
        f"R2 of every site (dots), its mean with the 95 % interval over stimuli (ring). {group.title}.",
        sites(group),
    )
    if group.curves:
        yield "data_efficiency", _efficiency_caption(group), data_efficiency(group)
    for row in group.rows:
        if len(row.metrics.layers) > 1:
            scores = {name: block.regression.explained_variance.per_site for name, block in row.metrics.layers.items()}
            figure = draw_layers(scores, row.metrics.chosen, row.name, group.ceiling.mean if group.ceiling else None)
            caption = f"{row.name}: explained variance by layer, its distribution over sites. {group.title}."
            yield f"layers_{file_name(row.name)}", caption, figure
    named = [row for path in pair or () for row in group.rows if row.path == path]
    two = named if len(named) == 2 else group.ranked()[1::-1]
    if len(two) == 2:
        caption = f"R2 site by site: {two[0].title} and {two[1].title}; above the line the second is better."
        yield "site_by_site", caption, site_by_site(group, *two)


def _figure(name: str, caption: str, figure: "Figure") -> Figure:
    return Figure(name, caption, {kind: encoded(figure, kind) for kind in FORMATS})


def file_name(name: str) -> str:
    """A run's name as a part of a file's name."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in name)[:80]


def sites(group: Group) -> "Figure":
    """The sites' R2, a line of dots per model, the best on top."""
    rows = group.ranked()[::-1]
    figure = new_figure(WIDTH, 0.42 * len(rows) + 1.3)
    axes = figure.add_subplot()
    low = _foot([value for row in rows for value in known(row.regression.r2.per_site)])
    for place, row in enumerate(rows):
        values = known(row.regression.r2.per_site)
        jitter = np.random.default_rng(0).uniform(-0.27, 0.27, len(values))
        shown = np.maximum(values, low)
        inside = values >= low
        axes.scatter(shown[inside], place + jitter[inside], s=9, color=BLUE, alpha=0.35, linewidths=0)
        axes.scatter(shown[~inside], place + jitter[~inside], s=12, color=BLUE, alpha=0.35, marker="<", linewidths=0)
        if row.regression.r2.ci95:
            axes.plot(row.regression.r2.ci95, [place, place], color="black", linewidth=2, solid_capstyle="butt")
        if row.regression.r2.mean is not None:
            axes.plot(
                max(row.regression.r2.mean, low), place, "o", color="white", markeredgecolor="black", markersize=6
            )
    axes.axvline(0, color="0.7", linewidth=0.6, zorder=0)
    if (ceiling := group.ceiling_of(group.columns[0])) is not None:
        axes.axvline(ceiling, color="black", linestyle="--", linewidth=1)
        axes.text(ceiling, len(rows) - 0.45, "ceiling", ha="center", va="bottom", fontsize=8)
    axes.set_yticks(range(len(rows)), [plain(short(row.title)) for row in rows], fontsize=9)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("R² of a site")
    axes.grid(axis="x", color="0.92", zorder=0)
    axes.set_axisbelow(True)
    return finished(figure, axes, "")


def _foot(values: Sequence[float]) -> float:
    """Where an axis of R2 begins: at the least value, unless that is hopeless."""
    return max(min(values, default=0.0), LEAST_SHOWN)


def site_by_site(group: Group, below: Row, above: Row) -> "Figure":
    """The sites' R2 under one model against that under another."""
    x, y = ([np.nan if v is None else v for v in row.regression.r2.per_site] for row in (below, above))
    x, y = np.array(x), np.array(y)
    there = np.isfinite(x) & np.isfinite(y)
    x, y = x[there], y[there]
    figure = new_figure(4.2, 4.2)
    axes = figure.add_subplot()
    low, high = _foot([*x, *y]), max([*x, *y, 0.05])
    margin = 0.05 * (high - low)
    ends = (low - margin, high + margin)
    axes.plot(ends, ends, color="0.6", linewidth=0.8, zorder=0)
    better = y > x
    for part, colour, marker in ((better, VERMILLION, "o"), (~better, BLUE, "s")):
        places = np.maximum(x[part], low), np.maximum(y[part], low)
        axes.scatter(*places, s=22, color=colour, alpha=0.65, marker=marker, linewidths=0)
    axes.text(
        0.04, 0.96, f"better at {better.sum()} sites", transform=axes.transAxes, va="top", color=VERMILLION, fontsize=9
    )
    axes.text(
        0.96, 0.04, f"better at {(x > y).sum()} sites", transform=axes.transAxes, ha="right", color=BLUE, fontsize=9
    )
    axes.set(xlim=ends, ylim=ends, aspect="equal")
    axes.set_xlabel(f"R², {plain(short(below.title, 34))}")
    axes.set_ylabel(f"R², {plain(short(above.title, 34))}")
    return finished(figure, axes, "")


def data_efficiency(group: Group) -> "Figure":
    """R2 by the number of training stimuli, a line per system."""
    shown, seeds = group.curves[:MOST_CURVES], have_seeds(group.curves)
    figure = new_figure(WIDTH, 3.4 + 0.19 * math.ceil(len(shown) / 2))
    axes = figure.add_subplot()
    for number, curve in enumerate(shown):
        style = _style(number)
        sizes, means = [point.stimuli for point in curve.points], [point.mean for point in curve.points]
        bands = [point.spread if seeds else point.ci95 for point in curve.points]
        low, high = np.array([(np.nan, np.nan) if band is None else band for band in bands]).T
        axes.fill_between(sizes, low, high, color=style["color"], alpha=0.13, linewidth=0)
        axes.plot(sizes, means, "o", markersize=5, linewidth=1.5, **style, label=plain(short(curve.name, 40)))
    if (ceiling := group.ceiling_of(group.columns[0])) is not None:
        axes.axhline(ceiling, color="black", linestyle="--", linewidth=1)
        axes.text(0.01, ceiling, "ceiling", transform=axes.get_yaxis_transform(), va="bottom", fontsize=8)
    _limit(axes)
    axes.set_xscale("log")
    ticks = _apart(group.sizes)
    axes.set_xticks(ticks, [f"{size:,}" for size in ticks])
    axes.minorticks_off()
    axes.set(xlabel="training stimuli", ylabel="R², mean over sites")
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return finished(figure, axes, "")


def _apart(sizes: Sequence[int]) -> list[int]:
    """Those of some ascending numbers that can be written below a logarithmic axis, the greatest among them."""
    found = [sizes[-1]]
    for size in reversed(sizes):
        if found[0] / size >= (sizes[-1] / sizes[0]) ** LEAST_BETWEEN:
            found.insert(0, size)
    return found


def _efficiency_caption(group: Group) -> str:
    curves = group.curves
    more = f" (the first {MOST_CURVES} of {len(curves)} systems)" if len(curves) > MOST_CURVES else ""
    band = "from the least to the greatest of several seeds" if have_seeds(curves) else "95 % interval over stimuli"
    told = f" {gains(curves)}" if gains(curves) else ""
    return f"R2 by the number of training stimuli{more}; band: {band}.{told} {group.title}."


def learning_curves(rows: Sequence[Row]) -> "Figure":
    """Loss and selection metric by epoch; the ring is the epoch that was taken."""
    shown = rows[:MOST_CURVES]
    figure = new_figure(WIDTH, 2.9 + 0.19 * math.ceil(len(shown) / 2))
    left, right = figure.subplots(1, 2)
    for number, row in enumerate(shown):
        style = _style(number)
        _curve(
            left, [(line["epoch"], line.get("loss")) for line in row.epochs], **style, label=plain(short(row.name, 40))
        )
        _curve(right, _selection(row), **style)
        best = [
            (line["epoch"], value)
            for line, (_, value) in zip(row.epochs, _selection(row), strict=True)
            if line.get("best")
        ]
        if best and best[-1][1] is not None:
            right.plot(*best[-1], "o", color="white", markeredgecolor=style["color"], markersize=6, zorder=4)
    _limit(right)
    for axes, label in ((left, "training loss"), (right, _selection_label(shown))):
        axes.set(xlabel="epoch", ylabel=label)
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.xaxis.get_major_locator().set_params(integer=True)
        finished(figure, axes, "")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def _learning_caption(rows: Sequence[Row]) -> str:
    more = f" (the first {MOST_CURVES} of {len(rows)} runs)" if len(rows) > MOST_CURVES else ""
    return f"Training loss and the metric that selects, by epoch; the ring is the best epoch{more}."


def _style(number: int) -> dict[str, str]:
    """Colour and line of one of several curves."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": LINES[number // len(COLOURS) % len(LINES)]}


def _curve(axes: "Axes", points: Sequence[tuple[int, float | None]], **style) -> None:
    points = [(x, y) for x, y in points if isinstance(y, int | float)]
    axes.plot([x for x, _ in points], [y for _, y in points], linewidth=1.5, **style)


def _selecting(row: Row) -> tuple[str, str]:
    """The split and the metric that choose a run's epoch."""
    settings = row.recipe.get("early_stopping")
    settings = settings if isinstance(settings, dict) else {}
    kind, loss = (row.recipe.get(name) if isinstance(row.recipe.get(name), dict) else {} for name in ("task", "loss"))
    usual = "pearson_r" if loss.get("responses") == "correlation" else "r2"
    usual = "top1" if kind.get("kind") == "classification" else usual
    return str(settings.get("split") or "inner"), str(settings.get("metric") or usual)


def _selection(row: Row) -> list[tuple[int, float | None]]:
    split, metric = _selecting(row)
    scores = [line.get(split) for line in row.epochs]
    values = [score.get(metric) if isinstance(score, dict) else None for score in scores]
    return [
        (line["epoch"], v if isinstance(v, int | float) else None) for line, v in zip(row.epochs, values, strict=True)
    ]


def _selection_label(rows: Sequence[Row]) -> str:
    names = {"r2": "R²", "explained_variance": "EV", "mse": "MSE", "pearson_r": "Pearson r", "top1": "top-1"}
    found = {_selecting(row) for row in rows}
    if len(found) > 1:
        return "metric that selects"
    split, metric = found.pop()
    return f"{names.get(metric, metric)} on {split}{' (lower is better)' if metric in LOWER_IS_BETTER else ''}"


def _limit(axes: "Axes") -> None:
    """Cut the first epochs' hopeless values off where they would flatten all others."""
    values = [y for line in axes.lines for y in line.get_ydata()]
    low, high = min(values, default=0), max(values, default=1)
    if low < LEAST_SHOWN <= high:
        axes.set_ylim(LEAST_SHOWN, high + 0.05 * (high - LEAST_SHOWN))


def confusion(row: Row) -> "Figure":
    """Which object was named for which, as shares of those shown."""
    names, shown, named = (row.classes[key] for key in ("class_id", "class", "predicted_class"))
    return draw_confusion([str(name) for name in names], shown, named, row.name)
