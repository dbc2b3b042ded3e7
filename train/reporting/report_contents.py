"""A report: the runs and searches it compares, with their tables and figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.common.errors import BadInput
from train.reporting.data_efficiency import describe_gains
from train.reporting.figures import ReportFigure, confusion_figures, group_figures, training_figure
from train.reporting.groups import Group, groups_of
from train.reporting.papers_metrics import papers_metrics_table
from train.reporting.power.section import PowerSection, ReportedPower, report_power
from train.reporting.report_tables import (
    CSV_FIELDS,
    classifier_table,
    comparison_table,
    csv_table,
    curve_table,
    lead_table,
    rank_table,
)
from train.reporting.reported_run import ReportedRun, ScoredClassifier, scored_classifiers, shortest_names
from train.reporting.run_reading import read_run
from train.reporting.run_search import find_runs
from train.reporting.study_table import StudyResults, is_study, read_study, runs_of_study
from train.reporting.sweep_results import SweepResults, is_sweep, read_sweep
from train.reporting.table import Table, escape_markdown, in_csv, in_markdown, in_terminal


@dataclass(frozen=True)
class GroupSection:
    """What a report shows of runs that can be compared."""

    group: Group
    comparison: Table
    leads: Table | None
    ranks: Table | None
    papers_metrics: Table | None
    curves: Table | None
    figures: list[ReportFigure]
    power: PowerSection | None


@dataclass(frozen=True)
class ReportContents:
    """A report.

    Attributes:
        split: whose scores are shown.
        runs: all runs, scored or not.
        sections: on runs whose responses were scored.
        classifiers: the table of the runs that predict classes.
        confusion: their figures.
        training: the learning curves.
        sweeps: searches.
        studies: the tables and figures of studies, whose runs are among the others.
        power: what the recordings can decide.
        skipped: what was no run, or a damaged one, in the folders that were searched.
    """

    split: str
    runs: list[ReportedRun]
    sections: list[GroupSection]
    scored_classifiers: list[ScoredClassifier]
    classifiers: Table | None
    confusion: list[ReportFigure]
    training: ReportFigure | None
    sweeps: list[SweepResults]
    studies: list[StudyResults]
    power: ReportedPower
    skipped: list[str]

    @property
    def unscored(self) -> list[ReportedRun]:
        """Runs without scores on the split."""
        return [run for run in self.runs if run.metrics is None]

    @property
    def figures(self) -> list[ReportFigure]:
        """All figures."""
        of_studies = [study.figure for study in self.studies if study.figure is not None]
        of_groups = [figure for section in self.sections for figure in section.figures]
        return [*of_studies, *of_groups, *([self.training] if self.training else []), *self.confusion]

    @property
    def tables(self) -> list[Table]:
        """All tables of scores."""
        of_groups = [
            table
            for section in self.sections
            for table in (section.comparison, section.leads, section.ranks, section.papers_metrics, section.curves)
        ]
        return [table for table in (*of_groups, self.classifiers) if table is not None]

    def markdown(self) -> str:
        """All tables with their notes."""
        parts = [_titled(table) for study in self.studies for table in study.tables]
        for section in self.sections:
            parts.append(_titled(section.comparison))
            if section.ranks:
                parts.append(f"#{_titled(section.ranks)}")
            if section.papers_metrics:
                parts.append(f"#{_titled(section.papers_metrics)}")
            if section.curves:
                parts.append(in_markdown(section.curves))
        if self.classifiers:
            parts.append(_titled(self.classifiers))
        return "\n\n".join(parts)

    def csv(self) -> str:
        """Everything that the tables show with all digits, a line per run."""
        return in_csv(
            [*(section.comparison for section in self.sections), csv_table(self.scored_classifiers)], CSV_FIELDS
        )

    def summary(self) -> str:
        """A short summary for a terminal: tables, the best first, and what to beware of."""
        parts = []
        for section in self.sections:
            group = section.group
            power = section.power.sentence if section.power else ""
            sentences = [group.verdict, group.frozen_ahead, power, *group.warnings, describe_gains(group.curves)]
            sentences = [sentence for sentence in sentences if sentence]
            parts.append("\n".join([in_terminal(section.comparison), *(["", *sentences] if sentences else [])]))
        if self.classifiers:
            parts.append(in_terminal(self.classifiers))
        parts += [f"skipped: {sentence}" for sentence in self.skipped]
        parts += [f"{run.name}: not scored on {self.split} yet: {run.progress}" for run in self.unscored]
        return "\n\n".join(parts)


def _titled(table: Table) -> str:
    return f"### {escape_markdown(table.title)}\n\n{in_markdown(table)}"


def compare(
    folders: Sequence[Path], split: str, pair: tuple[Path, Path] | None, data: Sequence[str] | None = None
) -> ReportContents:
    """Read what is compared, and compare it.

    Args:
        folders: of runs, probes, ensembles, searches and studies, or folders that hold some.
        split: whose scores are compared.
        pair: two of the runs' folders, to be compared site by site; by default the two best.
        data: shard folders with the trials of what was scored; by default those that the runs were made from.

    Raises:
        BadInput: a folder cannot be read, or is named twice, or the pair is not among them.
    """
    found = find_runs(folders, split)
    folders = found.folders
    studies = [read_study(folder) for folder in folders if is_study(folder)]
    folders = [run for folder in folders for run in (runs_of_study(folder) if is_study(folder) else [folder])]
    sweeps = {folder: read_sweep(folder) for folder in folders if is_sweep(folder)}
    runs = read_runs(folders, split, sweeps)
    groups, classifiers = groups_of(runs), scored_classifiers(runs)
    paths = None if pair is None else (_find_scored(pair[0], groups), _find_scored(pair[1], groups))
    power = report_power(groups, data)
    anchors = {run.name: f"run-{number}" for number, run in enumerate(runs, 1)}
    sections = [
        GroupSection(
            group,
            comparison_table(group, anchors),
            lead_table(group),
            rank_table(group),
            papers_metrics_table(group),
            curve_table(group),
            _figures(group, paths, f"_{number}" if len(groups) > 1 else "", power.sections.get(number - 1)),
            power.sections.get(number - 1),
        )
        for number, group in enumerate(groups, 1)
    ]
    return ReportContents(
        split=split,
        runs=runs,
        sections=sections,
        scored_classifiers=classifiers,
        classifiers=classifier_table(classifiers),
        confusion=list(confusion_figures(runs)),
        training=training_figure(runs),
        sweeps=list(sweeps.values()),
        studies=studies,
        power=power,
        skipped=found.skipped,
    )


def _figures(
    group: Group, pair: tuple[Path, Path] | None, suffix: str, power: PowerSection | None
) -> list[ReportFigure]:
    return [*group_figures(group, pair, suffix), *([power.figure] if power else [])]


def read_runs(folders: Sequence[Path], split: str, sweeps: dict[Path, SweepResults]) -> list[ReportedRun]:
    """Read the runs among some folders; of a search its best trial.

    Raises:
        BadInput: a folder is not a run folder, or is named twice.
    """
    folders_by_run: dict[Path, Path] = {}
    for folder in folders:
        run = sweeps[folder].best if folder in sweeps else folder
        if run is None:
            continue
        if run.resolve() in {other.resolve() for other in folders_by_run}:
            raise BadInput(f"{folder} is named twice; name each run once")
        folders_by_run[run] = folder
    if not folders_by_run:
        return []
    runs = []
    names = shortest_names(list(folders_by_run.values()))
    for (path, folder), name in zip(folders_by_run.items(), names, strict=True):
        is_best_trial = folder in sweeps
        runs += read_run(path, split, f"{name}: best" if is_best_trial else name, name if is_best_trial else None)
    return runs


def _find_scored(path: Path, groups: Sequence[Group]) -> Path:
    """A run that --pair names, as it was named before.

    Raises:
        BadInput: it is not among the runs with scored responses.
    """
    for group in groups:
        for scored in group.runs:
            if scored.run.path.resolve() == path.resolve():
                return scored.run.path
    raise BadInput(f"--pair: {path} is not one of the runs with scored responses; name two of these")
