"""What train/plan.py --runs prints: what a design would show of models that were scored on a recording."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from data_prep.common.errors import BadInput
from data_prep.common.terminal import aligned
from train.evaluation.power.components import POPULATIONS, Components, Design, Population
from train.evaluation.power.influence import PLANNED
from train.evaluation.power.planning import LEAST_STIMULI, Budget, Offer, Planned, Question, Shifted, best_offer, offers
from train.planning.options import PowerPlan
from train.planning.wording import lines_of
from train.reporting.groups import groups_of
from train.reporting.power.group_power import GroupPower, JoinedPower, LearningRun, join
from train.reporting.power.recorded_trials import trials_of
from train.reporting.power.section import joined_subject, subject_of
from train.reporting.power.wording import AT, Subject, finding, is_extrapolated, repetitions_of
from train.reporting.report_contents import read_runs

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of scored stimuli, where the learning curve is known
SHOWN_REPETITIONS = (1, 2, 4, 8, 16, 32, 64, 128)  # of the designs for a number of presentations


def plan_power(options: PowerPlan) -> None:
    """Print what a design would show.

    Raises:
        BadInput: no run has predictions, or the design asks for what the runs cannot tell.
    """
    runs = read_runs(options.runs, options.split, {})
    groups = groups_of(runs)
    metric = PLANNED[options.metric]
    every = [GroupPower(group, trials_of(group, options.data), metric) for group in groups]
    powers = [power for power in every if power.models]
    if not powers:
        raise BadInput(
            f"runs: none of these has predicted responses to {options.split}, {LEAST_STIMULI} stimuli or more, beside "
            "its scores; score them first (train/evaluate.py), or name another --split"
        )
    asked = [_of_group(power, options) for power in powers]
    joined = join(powers)
    if joined is not None:
        asked.append(_of_joined(joined, options))
    if not any(one.subject.is_difference for one in asked):
        _check_single(options)
    pages = [_page(one, options) for one in asked]
    left_out = [run.title for run in runs if run.metrics is None] + [name for power in every for name in power.left_out]
    if left_out:
        pages.append(f"without predictions for the same stimuli of {options.split}: {', '.join(left_out)}")
    print("\n\n".join(pages))


# ------------------------------------------------------------------------------------------------- what is asked of


@dataclass(frozen=True)
class _Gain:
    """What other numbers of training stimuli would add to a score, or to the difference of two."""

    runs: Sequence[LearningRun]

    def __call__(self, stimuli: float) -> float:
        gains = [run.gain(stimuli) for run in self.runs]
        return gains[0] - gains[1] if len(gains) > 1 else gains[0]

    def is_measured(self, stimuli: float) -> bool:
        """Whether all curves reach so far."""
        return all(run.curve.is_measured(stimuli) for run in self.runs)


@dataclass(frozen=True)
class _MeanGain:
    """The mean gain over recordings."""

    gains: Sequence[_Gain]

    def __call__(self, stimuli: float) -> float:
        return sum(gain(stimuli) for gain in self.gains) / len(self.gains)

    def is_measured(self, stimuli: float) -> bool:
        """See `_Gain`."""
        return all(gain.is_measured(stimuli) for gain in self.gains)


@dataclass(frozen=True)
class _Asked:
    """A recording, or several, and the models that are planned for.

    Attributes:
        title: of the page.
        subject: the models.
        gain: by training stimuli; None where it is not known.
        share: of the stimuli that are scored; None where it is not known.
        comparisons: of models.
    """

    title: str
    subject: Subject
    gain: _Gain | _MeanGain | None
    share: float | None
    comparisons: int


def _of_group(power: GroupPower, options: PowerPlan) -> _Asked:
    gain, share = _learning(power, power.best, options), power.share(power.best)
    return _Asked(power.group.title, subject_of(power), gain, share, power.comparisons)


def _of_joined(joined: JoinedPower, options: PowerPlan) -> _Asked:
    of_groups = list(zip(joined.groups, joined.best, strict=True))
    learning = [_learning(power, best, options) for power, best in of_groups]
    gain = None if None in learning else _MeanGain([one for one in learning if one is not None])
    shares = [power.share(best) for power, best in of_groups]
    share = None if None in shares else sum(one for one in shares if one is not None) / len(shares)
    title = f"{joined.title}: mean over these; numbers of stimuli and sites are those of each"
    return _Asked(title, joined_subject(joined), gain, share, joined.comparisons)


def _check_single(options: PowerPlan) -> None:
    """Refuse what only a difference has."""
    for name in ("difference", "comparisons", "power"):
        if getattr(options, name) != PowerPlan.model_fields[name].default:
            raise BadInput(f"{name}: one run alone has none; name two or more")


def _learning(power: GroupPower, best: Sequence[int], options: PowerPlan) -> _Gain | None:
    """Of the models of a group that are planned for."""
    runs = [power.learning(index) for index in best]
    known = [run for run in runs if run is not None]
    if len(known) == len(runs):
        return _Gain(known)
    if options.stimuli is not None:
        raise BadInput(
            "stimuli: how scores grow with training stimuli is not known; name runs of the same systems on three or "
            f"more numbers of them (--subset), and plan R2 ({power.group.recording})"
        )
    return None


# ---------------------------------------------------------------------------------------------------------- the page


def _page(asked: _Asked, options: PowerPlan) -> str:
    subject = asked.subject
    _check(subject, options)
    design = _design(subject.planned.design, options)
    comparisons = options.comparisons or asked.comparisons if subject.is_difference else 1
    question = Question(options.population, options.power, comparisons, options.difference)
    lines = [asked.title, *_measured(asked)]
    planned = subject.planned
    if options.stimuli is not None and asked.gain is not None:
        planned = Shifted(planned, asked.gain(options.stimuli))
        lines.append(_training_line(asked.gain, options.stimuli))
    subject = replace(subject, planned=planned)
    lines += ["", f"design: {_in_words(design, planned)}", *_expected(subject, design, question)]
    lines += ["", finding(subject, design, question)]
    if options.presentations is not None:
        lines += ["", *_cheapest(asked, options, question, design.sites)]
    return "\n".join(lines)


def _check(subject: Subject, options: PowerPlan) -> None:
    """Refuse to plan repetitions without trials, and options without their partner."""
    if subject.planned.repetitions is None:
        asked = [name for name in ("repetitions", "presentations") if getattr(options, name) is not None]
        if asked:
            raise BadInput(
                f"{asked[0]}: without single trials, only stimuli and sites can be planned "
                f"({subject.repetitions_source}); name the shards by --data, or leave out --{asked[0]}"
            )
    if options.held_out is not None and options.presentations is None:
        raise BadInput("held_out: it divides --presentations; give these too, or leave it out")


def _design(measured: Design, options: PowerPlan) -> Design:
    return Design(options.scored or measured.stimuli, options.sites or measured.sites, options.repetitions)


def _in_words(design: Design, planned: Planned) -> str:
    repetitions, origin = repetitions_of(design, planned), ""
    if is_extrapolated(repetitions, planned):
        origin = " (EXTRAPOLATED: more than twice the recorded ones)"
    words = [f"{design.stimuli:,} scored stimuli", f"{design.sites:,} sites"]
    return ", ".join([*words, *([] if repetitions is None else [f"{repetitions:.3g} repetitions{origin}"])])


def _measured(asked: _Asked) -> list[str]:
    planned = asked.subject.planned
    components = planned.components()
    parts = {"stimuli": components.stimulus, "sites": components.site, "both together": components.rest}
    rows = {
        "planned": asked.subject.name,
        "measured": f"{_in_words(planned.design, planned)}: {components.value:.4f}",
        "varies by": ", ".join(f"{name} {_variance(value)}" for name, value in parts.items()),
    }
    if planned.repetitions is None:
        rows["trials"] = f"none, so stimuli and sites only ({asked.subject.repetitions_source})"
    return lines_of(rows)


def _variance(value: float) -> str:
    return "unknown" if math.isnan(value) else f"{value:.3g}"


def _expected(subject: Subject, design: Design, question: Question) -> list[str]:
    components = subject.planned.components(design.repetitions)
    rows = {"expected": f"{components.value:.4f}"}
    for population in POPULATIONS:
        rows[AT[population]] = _within(components, design, population)
    if subject.is_difference:
        difference = question.expected(subject.planned, design.repetitions)
        rows["power"] = f"{question.power_of(subject.planned, design):.2f} {AT[question.population]}, if it truly is "
        rows["power"] += f"{difference:.4f}"
        smallest = question.smallest_difference(subject.planned, design)
        if smallest is not None:
            rows["smallest difference"] = f"{smallest:.4f} is found with {100 * question.power:.0f} % power"
    return lines_of(rows)


def _within(components: Components, design: Design, population: Population) -> str:
    half_width = components.half_width(design, population)
    return f"95 % interval ± {half_width:.4f}" if math.isfinite(half_width) else "not known from a single one"


def _training_line(gain: _Gain | _MeanGain, stimuli: int) -> str:
    origin = "by the learning curves" if gain.is_measured(stimuli) else "EXTRAPOLATED by the learning curves"
    (line,) = lines_of({"training": f"{stimuli:,} stimuli change it by {gain(stimuli):+.4f}, {origin}"})
    return line


# ----------------------------------------------------------------------------------------------------- presentations


def _cheapest(asked: _Asked, options: PowerPlan, question: Question, sites: int) -> list[str]:
    assert options.presentations is not None
    share = options.held_out or asked.share
    shares = [share or 1.0]
    if asked.gain is not None and options.held_out is None and question.difference is None:
        shares = sorted({*SHARES, *([share] if share else [])})
    by_share = {one: _offers(asked, Budget(options.presentations, one, sites), question) for one in shares}
    best = best_offer([offer for of_share in by_share.values() for offer in of_share])
    if best is None:
        raise BadInput(f"presentations: too few for {LEAST_STIMULI} scored stimuli")
    chosen = next(one for one, of_share in by_share.items() if best in of_share)
    shown = [offer for offer in by_share[chosen] if offer is best or offer.design.repetitions in SHOWN_REPETITIONS]
    lines = [f"{options.presentations:,} presentations, {chosen:.0%} of the stimuli scored; best marked *"]
    if share is None and len(shares) == 1:
        lines[0] += " (how many stimuli were trained on is not known: only scored ones are counted)"
    lines += aligned(_offer_rows(shown, best))
    if is_extrapolated(best.design.repetitions, asked.subject.planned):
        lines.append("the best is EXTRAPOLATED: it has more than twice the recorded repetitions")
    if len(shares) > 1:
        lines.append("the share that is scored was chosen by the learning curves, which may be extrapolated")
    return lines


def _offers(asked: _Asked, budget: Budget, question: Question) -> list[Offer]:
    measured, gain = asked.subject.planned, asked.gain

    def trained(stimuli: int) -> Planned:
        """With a given difference, training stimuli do not matter."""
        if gain is None or question.difference is not None or stimuli == 0:
            return measured
        return Shifted(measured, gain(stimuli))

    return list(offers(measured, trained, budget, question, is_difference=asked.subject.is_difference))


def _offer_rows(shown: Sequence[Offer], best: Offer) -> list[list[str]]:
    has_power = best.power is not None
    rows = [["", "repetitions", "stimuli", "scored", "expected", "95 % ±", *(["power"] if has_power else [])]]
    for offer in shown:
        numbers = [f"{offer.design.repetitions:g}", f"{offer.shown:,}", f"{offer.design.stimuli:,}"]
        scores = [f"{offer.value:.4f}", f"{offer.half_width:.4f}"]
        rows.append(["*" if offer is best else "", *numbers, *scores, *([f"{offer.power:.2f}"] if has_power else [])])
    return rows
