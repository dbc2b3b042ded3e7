"""The figure of a search: its values over the settings that vary.

Colours are cividis, where brighter is better.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from train.evaluation.figures.figure_style import encode, new_figure
from train.evaluation.metrics import TITLES
from train.sweeping.plan import SEED, Plan, as_choice
from train.sweeping.standings import Standings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

PointState = Literal["done", "failed", "waiting"]
MISSING = "0.88"
FAILED = "0.45"
ONE_COLOUR = "#31688e"


@dataclass(frozen=True)
class SettingAxis:
    """A setting of a search as an axis.

    Attributes:
        name: dotted.
        values: the choices, in the order in which they are shown; empty for an interval.
        log: whether an interval is sampled logarithmically.
    """

    name: str
    values: list[Any]
    log: bool = False

    @property
    def is_numeric(self) -> bool:
        """Whether its values are numbers."""
        return all(isinstance(value, int | float) for value in self.values)


@dataclass(frozen=True)
class Point:
    """A pair of values and its score; `y` is None where a single setting varies.

    Attributes:
        x, y: values of the two settings.
        state: done, failed, or waiting (including running).
        value: of the selection metric, where there is one; a point that failed with one seed has that of the others.
    """

    x: Any
    y: Any
    state: PointState
    value: float | None = None


@dataclass(frozen=True)
class ColourScale:
    """A colour map and the values at its ends."""

    colours: "Colormap"
    low: float
    high: float

    def clipped_ends(self, values: Sequence[float]) -> Literal["neither", "both", "min", "max"]:
        """Which ends of the colours also stand for values beyond them."""
        below, above = min(values, default=self.low) < self.low, max(values, default=self.high) > self.high
        if below and above:
            return "both"
        if below:
            return "min"
        return "max" if above else "neither"


@dataclass(frozen=True)
class SearchFigure:
    """What is drawn of a search.

    Attributes:
        points: one per pair of values, in any order.
        title: of the figure.
        label: of the value.
        lower_is_better: of the value.
    """

    points: Sequence[Point]
    title: str
    label: str
    lower_is_better: bool

    @property
    def done(self) -> list[tuple[Point, float]]:
        """The points with a value that no seed failed at."""
        return [(point, point.value) for point in self.points if point.state == "done" and point.value is not None]

    @property
    def failed(self) -> list[Point]:
        """The points that failed."""
        return [point for point in self.points if point.state == "failed"]

    @property
    def best(self) -> Point | None:
        """The best of those that are done."""
        sign = 1 if self.lower_is_better else -1
        return min(self.done, key=lambda pair: sign * pair[1], default=(None, None))[0]

    def draw(self, x: SettingAxis, y: SettingAxis | None) -> bytes:
        """A PNG: a heat map of two settings with choices, dots where one is an interval, a curve over a single one."""
        if y is None:
            return self._curve(x)
        return self._heat_map(x, y) if x.values and y.values else self._scatter(x, y)

    def _heat_map(self, x: SettingAxis, y: SettingAxis) -> bytes:
        """A cell with its value for each pair of choices; failed ones are hatched, the best is framed."""
        figure = new_figure(1.15 * len(x.values) + 3.2, 0.75 * len(y.values) + 1.9)
        axes = figure.add_subplot()
        cells = np.full((len(y.values), len(x.values)), np.nan)
        for point in self.points:
            if point.value is not None:
                cells[y.values.index(point.y), x.values.index(point.x)] = point.value
        values = [point.value for point in self.points if point.value is not None]
        scale = colour_scale(values, self.lower_is_better)
        image = axes.imshow(cells, origin="lower", aspect="auto", cmap=scale.colours, vmin=scale.low, vmax=scale.high)
        for point in self.points:
            _fill_cell(axes, x.values.index(point.x), y.values.index(point.y), point, image)
        if (best := self.best) is not None:
            column, row = x.values.index(best.x), y.values.index(best.y)
            _add_box(axes, column, row, edgecolor="black", linewidth=2.5, zorder=3)
        _label_choices(axes.xaxis, x)
        _label_choices(axes.yaxis, y)
        figure.colorbar(image, ax=axes, label=self.label, extend=scale.clipped_ends(values))
        return self._finish(figure, axes)

    def _scatter(self, x: SettingAxis, y: SettingAxis) -> bytes:
        """A dot for each pair of values, coloured by its value; crosses failed, the ring is the best."""
        figure = new_figure(7.0, 4.8)
        axes = figure.add_subplot()
        done, values = [point for point, _ in self.done], [value for _, value in self.done]
        scale = colour_scale(values, self.lower_is_better)
        dots = axes.scatter(
            _positions(x, [point.x for point in done]),
            _positions(y, [point.y for point in done]),
            c=values,
            s=70,
            cmap=scale.colours,
            vmin=scale.low,
            vmax=scale.high,
        )
        failed_x = _positions(x, [point.x for point in self.failed])
        axes.scatter(failed_x, _positions(y, [point.y for point in self.failed]), c=FAILED, marker="x", s=50)
        if (best := self.best) is not None:
            axes.scatter(_positions(x, [best.x]), _positions(y, [best.y]), s=200, facecolors="none", edgecolors="black")
        _label_axis(axes, "x", x)
        _label_axis(axes, "y", y)
        figure.colorbar(dots, ax=axes, label=self.label, extend=scale.clipped_ends(values))
        return self._finish(figure, axes)

    def _curve(self, x: SettingAxis) -> bytes:
        """The value over one setting: bars over choices, dots over an interval; crosses at the foot failed."""
        figure = new_figure(max(4.5, 1.0 * len(x.values) + 2), 3.8)
        axes = figure.add_subplot()
        positions, values = _positions(x, [point.x for point, _ in self.done]), [value for _, value in self.done]
        if x.values:
            bars = axes.bar(positions, values, color=ONE_COLOUR, width=0.6)
            axes.bar_label(bars, [_number(value) for value in values], padding=2, fontsize=9)
            axes.set_xlim(-0.6, len(x.values) - 0.4)
            axes.margins(y=0.15)
        else:
            axes.scatter(positions, values, color=ONE_COLOUR)
        failed = _positions(x, [point.x for point in self.failed])
        foot = [0.03] * len(failed)
        axes.plot(failed, foot, "x", color=FAILED, transform=axes.get_xaxis_transform(), label="failed")
        if failed:
            axes.legend(frameon=False)
        _label_axis(axes, "x", x)
        axes.set_ylabel(self.label)
        return self._finish(figure, axes)

    def _finish(self, figure: "Figure", axes: "Axes") -> bytes:
        axes.set_title(self.title, fontsize=10, wrap=True)
        return encode(figure)


def colour_scale(values: Sequence[float], lower_is_better: bool) -> ColourScale:
    """The colours of some values. R2 has no lower bound: one hopeless trial must not make all others look alike."""
    from matplotlib import colormaps

    sign = -1 if lower_is_better else 1
    ordered = sorted(sign * value for value in values) or [0.0, 1.0]
    worst, best = ordered[0], ordered[-1]
    foot = best - 4 * (best - float(np.median(ordered)))
    if foot < best:
        worst = max(worst, foot)
    low, high = sorted((sign * worst, sign * best))
    name = "cividis_r" if lower_is_better else "cividis"
    return ColourScale(colormaps[name].with_extremes(bad=MISSING), low, high)


def _fill_cell(axes: "Axes", column: int, row: int, point: Point, image: Any) -> None:
    text = point.state if point.value is None else _number(point.value)
    ink, box = "0.25", None
    if point.state == "failed":
        _add_box(axes, column, row, hatch="////", edgecolor="0.65", linewidth=0)
        box = {"facecolor": MISSING, "edgecolor": "none", "pad": 1.5}
    elif point.state == "done":
        ink = _ink(image.to_rgba(point.value))
    axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=9, bbox=box)


def _add_box(axes: "Axes", column: int, row: int, **style: Any) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((column - 0.49, row - 0.49), 0.98, 0.98, fill=False, **style))


def _ink(colour: Sequence[float]) -> str:
    """Black or white, whichever is easier to read on a colour (red, green, blue from 0 to 1)."""
    return "black" if float(np.dot(colour[:3], (0.299, 0.587, 0.114))) > 0.5 else "white"


def _number(value: float) -> str:
    """A value for a cell, at most seven characters."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1e}"


def _positions(axis: SettingAxis, values: Sequence[Any]) -> list[float]:
    return [axis.values.index(value) for value in values] if axis.values else list(values)


def _label_axis(axes: "Axes", which: Literal["x", "y"], setting: SettingAxis) -> None:
    if setting.values:
        _label_choices(axes.xaxis if which == "x" else axes.yaxis, setting)
        return
    if which == "x":
        axes.set(xlabel=setting.name, xscale="log" if setting.log else "linear")
    else:
        axes.set(ylabel=setting.name, yscale="log" if setting.log else "linear")


def _label_choices(axis: "Axis", setting: SettingAxis) -> None:
    from matplotlib.axis import XAxis

    labels = [f"{value:g}" if isinstance(value, float) else str(value) for value in setting.values]
    axis.set_ticks(range(len(labels)), labels)
    if isinstance(axis, XAxis) and max(map(len, labels)) > 10:
        axis.set_tick_params(rotation=30)
    axis.set_label_text(setting.name)


# ------------------------------------------------------------------------------------------------ what is drawn


def draw_search(standings: Standings) -> bytes:
    """A PNG of the value over the first two settings that vary, the best over all others."""
    plan = standings.plan
    settings = [key for key in plan.keys if key != SEED]
    varying = [key for key in settings if key in plan.ranges or len(plan.choices[key]) > 1]
    shown = varying[:2] or settings[:1]
    x, y = setting_axis(plan, shown[0]), setting_axis(plan, shown[1]) if len(shown) > 1 else None
    if y is not None and x.values and not x.is_numeric and y.is_numeric:
        x, y = y, x
    mean = f", mean over {len(plan.seeds)} seeds" if plan.seeds else ""
    others = f"\nin each place the best over {', '.join(varying[2:])}" if varying[2:] else ""
    figure = SearchFigure(
        points=best_points(standings, x, y),
        title=f"{TITLES[plan.metric]} on the inner split{mean}{others}",
        label=f"{TITLES[plan.metric]} ({'lower' if standings.lower_is_better else 'higher'} is better)",
        lower_is_better=standings.lower_is_better,
    )
    return figure.draw(x, y)


def setting_axis(plan: Plan, key: str) -> SettingAxis:
    """A setting as an axis; numbers ascend."""
    if key in plan.ranges:
        return SettingAxis(key, [], plan.ranges[key].log)
    values = plan.choices[key]
    are_numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return SettingAxis(key, sorted(values) if are_numbers else [as_choice(value) for value in values])


def best_points(standings: Standings, x: SettingAxis, y: SettingAxis | None) -> list[Point]:
    """One point per pair of values: the best, or else one that runs or waits, or else one that failed."""
    points: dict[tuple[Any, Any], Point] = {}
    order = {"done": 0, "running": 1, "waiting": 1, "failed": 2}
    for trial in sorted(standings.trials, key=lambda trial: order[trial.state]):  # stable: the best stays first
        if not trial.settings:
            continue
        pair = as_choice(trial.settings[x.name]), None if y is None else as_choice(trial.settings[y.name])
        state: PointState = "waiting"
        if trial.state == "failed" or trial.run in standings.unsafe:
            state = "failed"
        elif trial.state == "done":
            state = "done"
        points.setdefault(pair, Point(*pair, state, standings.means.get(trial.run)))
    return list(points.values())
