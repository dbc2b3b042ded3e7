"""The figure of a plan: the interval that other designs would give, and their power."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from train.evaluation.figures.figure_style import BLUE, GREEN, PURPLE, SKY, VERMILLION, finish, new_figure
from train.evaluation.power.components import Design, Population
from train.evaluation.power.planning import LEAST_STIMULI, Question
from train.reporting.power.wording import Subject

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (SKY, GREEN, BLUE, PURPLE)
LESS, MORE, POINTS = 1 / 8, 16, 40  # stimuli, as parts of those that were scored
MOST_POWERS = 4  # of ten
RING: dict[str, Any] = {"color": "white", "markeredgecolor": "black", "markersize": 6, "zorder": 4}


def numbers_of_repetitions(subject: Subject) -> list[int]:
    """The numbers of repetitions that a figure or a table shows: 1, half of the recorded, these, and twice as many."""
    recorded = subject.planned.repetitions
    if recorded is None:
        return []
    return sorted({1, max(round(recorded / 2), 1), max(round(recorded), 1), max(round(2 * recorded), 2)})


def numbers_of_stimuli(design: Design, points: int = POINTS) -> list[int]:
    """Numbers of stimuli around those of a design, evenly spaced on a logarithmic scale."""
    ends = max(design.stimuli * LESS, LEAST_STIMULI), max(design.stimuli * MORE, 2 * LEAST_STIMULI)
    return sorted({round(number) for number in np.geomspace(*ends, points)} | {design.stimuli})


def draw_power(subject: Subject, design: Design, question: Question) -> "Figure":
    """Half the width of the 95 % interval and, of a difference, the power, by stimuli, a line for each repetition."""
    figure = new_figure(7.0 if subject.is_difference else 4.4, 3.6)
    panels: list[Axes] = list(figure.subplots(1, 2 if subject.is_difference else 1, squeeze=False)[0])
    stimuli = numbers_of_stimuli(design)
    designs = [replace(design, repetitions=number) for number in numbers_of_repetitions(subject)] or [design]
    for colour, line in zip(COLOURS, designs, strict=False):
        label = "as recorded" if line.repetitions is None else _repetitions(line.repetitions)
        widths = _half_widths(subject, line, stimuli, question.population)
        panels[0].plot(stimuli, widths, color=colour, linewidth=1.5, label=label)
        if subject.is_difference:
            powers = [question.power_of(subject.planned, replace(line, stimuli=number)) for number in stimuli]
            panels[1].plot(stimuli, powers, color=colour, linewidth=1.5)
    _draw_widths(panels[0], subject, design, question)
    if subject.is_difference:
        panels[1].plot(design.stimuli, question.power_of(subject.planned, design), "o", **RING)
        panels[1].axhline(question.power, color="0.5", linestyle="--", linewidth=1)
        panels[1].set(ylim=(0, 1.02), ylabel="power")
    for axes in panels:
        axes.set_xscale("log")
        ticks = _round_numbers(stimuli[0], stimuli[-1])
        axes.set_xticks(ticks, [f"{number:,.0f}" for number in ticks], fontsize=8)
        axes.minorticks_off()
        axes.set_xlabel("scored stimuli")
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        finish(figure, axes, "")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8
    )
    return figure


def _repetitions(count: float) -> str:
    return "1 repetition" if count == 1 else f"{count:g} repetitions"


def _half_widths(subject: Subject, design: Design, stimuli: Sequence[int], population: Population) -> list[float]:
    """Half the width of the interval by the number of stimuli; NaN where there is none, or none to draw."""
    components = subject.planned.components(design.repetitions)
    widths = [components.half_width(replace(design, stimuli=number), population) for number in stimuli]
    return [width if 0 < width < math.inf else math.nan for width in widths]


def _draw_widths(axes: "Axes", subject: Subject, design: Design, question: Question) -> None:
    """What else the panel of intervals shows: those for other sites, the measured design, and the difference."""
    stimuli = numbers_of_stimuli(design)
    widths = _half_widths(subject, design, stimuli, "both")
    axes.plot(stimuli, widths, color="0.4", linewidth=1.2, linestyle=":", label="also for other sites")
    axes.plot(design.stimuli, *_half_widths(subject, design, [design.stimuli], question.population), "o", **RING)
    if subject.is_difference:
        difference = abs(question.expected(subject.planned, design.repetitions))
        if difference > 0:
            axes.axhline(difference, color=VERMILLION, linestyle="--", linewidth=1, label="the difference")
    axes.set_yscale("log")
    ticks = _round_numbers(*axes.get_ylim())
    axes.set_yticks(ticks, [f"{number:g}" for number in ticks])
    what = f"{subject.metric} difference" if subject.is_difference else subject.metric
    axes.set_ylabel(f"{what}, 95 % interval: ±".replace("R2", "R²"))


def _round_numbers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within bounds; over many powers, these alone."""
    if not 0 < low < high < math.inf:
        return []
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= MOST_POWERS else (1,)
    numbers = [factor * 10.0**power for power in powers for factor in factors]
    return [number for number in numbers if low <= number <= high]
