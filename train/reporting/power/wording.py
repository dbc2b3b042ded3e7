"""What a plan of power says, in sentences that the report and train/plan.py share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from train.evaluation.power.components import POPULATIONS, Design
from train.evaluation.power.planning import LEAST_STIMULI, Need, Planned, Question, fewest, need

AT = {  # populations as a sentence ends
    "stimuli": "for other stimuli at these sites",
    "sites": "for other sites with these stimuli",
    "both": "for other stimuli and other sites",
}

FAR = 2.05  # times the recorded repetitions, beyond which a plan says that it extrapolates
# Of fewer, plans were not found to hold (docs/power.md), so how many fewer would do is not said.
FEWEST_STIMULI, FEWEST_REPETITIONS, FEWEST_SITES = 80, 2, 10


@dataclass(frozen=True)
class Subject:
    """What is planned.

    Attributes:
        models: the titles of two models whose scores are compared, or that of one.
        metric: its title.
        planned: what was measured of them.
        repetitions_source: why other numbers of repetitions cannot be planned, or where trials were read.
    """

    models: Sequence[str]
    metric: str
    planned: Planned
    repetitions_source: str

    @property
    def is_difference(self) -> bool:
        """Whether two models are compared."""
        return len(self.models) > 1

    @property
    def name(self) -> str:
        """The quantity."""
        return f"{self.metric} of {self.models[0]}" + (f" less that of {self.models[1]}" if self.is_difference else "")


def finding(subject: Subject, design: Design, question: Question) -> str:
    """What it takes, in one sentence."""
    return _telling_apart(subject, design, question) if subject.is_difference else _precision(subject, design, question)


def _telling_apart(subject: Subject, design: Design, question: Question) -> str:
    one, other = subject.models
    difference = question.expected(subject.planned, design.repetitions)
    if difference == 0:
        return f"{one} and {other} do not differ in {subject.metric}, so nothing tells them apart."
    origin = " as here" if question.difference is None else ""
    looks = f", corrected for {question.comparisons:,} comparisons" if question.comparisons > 1 else ""
    aim = f"with {100 * question.power:.0f} % power {AT[question.population]}{looks}"
    condition = f"if {subject.metric} truly differs by {abs(difference):.3f}{origin}"
    needed = need(subject.planned, design, question)
    if question.is_met(subject.planned, design):
        spare = _spare(needed, design, subject.planned)
        return f"{one} is told from {other} {aim}, {condition}{'; ' if spare else ''}{spare}."
    more, vain = _more(needed, design, subject)
    takes = " or ".join(more)
    sentence = f"To tell {one} from {other} {aim}, {condition}, "
    sentence += f"takes {takes}" if takes else "takes more than any one of these can give"
    return f"{sentence}; {'; '.join(vain)}." if vain else f"{sentence}."


def _more(needed: Need, design: Design, subject: Subject) -> tuple[list[str], list[str]]:
    """What would be enough by itself, and what would not."""
    planned, enough, vain = subject.planned, [], []
    if needed.stimuli is not None:
        added = needed.stimuli - design.stimuli
        enough.append(f"{added:,} more scored {'stimuli' if added > 1 else 'stimulus'} ({needed.stimuli:,} in all)")
    else:
        vain.append("more stimuli alone would not be enough")
    now = repetitions_of(design, planned)
    if now is None:
        vain.append(f"what more repetitions would do is not known ({subject.repetitions_source})")
    elif needed.repetitions is not None:
        added = max(round(needed.repetitions - now), 1)  # of an average of 6.6, 7 is one more
        origin = ", extrapolated" if is_extrapolated(needed.repetitions, planned) else ""
        enough.append(f"{added:,} more repetition{'s' * (added > 1)} of these ({needed.repetitions:,} in all{origin})")
    else:
        vain.append("more repetitions alone would not be enough")
    if needed.sites is not None:
        added = needed.sites - design.sites
        enough.append(f"{added:,} more site{'s' * (added > 1)} like these ({needed.sites:,} in all)")
    else:
        vain.append("more sites alone would not be enough")
    return enough, vain


def _spare(needed: Need, design: Design, planned: Planned) -> str:
    """What would have done as well."""
    words = []
    if needed.stimuli is not None and needed.stimuli < design.stimuli:
        words += _of_those(needed.stimuli, design.stimuli, FEWEST_STIMULI, "scored stimuli")
    now = repetitions_of(design, planned)
    if now is not None and needed.repetitions is not None:
        fewer = max(needed.repetitions, FEWEST_REPETITIONS)  # "fewer than 2" would say that one is enough
        words += [f"{fewer} of the {now:.0f} repetitions"] if fewer < round(now) else []
    if needed.sites is not None and needed.sites < design.sites:
        words += _of_those(needed.sites, design.sites, FEWEST_SITES, "sites")
    return f"{' or '.join(words)} would have been enough" if words else ""


def _of_those(needed: int, there: int, least: int, what: str) -> list[str]:
    """How many of those that are there would do; "fewer than" the least for which plans hold, if it is below that."""
    if needed >= least:
        return [f"{needed:,} of the {there:,} {what}"]
    return [f"fewer than {least} of the {there:,} {what}"] if there > least else []


def _precision(subject: Subject, design: Design, question: Question) -> str:
    """Of a single score: how well it is known, and what would double that."""
    components = subject.planned.components(design.repetitions)
    half = {population: components.half_width(design, population, question.level) for population in POPULATIONS}
    known = f"{subject.name} is {components.value:.3f}, known to within {half['stimuli']:.3f} {AT['stimuli']}"
    if math.isfinite(half["both"]):
        known += f" and to within {half['both']:.3f} {AT['both']}"
    wanted = half[question.population] / 2
    if not math.isfinite(wanted):
        return f"{known}; one site alone tells nothing of others."

    def is_enough(stimuli: int) -> bool:
        other = Design(stimuli, design.sites, design.repetitions)
        return components.half_width(other, question.population, question.level) <= wanted

    stimuli = fewest(is_enough, LEAST_STIMULI, 1000 * design.stimuli)
    if stimuli is None:
        return f"{known}; no number of stimuli halves the uncertainty {AT[question.population]}."
    return f"{known}; {stimuli:,} scored stimuli would halve that {AT[question.population]}."


def is_extrapolated(repetitions: float | None, planned: Planned) -> bool:
    """Whether a number of repetitions is far beyond those that were recorded."""
    recorded = planned.repetitions
    return repetitions is not None and recorded is not None and repetitions > FAR * recorded


def repetitions_of(design: Design, planned: Planned) -> float | None:
    """The number of repetitions of a design, which is the recorded one by default; None where nothing is known."""
    return design.repetitions if design.repetitions is not None else planned.repetitions
