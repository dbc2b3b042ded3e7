"""What a report says of power: for each recording one sentence, one figure, and a part of power.json."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from train.evaluation.power.influence import PLANNED
from train.evaluation.power.planning import Question
from train.reporting.figures import ReportFigure, report_figure
from train.reporting.groups import R2, Group
from train.reporting.power.group_power import GroupPower, JoinedPower, join
from train.reporting.power.power_figure import draw_power
from train.reporting.power.power_file import file_content, group_facts, joined_facts
from train.reporting.power.recorded_trials import trials_of
from train.reporting.power.wording import AT, Subject, finding


@dataclass(frozen=True)
class PowerSection:
    """Of a group of runs that can be compared.

    Attributes:
        sentence: what it would take.
        figure: intervals and power of other designs.
        facts: the part of power.json.
    """

    sentence: str
    figure: ReportFigure
    facts: dict[str, Any]


@dataclass(frozen=True)
class ReportedPower:
    """Of a report.

    Attributes:
        sections: by the number of the group; none for groups without predictions.
        joined: the sentence on all recordings together; empty if there is none.
        content: of power.json.
    """

    sections: dict[int, PowerSection]
    joined: str
    content: dict[str, Any]


def report_power(groups: Sequence[Group], data: Sequence[str] | None) -> ReportedPower:
    """What the groups of a report can decide, and what more stimuli, repetitions and sites would.

    Args:
        groups: of runs.
        data: shard folders with the trials; by default those that the runs were made from, if they are there.
    """
    powers = {number: GroupPower(group, trials_of(group, data), PLANNED[R2.key]) for number, group in enumerate(groups)}
    powers = {number: power for number, power in powers.items() if power.models}
    sections = {
        number: _section(power, f"_{number + 1}" if len(groups) > 1 else "") for number, power in powers.items()
    }
    joined = join(list(powers.values()))
    joined_content, sentence = None, ""
    if joined is not None:
        subject, design = joined_subject(joined), joined.study.design
        question = Question(comparisons=joined.comparisons)
        sentence = f"Mean over {joined.title}, numbers in each: {finding(subject, design, question)}"
        joined_content = joined_facts(joined, subject, design, question, sentence)
    content = file_content([section.facts for section in sections.values()], joined_content, Question())
    return ReportedPower(sections, sentence, content)


def subject_of(power: GroupPower) -> Subject:
    """The two best models of a group, or its only one."""
    study = power.study(*power.best)
    assert study is not None, "a model has one"
    titles = [power.run(index).title for index in power.best]
    return Subject(titles, power.metric.title, study, power.recorded.source)


def joined_subject(joined: JoinedPower) -> Subject:
    """The two best models of several recordings, or the only one."""
    without = [power.recorded.source for power in joined.groups if power.recorded.trials is None]
    return Subject(joined.titles, joined.groups[0].metric.title, joined.study, "; ".join(without))


def _section(power: GroupPower, suffix: str) -> PowerSection:
    subject = subject_of(power)
    question = Question(comparisons=power.comparisons if subject.is_difference else 1)
    design = subject.planned.design
    sentence = finding(subject, design, question)
    caption = _caption(power, subject, question)
    figure = report_figure(f"power{suffix}", caption, draw_power(subject, design, question))
    return PowerSection(sentence, figure, group_facts(power, subject, design, question, sentence))


def _caption(power: GroupPower, subject: Subject, question: Question) -> str:
    lines = [
        f"What other designs would tell of {subject.name} ({AT['stimuli']}; dotted: {AT['both']}); ring: as measured."
    ]
    if subject.is_difference:
        smallest = question.smallest_difference(subject.planned, subject.planned.design)
        if smallest is not None:
            lines.append(
                f"The smallest difference that is found with {100 * question.power:.0f} % power: {smallest:.3f}."
            )
    if power.recorded.trials is None:
        lines.append(f"Stimuli and sites only: {power.recorded.source}.")
    return " ".join([*lines, f"{power.group.title}."])
