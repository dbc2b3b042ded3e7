"""power.json: what a report's recordings can decide, in numbers; docs/power.md describes it."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from train.evaluation.power.components import POPULATIONS, Components, Design
from train.evaluation.power.planning import Planned, Question, need
from train.reporting.groups import R2
from train.reporting.power.group_power import GroupPower, JoinedPower
from train.reporting.power.power_figure import numbers_of_repetitions, numbers_of_stimuli
from train.reporting.power.wording import Subject

FORMAT_VERSION = 1
GRID_STIMULI = 12
DETAILED = 5  # differences, from the best two on, of which the file says what would be needed


def group_facts(power: GroupPower, subject: Subject, design: Design, question: Question, sentence: str) -> dict:
    """A recording's part."""
    repetitions = subject.planned.repetitions
    return {
        "recording": power.group.recording,
        "split": power.group.split,
        "stimuli": power.group.stimuli,
        "sites": power.group.sites,
        "repetitions": repetitions,
        "trials": power.recorded.source,
        "metric": power.metric.key,
        "comparisons": question.comparisons,
        "sentence": sentence,
        "models": [_model(power, index) for index in power.models],
        "differences": [
            _difference(power, better, worse, question, is_detailed=number < DETAILED)
            for number, (better, worse) in enumerate(itertools.pairwise(power.models))
        ],
        "designs": _designs(subject, design, question),
    }


def joined_facts(power: JoinedPower, subject: Subject, design: Design, question: Question, sentence: str) -> dict:
    """The part of several recordings together; numbers of stimuli and sites are those of each of them."""
    return {
        "recordings": [group.group.recording for group in power.groups],
        "runs": [str(run) for run in power.runs],
        "repetitions": subject.planned.repetitions,
        "comparisons": question.comparisons,
        "sentence": sentence,
        "design": asdict(design),
        **_facts_of(subject.planned.components(), design),
        **(_power(subject.planned, design, question) if subject.is_difference else {}),
        **({"needed": _needed(subject.planned, design, question)} if subject.is_difference else {}),
        "designs": _designs(subject, design, question),
    }


def file_content(recordings: list[dict], joined: dict | None, question: Question) -> dict[str, Any]:
    """The whole file."""
    content: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "power": question.power,
        "populations": dict(POPULATIONS),
        "recordings": recordings,
    }
    return _finite(content | ({"joined": joined} if joined else {}))


def _model(power: GroupPower, index: int) -> dict[str, Any]:
    study = power.study(index)
    assert study is not None, "a model has one"
    standing = power.group.standings.get(index) if power.metric.key == R2.key else None
    facts: dict[str, Any] = {"model": power.run(index).title, "run": str(power.run(index).path)}
    facts |= _facts_of(study.components(), study.design)
    if standing is not None:
        facts |= standing.content()
    layers = power.group.runs[index].metrics.layers
    standings = {name: layer.standing.model_dump() for name, layer in layers.items() if layer.standing}
    if standings:
        facts["layers"] = standings
    learning = power.learning(index)
    if learning is not None:
        facts["learning_curve"] = asdict(learning.curve) | {"training_stimuli": learning.stimuli}
    return facts


def _difference(power: GroupPower, better: int, worse: int, question: Question, *, is_detailed: bool) -> dict[str, Any]:
    study = power.study(better, worse)
    facts: dict[str, Any] = {"better": power.run(better).title, "worse": power.run(worse).title}
    if study is None:
        return facts
    lead = next((one for one in power.group.leads.get(power.metric.key, []) if one.better == better), None)
    facts |= _facts_of(study.components(), study.design)
    if lead is not None and lead.worse == worse:
        facts |= {"ci95": lead.interval, "adjusted": lead.adjusted}
    facts |= _power(study, study.design, question)
    if is_detailed:
        facts["needed"] = _needed(study, study.design, question)
    return facts


def _facts_of(components: Components, design: Design) -> dict[str, Any]:
    return {
        "value": components.value,
        "components": {name: getattr(components, name) for name in ("stimulus", "site", "rest")},
        "intervals": {population: list(components.interval(design, population)) for population in POPULATIONS},
    }


def _power(planned: Planned, design: Design, question: Question) -> dict[str, Any]:
    """For each population: the power, and the smallest difference that is found."""
    facts: dict[str, dict[str, Any]] = {"power": {}, "smallest_difference": {}}
    for population in POPULATIONS:
        of_population = replace(question, population=population)
        facts["power"][population] = of_population.power_of(planned, design)
        facts["smallest_difference"][population] = of_population.smallest_difference(planned, design)
    return facts


def _needed(planned: Planned, design: Design, question: Question) -> dict[str, Any]:
    """For each population: the numbers that would be enough."""
    return {name: asdict(need(planned, design, replace(question, population=name))) for name in POPULATIONS}


def _designs(subject: Subject, design: Design, question: Question) -> dict[str, Any]:
    """Half widths and power of other designs: a list over repetitions of lists over stimuli."""
    stimuli = numbers_of_stimuli(design, GRID_STIMULI)
    repetitions: list[int] = numbers_of_repetitions(subject)
    rows = [replace(design, repetitions=number) for number in repetitions] or [design]
    designs = [[replace(row, stimuli=number) for number in stimuli] for row in rows]
    facts: dict[str, Any] = {
        "of": list(subject.models),
        "stimuli": stimuli,
        "repetitions": repetitions,
        "sites": design.sites,
        "half_width": {
            population: [
                [subject.planned.components(one.repetitions).half_width(one, population) for one in row]
                for row in designs
            ]
            for population in POPULATIONS
        },
    }
    if subject.is_difference:
        facts["power"] = [[question.power_of(subject.planned, one) for one in row] for row in designs]
    return facts


def _finite(content: Any) -> Any:
    """JSON has no infinite numbers: they become null."""
    if isinstance(content, Mapping):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
