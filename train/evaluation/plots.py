"""Figures, drawn by matplotlib without a screen; it is imported when one is drawn, so that others do not wait for it.

Most functions return a PNG's bytes. Colours are told apart by people with any colour vision: cividis, where brighter is
better, and those of Okabe and Ito (2008).
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MISSING = "0.88"
DPI = 150
MOST_NAMED = 4  # modules of one layer
BLUE, VERMILLION, GREEN, ORANGE, SKY, PURPLE = "#0072b2", "#d55e00", "#009e73", "#e69f00", "#56b4e9", "#cc79a7"


@dataclass(frozen=True)
class Axis:
    """One setting of a search.

    Attributes:
        name: dotted.
        values: those of a grid, or those to choose from, in the order in which they are shown; empty for an interval.
        log: whether an interval is sampled logarithmically.
    """

    name: str
    values: list[Any]
    log: bool = False


@dataclass(frozen=True)
class Point:
    """What was found for one pair of values; `y` is None where a single setting varies.

    Attributes:
        x, y: values of the two settings.
        state: done, failed, or waiting (also: running).
        value: of the selection metric, where there is one; a point that failed with one seed has that of the others.
    """

    x: Any
    y: Any
    state: Literal["done", "failed", "waiting"]
    value: float | None = None


def heat_map(x: Axis, y: Axis, points: Sequence[Point], *, title: str, label: str, lower_is_better: bool) -> bytes:
    """A cell for each pair of values, with what was found there in it; failed ones are hatched, the best is framed.

    Args:
        x, y: the settings; both have values.
        points: one per cell, in any order; a pair without one is left blank.
        title, label: of the figure and of its colours.
        lower_is_better: of the value.
    """
    figure = new_figure(1.15 * len(x.values) + 3.2, 0.75 * len(y.values) + 1.9)
    axes = figure.add_subplot()
    cells = np.full((len(y.values), len(x.values)), np.nan)
    places = [(y.values.index(point.y), x.values.index(point.x), point) for point in points]
    for row, column, point in places:
        if point.value is not None:
            cells[row, column] = point.value
    colours = _colours([point.value for point in points if point.value is not None], lower_is_better)
    image = axes.imshow(cells, origin="lower", aspect="auto", **colours)
    for row, column, point in places:
        _fill_cell(axes, column, row, point, image)
    if (best := _best(points, lower_is_better)) is not None:
        _add_box(axes, x.values.index(best.x), y.values.index(best.y), edgecolor="black", linewidth=2.5, zorder=3)
    _label_choices(axes.xaxis, x)
    _label_choices(axes.yaxis, y)
    return _finish(figure, axes, title, image, label)


def _fill_cell(axes: "Axes", column: int, row: int, point: Point, image: Any) -> None:
    if point.state == "failed":
        _add_box(axes, column, row, hatch="////", edgecolor="0.65", linewidth=0)
    text = point.state if point.value is None else _number(point.value)
    ink = _ink(image.to_rgba(point.value)) if point.state == "done" else "0.25"
    box = {"facecolor": MISSING, "edgecolor": "none", "pad": 1.5} if point.state == "failed" else None
    axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=9, bbox=box)


def _add_box(axes: "Axes", column: int, row: int, **style: Any) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((column - 0.49, row - 0.49), 0.98, 0.98, fill=False, **style))


def _done(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if point.state == "done"]


def _best(points: Sequence[Point], lower_is_better: bool) -> Point | None:
    return (min if lower_is_better else max)(_done(points), key=lambda point: point.value, default=None)


def scatter(x: Axis, y: Axis, points: Sequence[Point], *, title: str, label: str, lower_is_better: bool) -> bytes:
    """A dot for each sampled pair of values, coloured by what was found there; crosses failed, the ring is the best."""
    figure = new_figure(7.0, 4.8)
    axes = figure.add_subplot()
    done = _done(points)
    failed = [point for point in points if point.state == "failed"]
    values = [point.value for point in done]
    shown = axes.scatter(_place(x, done), _place(y, done, "y"), c=values, s=70, **_colours(values, lower_is_better))
    axes.scatter(_place(x, failed), _place(y, failed, "y"), c="0.45", marker="x", s=50)
    if (best := _best(points, lower_is_better)) is not None:
        axes.scatter(_place(x, [best]), _place(y, [best], "y"), s=200, facecolors="none", edgecolors="black")
    _scale(axes, "x", x)
    _scale(axes, "y", y)
    return _finish(figure, axes, title, shown, label)


def curve(x: Axis, points: Sequence[Point], *, title: str, label: str) -> bytes:
    """The value over one setting: bars over its values, dots over an interval; crosses at the foot failed."""
    figure = new_figure(max(4.5, 1.0 * len(x.values) + 2), 3.8)
    axes = figure.add_subplot()
    done = _done(points)
    places, values = _place(x, done), [point.value for point in done]
    if x.values:
        bars = axes.bar(places, values, color="#31688e", width=0.6)
        axes.bar_label(bars, [_number(value) for value in values], padding=2, fontsize=9)
        axes.set_xlim(-0.6, len(x.values) - 0.4)
        axes.margins(y=0.15)
    else:
        axes.scatter(places, values, color="#31688e")
    failed = _place(x, [point for point in points if point.state == "failed"])
    axes.plot(failed, [0.03] * len(failed), "x", color="0.45", transform=axes.get_xaxis_transform(), label="failed")
    if failed:
        axes.legend(frameon=False)
    _scale(axes, "x", x)
    axes.set_ylabel(label)
    return _finish(figure, axes, title)


def layer_label(layer: str) -> str:
    """A layer's name for tables and figures; of many that `+` joins, the first, the last and their number."""
    parts = layer.split("+")
    return layer if len(parts) <= MOST_NAMED else f"{parts[0]}+...+{parts[-1]} ({len(parts)} modules)"


def layer_figure(metrics: Mapping[str, Any]) -> bytes:
    """`draw_layers` as a PNG.

    Args:
        metrics: of a probe, with `layers`, and a ceiling where there is one.
    """
    scores = {
        layer: block["regression"]["explained_variance"]["per_site"] for layer, block in metrics["layers"].items()
    }
    simulated = " (SIMULATED)" if metrics.get("simulated") else ""
    title = f"{metrics['recording']}{simulated}, {metrics['stimuli']} stimuli of {metrics['split']}"
    ceiling = metrics["regression"].get("ceiling", {}).get("mean")
    return encoded(draw_layers(scores, metrics["chosen"], title, ceiling))


def draw_layers(
    per_site: Mapping[str, Sequence[float | None]], chosen: str | None, title: str, ceiling: float | None
) -> "Figure":
    """Explained variance by layer: its distribution over sites, after Figure 1 of the study.

    Args:
        per_site: the scores by layer, None where a site has none.
        chosen: the layer to mark.
        title: of the figure.
        ceiling: mean over sites.
    """
    scores = [known(values) for values in per_site.values()]
    figure = new_figure(max(5.5, 0.8 * len(scores) + 1.5), 3.8)  # wide enough for the legend
    axes = figure.add_subplot()
    places = range(len(scores))
    violins = axes.violinplot(scores, places, showextrema=False, widths=0.85)
    for layer, body in zip(per_site, violins["bodies"], strict=True):
        body.set(facecolor=VERMILLION if layer == chosen else BLUE, alpha=0.4, edgecolor="none")
    lines = {name: {"color": "0.25", "linewidth": 1} for name in ("boxprops", "whiskerprops", "capprops")}
    axes.boxplot(
        scores,
        positions=places,
        widths=0.12,
        showfliers=False,
        medianprops={"color": "0.25", "linewidth": 1.5},
        **lines,
    )
    means = [values.mean() for values in scores]
    axes.plot(places, means, "-", color="0.25", linewidth=1)
    axes.plot(places, means, "o", color="white", markeredgecolor="black", label="mean over sites", zorder=4)
    if ceiling is not None:
        axes.axhline(ceiling, color="black", linestyle="--", linewidth=1, label="ceiling, mean over sites")
    axes.axhline(0, color="0.7", linewidth=0.6, zorder=0)
    names = [plain(layer_label(layer)) for layer in per_site]
    slanted = sum(map(len, names)) > 60
    axes.set_xticks(places, names, rotation=35 * slanted, ha="right" if slanted else "center")
    axes.set_ylabel("explained variance")
    axes.plot([], [], "s", color=VERMILLION, alpha=0.4, label="the layer that was chosen")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return finished(figure, axes, title)


def known(per_site: Sequence[float | None]) -> np.ndarray:
    """The scores there are; a single 0 where there is none, so that something can be drawn."""
    return np.array([value for value in per_site if value is not None] or [0.0])


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of a size in inches, at most a page."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(min(width, 16), min(height, 12)), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def finished(figure: "Figure", axes: "Axes", title: str) -> "Figure":
    """With a title, and no more lines than it takes to read it."""
    axes.set_title(plain(title), fontsize=10, wrap=True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plain(text: str) -> str:
    """A text that matplotlib takes for no formula."""
    return text.replace("$", r"\$")


def encoded(figure: "Figure", kind: str = "png") -> bytes:
    """A figure's bytes, png, svg or pdf; the same ones for the same figure."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    dated = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    with rc_context({"svg.hashsalt": "spiketune", "pdf.fonttype": 42}):
        figure.savefig(buffer, format=kind, metadata=dated)
    return buffer.getvalue()


def _finish(figure: "Figure", axes: "Axes", title: str, coloured: Any = None, label: str = "") -> bytes:
    axes.set_title(title, fontsize=10, wrap=True)
    if coloured is not None:
        figure.colorbar(coloured, ax=axes, label=label, extend=_extend(coloured))
    return encoded(figure)


def _colours(values: Sequence[float], lower_is_better: bool) -> dict[str, Any]:
    """The colour map and its ends. R2 has no lower bound: one hopeless trial must not make all others look alike."""
    from matplotlib import colormaps

    sign = -1 if lower_is_better else 1
    ordered = sorted(sign * value for value in values) or [0.0, 1.0]
    best, worst = ordered[-1], ordered[0]
    foot = best - 4 * (best - float(np.median(ordered)))
    worst = max(worst, foot) if foot < best else worst
    low, high = sorted((sign * worst, sign * best))
    colour_map = colormaps["cividis_r" if lower_is_better else "cividis"].with_extremes(bad=MISSING)
    return {"cmap": colour_map, "vmin": low, "vmax": high}


def _extend(coloured: Any) -> str:
    """Which end of the colours stands for values beyond it as well."""
    values = np.ma.masked_invalid(coloured.get_array()).compressed()
    below, above = (values < coloured.norm.vmin).any(), (values > coloured.norm.vmax).any()
    return {(True, False): "min", (False, True): "max", (True, True): "both"}.get((below, above), "neither")


def _ink(colour: Sequence[float]) -> str:
    """Black or white, whichever is read better on a colour (red, green, blue from 0 to 1)."""
    return "black" if float(np.dot(colour[:3], (0.299, 0.587, 0.114))) > 0.5 else "white"


def _number(value: Any) -> str:
    """A value for a cell, at most seven characters."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1e}"


def _name(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _place(axis: Axis, points: Sequence[Point], which: str = "x") -> list[float]:
    values = [getattr(point, which) for point in points]
    return [axis.values.index(value) for value in values] if axis.values else values


def _scale(axes: "Axes", which: str, axis: Axis) -> None:
    if axis.values:
        _label_choices(getattr(axes, f"{which}axis"), axis)
        return
    if axis.log:
        getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}label")(axis.name)


def _label_choices(axis: Any, setting: Axis) -> None:
    labels = [_name(value) for value in setting.values]
    axis.set_ticks(range(len(labels)), labels)
    if axis.axis_name == "x" and max(map(len, labels)) > 10:
        axis.set_tick_params(rotation=30)
    axis.set_label_text(setting.name)
