"""Figures of predictions against what was recorded: sites, stimuli, classes."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from train.evaluation.figures.figure_style import BLUE, VERMILLION, escape_formulas, finish, new_figure, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXTREMES = 6  # stimuli of each kind that are shown
MOST_DOTS = 2000


def draw_sites(prediction: np.ndarray, target: np.ndarray, r2: np.ndarray, site_ids: Sequence[str]) -> "Figure":
    """Draw prediction against response at the best, the median and the worst site, a dot per stimulus.

    Args:
        prediction, target: (stimuli, sites); NaN targets are left out.
        r2: (sites,), NaN where a site has none; at least one has.
        site_ids: names.
    """
    order = np.argsort(r2)[: int(np.isfinite(r2).sum())]  # NaN comes last
    chosen = {"best": order[-1], "median": order[(len(order) - 1) // 2], "worst": order[0]}
    figure = new_figure(9, 3.3)
    for axes, (rank, site) in zip(figure.subplots(1, 3), chosen.items(), strict=True):
        recorded = np.flatnonzero(np.isfinite(target[:, site]))[:MOST_DOTS]
        x, y = prediction[recorded, site], target[recorded, site]
        low, high = min(x.min(), y.min()), max(x.max(), y.max())
        axes.plot([low, high], [low, high], color="0.6", linewidth=0.8)
        axes.scatter(x, y, s=12, color=BLUE, alpha=0.5, linewidths=0)
        axes.set(xlabel="prediction", ylabel="response")
        finish(figure, axes, f"{rank}: {shorten(site_ids[site], 20)}, R² {r2[site]:.2f}")
    return figure


def mean_errors(prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Prediction minus response per stimulus, in standard deviations of each site's responses, mean over sites.

    NaN for a stimulus without responses. (stimuli, sites) twice -> (stimuli,).
    """
    recorded = np.isfinite(target)
    count = np.maximum(recorded.sum(0), 1)
    centred = np.where(recorded, target - np.where(recorded, target, 0).sum(0) / count, 0)
    scale = np.sqrt((centred**2).sum(0) / count)
    usable = recorded & (scale > 0)
    error = np.where(usable, (prediction - target) / np.where(scale > 0, scale, 1), 0).sum(1)
    return np.where(usable.any(1), error / np.maximum(usable.sum(1), 1), np.nan)


def draw_extremes(errors: np.ndarray, images: Callable[[np.ndarray], np.ndarray], labels: Sequence[str]) -> "Figure":
    """Draw the stimuli whose responses were most over- and underestimated.

    Args:
        errors: from `mean_errors`; at least one is not NaN.
        images: of the stimuli at some positions, uint8 (n, side, side, 3).
        labels: of all stimuli.
    """
    order = np.argsort(errors)[: int(np.isfinite(errors).sum())]
    count = max(min(EXTREMES, len(order) // 2), 1)
    chosen = np.concatenate([order[::-1][:count], order[:count]])
    figure = new_figure(1.35 * count + 0.3, 3.9)
    grid = figure.subplots(2, count, squeeze=False)
    for axes, position, image in zip(grid.flat, chosen, images(chosen), strict=True):
        axes.imshow(image)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        axes.set_title(f"{escape_formulas(shorten(labels[position], 18))}\n{errors[position]:+.2f} SD", fontsize=8)
    for axes, label, colour in zip(grid[:, 0], ("overestimated", "underestimated"), (VERMILLION, BLUE), strict=True):
        axes.set_ylabel(label, color=colour, fontsize=9)
    return figure


def draw_confusion(names: Sequence[str], shown: np.ndarray, predicted: np.ndarray, title: str) -> "Figure":
    """Draw a confusion matrix: a row per class that was shown, as shares that add up to 1.

    Args:
        names: of the classes, in label order.
        shown, predicted: int (stimuli,), labels.
        title: of the figure.
    """
    counts = np.zeros((len(names), len(names)))
    np.add.at(counts, (shown, predicted), 1)
    present = np.flatnonzero(counts.sum(1) + counts.sum(0))
    counts = counts[np.ix_(present, present)]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(2.2 + 0.16 * len(present), 10)
    figure = new_figure(side + 1, side)
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="cividis", vmin=0, vmax=1)
    labels = [escape_formulas(shorten(names[int(label)], 18)) for label in present]
    size = 8 if len(present) <= 30 else 5
    axes.set_xticks(range(len(present)), labels, rotation=90, fontsize=size)
    axes.set_yticks(range(len(present)), labels, fontsize=size)
    axes.set(xlabel="predicted", ylabel="shown")
    figure.colorbar(image, ax=axes, label="share of those shown", shrink=0.8)
    return finish(figure, axes, title)
