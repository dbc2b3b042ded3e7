"""The figure of a probe: explained variance by layer."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from train.evaluation.figures.figure_style import (
    BLUE,
    VERMILLION,
    encode,
    escape_formulas,
    finish,
    known_scores,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_NAMED = 4  # modules of one layer
DARK = "0.25"


def layer_label(layer: str) -> str:
    """A layer's name for tables and figures; of many modules joined by `+`, the first, the last and their number."""
    modules = layer.split("+")
    return layer if len(modules) <= MOST_NAMED else f"{modules[0]}+...+{modules[-1]} ({len(modules)} modules)"


def layer_figure(metrics: Mapping[str, Any]) -> bytes:
    """`draw_layers` as a PNG.

    Args:
        metrics: of a probe, as metrics.json has them: with `layers` and, if known, a ceiling.
    """
    scores = {
        layer: block["regression"]["explained_variance"]["per_site"] for layer, block in metrics["layers"].items()
    }
    simulated = " (SIMULATED)" if metrics.get("simulated") else ""
    title = f"{metrics['recording']}{simulated}, {metrics['stimuli']} stimuli of {metrics['split']}"
    ceiling = metrics["regression"].get("ceiling", {}).get("mean")
    return encode(draw_layers(scores, metrics["chosen"], title, ceiling))


def draw_layers(
    per_site: Mapping[str, Sequence[float | None]], chosen: str | None, title: str, ceiling: float | None
) -> "Figure":
    """Draw the distribution of explained variance over sites, by layer, as in Figure 1 of the study.

    Args:
        per_site: the scores by layer; None where a site has none.
        chosen: the layer to mark.
        title: of the figure.
        ceiling: mean over sites.
    """
    scores = [known_scores(values) for values in per_site.values()]
    figure = new_figure(max(5.5, 0.8 * len(scores) + 1.5), 3.8)  # wide enough for the legend
    axes = figure.add_subplot()
    positions = range(len(scores))
    violins = axes.violinplot(scores, positions, showextrema=False, widths=0.85)
    bodies = list(violins["bodies"])  # type: ignore[call-overload]  # a list, which matplotlib declares as a Collection
    for layer, body in zip(per_site, bodies, strict=True):
        body.set(facecolor=VERMILLION if layer == chosen else BLUE, alpha=0.4, edgecolor="none")
    thin = {"color": DARK, "linewidth": 1}
    axes.boxplot(
        scores,
        positions=positions,
        widths=0.12,
        showfliers=False,
        medianprops={"color": DARK, "linewidth": 1.5},
        boxprops=thin,
        whiskerprops=thin,
        capprops=thin,
    )
    means = [values.mean() for values in scores]
    axes.plot(positions, means, "-", color=DARK, linewidth=1)
    axes.plot(positions, means, "o", color="white", markeredgecolor="black", label="mean over sites", zorder=4)
    if ceiling is not None:
        axes.axhline(ceiling, color="black", linestyle="--", linewidth=1, label="ceiling, mean over sites")
    axes.axhline(0, color="0.7", linewidth=0.6, zorder=0)
    names = [escape_formulas(layer_label(layer)) for layer in per_site]
    if sum(map(len, names)) > 60:
        axes.set_xticks(positions, names, rotation=35, ha="right")
    else:
        axes.set_xticks(positions, names)
    axes.set_ylabel("explained variance")
    axes.plot([], [], "s", color=VERMILLION, alpha=0.4, label="chosen layer")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return finish(figure, axes, title)
