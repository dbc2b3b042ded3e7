"""Power: how surely a design tells two scores apart, and which design does it for the fewest presentations.

Two scores are told apart if the interval of their difference excludes 0. With a true difference d, standard error s and
f degrees of freedom, d / s follows the noncentral t distribution (Cohen 1988; Lehmann and Romano 2005, chapter 5):

    power = P(T > t_crit) + P(T < -t_crit),   T ~ t(f, d / s),   t_crit the 1 - alpha / 2 quantile of t(f)

With several comparisons, alpha is divided by their number (Bonferroni).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np

from train.evaluation.power.components import Components, Design, Population

LEAST_STIMULI = 10  # of fewer, a score is far from linear: nothing is planned from them, nor for them
QUADRATURE = 200  # nodes
MOST_STIMULI, MOST_REPETITIONS, MOST_SITES = 10_000_000, 1_000, 1_000_000


class Planned(Protocol):
    """What `Study` and `JoinedStudies` tell of designs."""

    @property
    def design(self) -> Design:
        """That was measured."""

    @property
    def repetitions(self) -> float | None:
        """That were recorded; None where single trials are not known."""

    def components(self, repetitions: float | None = None) -> Components:
        """The variance components with a number of repetitions."""

    def shrinkage(self, repetitions: float | None) -> float:
        """How a difference that is the same at every site changes with the number of repetitions."""


@dataclass(frozen=True)
class Shifted:
    """What was measured, with scores that more or fewer training stimuli would change.

    Attributes:
        measured: what was measured.
        shift: of the score or difference, with the recorded number of repetitions.
    """

    measured: Planned
    shift: float

    @property
    def design(self) -> Design:
        """See `Planned`."""
        return self.measured.design

    @property
    def repetitions(self) -> float | None:
        """See `Planned`."""
        return self.measured.repetitions

    def components(self, repetitions: float | None = None) -> Components:
        """See `Planned`."""
        components = self.measured.components(repetitions)
        return replace(components, value=components.value + self.shift * self.shrinkage(repetitions))

    def shrinkage(self, repetitions: float | None) -> float:
        """See `Planned`."""
        return self.measured.shrinkage(repetitions)


@dataclass(frozen=True)
class Question:
    """What a design is asked for.

    Attributes:
        population: to which the answer is to hold.
        power: that is wanted.
        comparisons: that are looked at; the level of each is 5 % divided by them.
        difference: the true difference, as it shows with the recorded number of repetitions; None: the measured one.
    """

    population: Population = "stimuli"
    power: float = 0.8
    comparisons: int = 1
    difference: float | None = None

    @property
    def level(self) -> float:
        """Confidence level of each comparison."""
        return 1 - 0.05 / self.comparisons

    def expected(self, planned: Planned, repetitions: float | None) -> float:
        """The true difference as it shows with a number of repetitions."""
        if self.difference is None:
            return planned.components(repetitions).value
        return self.difference * planned.shrinkage(repetitions)

    def power_of(self, planned: Planned, design: Design) -> float:
        """The probability that a design's interval excludes 0, on the side of the true difference or the other."""
        components = planned.components(design.repetitions)
        error = components.standard_error(design, self.population)
        freedom = components.freedom(design, self.population)
        return power(self.expected(planned, design.repetitions), error, freedom, self.level)

    def is_met(self, planned: Planned, design: Design) -> bool:
        """Whether a design has the wanted power."""
        return self.power_of(planned, design) >= self.power

    def smallest_difference(self, planned: Planned, design: Design) -> float | None:
        """The smallest true difference that a design finds with the wanted power, as it shows in that design."""
        components = planned.components(design.repetitions)
        error = components.standard_error(design, self.population)
        freedom = components.freedom(design, self.population)
        if freedom < 1 or not math.isfinite(error):
            return None
        low, high = 0.0, error
        while power(high, error, freedom, self.level) < self.power and high < 1e6 * error:
            high *= 2
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if power(middle, error, freedom, self.level) < self.power else (low, middle)
        return high


def power(difference: float, error: float, freedom: float, level: float) -> float:
    """The probability that a two-sided interval of Student's t excludes 0; see above.

    T is (Z + d / s) / w with Z standard normal and w^2 an estimate of a variance of 1, so the probability given w is
    averaged over w: exact to about 1e-6 for any d / s, whereas scipy's noncentral t has no value where d / s is large.
    """
    from scipy.special import ndtr, stdtrit  # here, because command lines are parsed without scipy

    if freedom < 1:
        return 0.0
    if error == 0:
        return float(difference != 0)
    critical, shift = float(stdtrit(freedom, (1 + level) / 2)), abs(difference) / error
    values, weights = _estimated_deviations(freedom)
    found = ndtr(shift - critical * values) + ndtr(-shift - critical * values)
    return float(min(weights @ found, 1.0))


@lru_cache(maxsize=4096)
def _estimated_deviations(freedom: float) -> tuple[np.ndarray, np.ndarray]:
    """Standard deviations that are estimated where the true one is 1, and their weights: Gauss's quadrature."""
    from scipy.special import gammaincinv

    nodes, weights = np.polynomial.legendre.leggauss(QUADRATURE)
    return np.sqrt(2 / freedom * gammaincinv(freedom / 2, (nodes + 1) / 2)), weights / 2


# --------------------------------------------------------------------------------------------------------- how many


def fewest(is_met: Callable[[int], bool], least: int, most: int) -> int | None:
    """The smallest number for which something holds that also holds for all larger ones; None if it never does."""
    if is_met(least):
        return least
    if not is_met(most):
        return None
    low, high = least, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_met(middle) else (middle, high)
    return high


@dataclass(frozen=True)
class Need:
    """What it would take to get the wanted power by more of one thing, everything else as in a design.

    Attributes:
        stimuli, repetitions, sites: the numbers; None where no number is enough, and for repetitions where nothing is
            known of other numbers.
    """

    stimuli: int | None
    repetitions: int | None
    sites: int | None


def need(planned: Planned, design: Design, question: Question) -> Need:
    """How many stimuli, repetitions or sites a question needs, each alone; at least one less than there are now."""
    repetitions = None
    if planned.repetitions is not None:
        repetitions = fewest(
            lambda count: question.is_met(planned, replace(design, repetitions=count)), 1, MOST_REPETITIONS
        )
    return Need(
        fewest(lambda count: question.is_met(planned, replace(design, stimuli=count)), LEAST_STIMULI, MOST_STIMULI),
        repetitions,
        fewest(lambda count: question.is_met(planned, replace(design, sites=count)), 1, MOST_SITES),
    )


# ----------------------------------------------------------------------------------------------------- presentations


@dataclass(frozen=True)
class Budget:
    """Presentations to be divided.

    Attributes:
        presentations: stimuli, also those that only train, times repetitions.
        share: of the stimuli that are scored.
        sites: of every design.
    """

    presentations: int
    share: float
    sites: int


@dataclass(frozen=True)
class Offer:
    """A design for a number of presentations.

    Attributes:
        design: scored stimuli, repetitions, sites.
        shown: stimuli, also those that only train.
        half_width: of the interval.
        comparable: the half width less what noise does to scores, so that designs with unlike numbers of repetitions
            can be compared: as if all differences showed as with the recorded number.
        value: the score or the difference that is expected.
        power: for the difference; None for a single score.
    """

    design: Design
    shown: int
    half_width: float
    comparable: float
    value: float
    power: float | None


def offers(
    measured: Planned,
    trained: Callable[[int], Planned],
    budget: Budget,
    question: Question,
    *,
    is_difference: bool,
) -> Iterator[Offer]:
    """Designs that use up a budget, by the number of repetitions; none where nothing is known of these.

    Args:
        measured: what is known.
        trained: the same with a number of training stimuli.
        budget: presentations.
        question: that is asked.
        is_difference: whether a difference was measured rather than a score.
    """
    for repetitions in _numbers_of_repetitions(measured):
        shown = budget.presentations // repetitions
        scored = int(shown * budget.share + 1e-9)
        if scored < LEAST_STIMULI:
            continue
        planned, design = trained(shown - scored), Design(scored, budget.sites, repetitions)
        components = planned.components(repetitions)
        half_width = components.half_width(design, question.population, question.level)
        comparable = half_width / planned.shrinkage(repetitions)
        found = question.power_of(planned, design) if is_difference else None
        yield Offer(design, shown, half_width, comparable, components.value, found)


def _numbers_of_repetitions(planned: Planned) -> list[int]:
    """From 1 to 20 times as many as were recorded, in steps that grow; none where nothing is known of others."""
    if planned.repetitions is None:
        return []
    numbers = [1]
    while numbers[-1] < min(MOST_REPETITIONS, 20 * planned.repetitions):
        numbers.append(numbers[-1] + max(1, numbers[-1] // 8))
    return numbers


def best_offer(all_offers: Sequence[Offer]) -> Offer | None:
    """That with the most power, or, of a single score, the narrowest interval; None if there is none."""
    if not all_offers:
        return None
    return max(all_offers, key=lambda offer: (offer.power or 0.0, -offer.comparable))
