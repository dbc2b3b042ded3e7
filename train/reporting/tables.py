"""The comparison table of a report, as values, Markdown, CSV and lines for a terminal."""

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data_prep.common.terminal import aligned, bar, bold
from train.evaluation.comparison import Lead, leads
from train.reporting.data_efficiency import Curve, Point, curves_of, gains, notes
from train.reporting.rows import FAMILIES, Row, Score


@dataclass(frozen=True)
class Column:
    """A metric of the table.

    Attributes:
        key: in metrics.json.
        title: as people write it.
        arrow: which way is better.
        ceiling: from a site's reliability, what an ideal model scores; None where that is not known.
        in_short: whether it is one of the columns of the study's table, or of those beside them on the page.
    """

    key: str
    title: str
    arrow: str = "↑"
    ceiling: Callable[[float], float] | None = None
    in_short: bool = True


COLUMNS = (
    Column("r2", "R2", ceiling=lambda rho: rho),
    Column("mse", "MSE", "↓"),
    Column("explained_variance", "EV", ceiling=lambda rho: rho),
    Column("pearson_r", "Pearson r", ceiling=lambda rho: math.sqrt(max(rho, 0))),
    Column("ceiled_explained_variance", "ceiled EV", ceiling=lambda rho: 1.0),
    Column("ceiled_pearson_r", "ceiled r", ceiling=lambda rho: 1.0, in_short=False),
    Column("feve", "FEVE", ceiling=lambda rho: 1.0, in_short=False),
)
RESAMPLES = 2000


@dataclass(frozen=True)
class Group:
    """Runs whose responses were scored on the same stimuli and sites, so that they can be compared.

    Attributes:
        rows: in the order of the study's families, and as they were given within one.
    """

    rows: list[Row]

    @property
    def first(self) -> Row:
        """Speaks for all where they agree."""
        return self.rows[0]

    @property
    def simulated(self) -> bool:
        """Whether no brain took part."""
        return any(row.metrics.simulated for row in self.rows)

    @property
    def title(self) -> str:
        """What was predicted, e.g. "v4_natural800: 67 sites, 160 stimuli of val"."""
        metrics = self.first.metrics
        name = f"{metrics.recording}{' (SIMULATED)' if self.simulated else ''}"
        return f"{name}: {self.first.sites} sites, {metrics.stimuli:,} stimuli of {metrics.split}"

    @property
    def columns(self) -> list[Column]:
        """The metrics that a row has."""
        return [column for column in COLUMNS if any(self.score(row, column) for row in self.rows)]

    @staticmethod
    def score(row: Row, column: Column) -> Score | None:
        """A row's score; None where it has none."""
        score = row.regression.score(column.key)
        return None if score is None or score.mean is None else score

    @cached_property
    def paired(self) -> list[bool]:
        """Of each row, whether its predictions are those of the stimuli and responses that the first ones' are."""
        known = next((row.predictions for row in self.rows if row.predictions is not None), None)
        return [
            row.predictions is not None and np.array_equal(row.predictions.response, known.response, equal_nan=True)
            for row in self.rows
        ]

    @cached_property
    def leads(self) -> dict[str, list[Lead]]:
        """By metric each row's lead over the next, the best first."""
        resampled = [
            row.predictions.resampled(RESAMPLES) if there else None
            for row, there in zip(self.rows, self.paired, strict=True)
        ]
        stimuli, found = self.first.metrics.stimuli, {}
        for column in self.columns:
            scores = [score.mean if (score := self.score(row, column)) else None for row in self.rows]
            found[column.key] = leads(column.key, scores, resampled, stimuli)
        return found

    @cached_property
    def curves(self) -> list[Curve]:
        """Of the systems that were trained on several numbers of stimuli; none on the stimuli they were trained on."""
        return [] if self.first.metrics.split == "train" else curves_of(self.rows)

    @cached_property
    def sizes(self) -> list[int]:
        """The numbers of training stimuli that the curves have, ascending."""
        return sorted({point.stimuli for curve in self.curves for point in curve.points})

    def is_bold(self, number: int, column: Column) -> bool:
        """Whether the row is the best by that metric, and its lead over the next is beyond its interval."""
        ahead = self.leads[column.key]
        return bool(ahead) and ahead[0].better == number and ahead[0].is_certain

    def ranked(self) -> list[Row]:
        """The rows by R2, the best first; those without come last."""
        scores = {row.path: row.regression.r2.mean for row in self.rows}
        return sorted(self.rows, key=lambda row: math.inf if scores[row.path] is None else -scores[row.path])

    @property
    def ceiling(self) -> Score | None:
        """The sites' reliability, where it is known."""
        return next((row.regression.ceiling for row in self.rows if row.regression.ceiling), None)

    def ceiling_of(self, column: Column) -> float | None:
        """What an ideal model would score, mean over sites."""
        known = [value for value in self.ceiling.per_site if value is not None] if self.ceiling else []
        return None if column.ceiling is None or not known else float(np.mean([column.ceiling(rho) for rho in known]))

    def notes(self, in_short: bool = False) -> list[str]:
        """What the numbers mean and what to beware of, in sentences; `in_short` of the columns that are in short."""
        split, sites = self.first.metrics.split, self.first.sites
        stimuli = self.first.metrics.stimuli
        notes = [
            f"Mean over {sites} sites on the {stimuli:,} stimuli of {split}; "
            "in brackets the 95 % interval over stimuli."
        ]
        if len(self.rows) > 1:
            notes.append(
                "Bold: the best, where its lead over the next best is beyond the 95 % interval of their difference "
                f"(paired bootstrap, {RESAMPLES:,} resamples of the stimuli, the same for all)."
            )
        if self.ceiling:
            notes.append(f"Ceiling: {self.ceiling.method}; it bounds R2 and EV, its square root bounds r.")
        notes += self._ceilings([column for column in self.columns if column.in_short or not in_short])
        if left_out := self.first.regression.unreliable_sites:
            notes.append(
                f"{len(left_out)} of the {sites} sites are too unreliable for ceiled scores and left out of them."
            )
        if without := self.first.regression.sites_without_r2:
            notes.append(f"{len(without)} of the {sites} sites have no R2 (constant responses) and are left out.")
        if any(split in row.metrics.selected_on for row in self.rows):
            notes.append(f"A model selected on {split} is flattered by its score there.")
        if unpaired := [row.title for row, there in zip(self.rows, self.paired, strict=True) if not there]:
            notes.append(
                f"Without predictions.npz of the same stimuli, so not compared in pairs: {', '.join(unpaired)}."
            )
        if self.simulated:
            notes.append("The recording is SIMULATED: no brain took part.")
        return notes

    def _ceilings(self, columns: Sequence[Column]) -> list[str]:
        """What the ceiled scores are relative to."""
        found: dict[str, list[str]] = {}
        for column in columns:
            for against in sorted({s.ceiling for row in self.rows if (s := self.score(row, column)) and s.ceiling}):
                found.setdefault(against, []).append(column.title)
        return [f"{' and '.join(titles)}: relative to {against}." for against, titles in found.items()]


def groups_of(rows: Sequence[Row]) -> list[Group]:
    """The runs with scored responses, those together that were scored on the same stimuli and sites."""
    found: list[list[Row]] = []
    for row in sorted((row for row in rows if row.regression), key=lambda row: FAMILIES.index(row.family)):
        together = next((group for group in found if _comparable(group[0], row)), None)
        if together is None:
            found.append([row])
        else:
            together.append(row)
    return [Group(group) for group in found]


def _comparable(a: Row, b: Row) -> bool:
    facts = [(row.metrics.recording, row.metrics.split, row.metrics.stimuli, row.sites) for row in (a, b)]
    prints = {row.metrics.fingerprint for row in (a, b)} - {None}
    return facts[0] == facts[1] and len(prints) < 2


# ---------------------------------------------------------------------------------------------------------- cells


def number(value: float | None) -> str:
    """As all tables show a score."""
    return "-" if value is None else f"{value:.3f}"


def interval(values: Sequence[float] | None) -> str:
    """As all tables show one."""
    return "" if values is None else f"[{values[0]:.3f}, {values[1]:.3f}]"


def duration(seconds: float | None) -> str:
    """At most two units: 45 s, 12 min, 3.2 h."""
    if seconds is None:
        return "-"
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}" if seconds < 10 * length else f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def size_of(parameters: int) -> str:
    """A number of parameters: 840, 84 k, 25.6 M."""
    if parameters >= 1e6:
        return f"{parameters / 1e6:.1f} M"
    return f"{parameters / 1e3:.0f} k" if parameters >= 1e4 else f"{parameters:,}"


def sized(row: Row) -> str:
    """A model's parameters, and those of them that were fitted where these are fewer."""
    if row.parameters is None:
        return "-"
    whole, fitted = row.parameters
    return size_of(whole) if whole == fitted else f"{size_of(whole)} ({size_of(fitted)} fitted)"


def on_curve(point: Point | None) -> tuple[str, str]:
    """A point of a curve as tables show it: the score, and what it is to be believed."""
    if point is None:
        return "-", ""
    spread = f"({point.spread[0]:.3f} to {point.spread[1]:.3f})" if point.spread else interval(point.ci95)
    return number(point.mean), spread


def chosen_on(row: Row) -> str:
    """The stimuli that chose its epoch, layer or penalty."""
    return ", ".join(row.metrics.selected_on) or "-"


# --------------------------------------------------------------------------------------------------------- formats


def markdown(groups: Sequence[Group], classifiers: Sequence[Row]) -> str:
    """All tables, with their notes."""
    parts = [_markdown_group(group) for group in groups]
    if classifiers:
        parts.append(_markdown_classifiers(classifiers))
    return "\n\n".join(parts)


def _markdown_group(group: Group) -> str:
    titles = [f"{column.title} {column.arrow}" for column in group.columns]
    header = ["model", "family", *titles, "parameters", "training", "hardware", "selected on"]
    lines = [f"### {_in_markdown(group.title)}", "", _line(header), _line(["---"] * len(header))]
    for index, row in enumerate(group.rows):
        cells = []
        for column in group.columns:
            score = group.score(row, column)
            text = f"{number(score.mean)} {interval(score.ci95)}".strip() if score else "-"
            cells.append(f"**{text}**" if group.is_bold(index, column) else text)
        facts = [sized(row), duration(row.seconds), row.hardware, chosen_on(row)]
        lines.append(
            _line([_in_markdown(cell) for cell in (row.title, row.family)] + cells + list(map(_in_markdown, facts)))
        )
    if group.ceiling:
        cells = [number(group.ceiling_of(column)) for column in group.columns]
        lines.append(_line(["*ceiling*", "", *cells, "", "", "", ""]))
    parts = ["\n".join([*lines, "", *(_in_markdown(note) for note in group.notes())])]
    parts += [_markdown_curves(group)] if group.curves else []
    return "\n\n".join(parts)


def _markdown_curves(group: Group) -> str:
    header = ["training stimuli", *(f"{size:,}" for size in group.sizes), "per doubling"]
    lines = [_line(header), _line(["---"] * len(header))]
    for curve in group.curves:
        cells = [" ".join(on_curve(curve.at(size))).strip() for size in group.sizes]
        lines.append(_line([_in_markdown(curve.name), *cells, number(curve.gain)]))
    return "\n".join([*lines, "", *notes(group.curves)])


def _markdown_classifiers(rows: Sequence[Row]) -> str:
    header = ["model", "recording", "stimuli", "top-1 ↑", "top-5 ↑", "balanced accuracy ↑", "selected on"]
    lines = ["### Naming the object", "", _line(header), _line(["---"] * len(header))]
    for row in rows:
        found = row.classification
        scores = [number(found.top1), number(found.top5), number(found.balanced_accuracy)]
        name, stimuli = row.metrics.recording, f"{row.metrics.stimuli:,} of {row.metrics.split}"
        facts = [_in_markdown(text) for text in (row.title, name, stimuli)]
        lines.append(_line([*facts, *scores, _in_markdown(chosen_on(row))]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _in_markdown(text: str) -> str:
    """A text that means only itself in a Markdown table."""
    for character, instead in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "\\`"), ("\n", " ")):
        text = text.replace(character, instead)
    return text


def as_csv(groups: Sequence[Group], classifiers: Sequence[Row]) -> str:
    """Everything the tables show, with all digits, a line per run."""
    text = io.StringIO()
    scores = [f"{c.key}{part}" for c in COLUMNS for part in ("", "_low", "_high", "_lead", "_lead_low", "_lead_high")]
    facts = ["recording", "simulated", "split", "stimuli", "sites", "model", "family", "what", "run"]
    facts += ["training_stimuli", "curve"]
    others = ["top1", "top5", "balanced_accuracy", "parameters", "parameters_fitted", "training_seconds", "hardware"]
    header = [*facts, *scores, *others, "selected_on", "control", "git_commit", "data", "command"]
    writer = csv.DictWriter(text, header, lineterminator="\n", restval="")
    writer.writeheader()
    for group in groups:
        curve_of = {row.path: curve.name for curve in group.curves for point in curve.points for row in point.rows}
        for index, row in enumerate(group.rows):
            curve = {"curve": curve_of.get(row.path, "")}
            writer.writerow(_plain(_facts(row) | curve | _scores(group, index, row)))
    for row in classifiers:
        if row.regression is None:
            writer.writerow(_plain(_facts(row)))
    return text.getvalue()


def _facts(row: Row) -> dict[str, object]:
    metrics, size = row.metrics, row.parameters or ("", "")
    named = row.classification
    return {
        "recording": metrics.recording,
        "simulated": metrics.simulated,
        "split": metrics.split,
        "stimuli": metrics.stimuli,
        "sites": row.sites or "",
        "model": row.title,
        "family": row.family,
        "what": row.what,
        "run": str(row.path),
        "training_stimuli": metrics.training_stimuli or "",
        "parameters": size[0],
        "parameters_fitted": size[1],
        "training_seconds": "" if row.seconds is None else row.seconds,
        "hardware": row.hardware,
        "selected_on": chosen_on(row),
        "control": metrics.control or "",
        "git_commit": row.environment.git_commit or "",
        "data": row.environment.data or "",
        "command": row.commands[0] if row.commands else "",
        **({} if named is None else named.model_dump(include={"top1", "top5", "balanced_accuracy"})),
    }


def _scores(group: Group, index: int, row: Row) -> dict[str, object]:
    found: dict[str, object] = {}
    for column in group.columns:
        if score := group.score(row, column):
            found[column.key] = score.mean
            found |= dict(zip((f"{column.key}_low", f"{column.key}_high"), score.ci95 or (), strict=False))
        if lead := next((lead for lead in group.leads[column.key] if lead.better == index), None):
            found[f"{column.key}_lead"] = lead.difference
            ends = (f"{column.key}_lead_low", f"{column.key}_lead_high")
            found |= dict(zip(ends, lead.interval or (), strict=False))
    return found


def _plain(cells: dict[str, object]) -> dict[str, object]:
    """Cells that no spreadsheet takes for a formula."""
    return {k: f"'{v}" if isinstance(v, str) and v[:1] in "=+-@\t\r" and v else v for k, v in cells.items()}


def in_terminal(groups: Sequence[Group], classifiers: Sequence[Row], unscored: Sequence[Row]) -> str:
    """A short summary: the best first, with a bar for R2."""
    parts = []
    for group in groups:
        best = max((row.regression.r2.mean or 0 for row in group.rows), default=0)
        top = max(best, group.ceiling_of(COLUMNS[0]) or 0, 1e-9)
        lines = [["model", "R2", "95 %", "", *(c.title for c in group.columns[1:] if c.in_short), "selected on"]]
        for row in group.ranked():
            index, score = group.rows.index(row), row.regression.r2
            cells = [bold(row.title) if group.is_bold(index, COLUMNS[0]) else row.title, number(score.mean)]
            cells += [interval(score.ci95), bar((score.mean or 0) / top)]
            others = [group.score(row, column) for column in group.columns[1:] if column.in_short]
            lines.append([*cells, *(number(s.mean if s else None) for s in others), chosen_on(row)])
        if group.ceiling:
            values = [number(group.ceiling_of(c)) for c in group.columns if c.in_short]
            lines.append(["ceiling", values[0], "", bar((group.ceiling_of(COLUMNS[0]) or 0) / top), *values[1:], ""])
        parts.append("\n".join([bold(group.title), *aligned(lines), *_lead_lines(group)]))
    if classifiers:
        lines = [["model", "top-1", "balanced", "recording"]]
        for row in classifiers:
            found = row.classification
            lines.append([row.title, number(found.top1), number(found.balanced_accuracy), row.metrics.recording])
        parts.append("\n".join([bold("Naming the object"), *aligned(lines)]))
    parts += [f"{row.name}: not scored on {row.split} yet: {row.state}" for row in unscored]
    return "\n\n".join(parts)


def _lead_lines(group: Group) -> list[str]:
    """Who is ahead, and what to beware of."""
    warnings = [note for note in group.notes() if note.startswith(("A model selected", "The recording is SIMULATED"))]
    said = [sentence(group, lead) for lead in group.leads["r2"][:1]] + warnings
    said += [told] if (told := gains(group.curves)) else []
    return ["", *said] if said else []


def sentence(group: Group, lead: Lead) -> str:
    """A lead in words."""
    of, over = group.rows[lead.better].title, group.rows[lead.worse].title
    if lead.interval is None:
        return f"{of} is ahead of {over} by {lead.difference:.3f} in R2; there are no predictions to test that with."
    verdict = "beyond" if lead.is_certain else "within"
    return (
        f"{of} is ahead of {over} by {lead.difference:.3f} in R2, 95 % interval {interval(lead.interval)}: "
        f"{verdict} what other stimuli would change."
    )
