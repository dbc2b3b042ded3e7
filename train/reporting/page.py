"""The page of a report: one HTML file that needs no network and runs no script but its own.

Every text that comes from a run goes through `html.escape`. Should one slip through all the same, the page's content
security policy lets nothing run but the script whose hash it names, and load nothing; figures are images, in which
browsers run no scripts.
"""

import base64
import hashlib
import html
import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files

import yaml

from train.evaluation.metrics import LOWER_IS_BETTER
from train.reporting import published
from train.reporting.data_efficiency import notes
from train.reporting.figures import CONFUSION, Figure
from train.reporting.rows import Row
from train.reporting.sweep_results import SweepResults
from train.reporting.tables import Column, Group, chosen_on, duration, interval, number, on_curve, sentence, sized


@dataclass(frozen=True)
class Content:
    """What a report is about.

    Attributes:
        split: whose scores are shown.
        rows: all runs.
        groups: of those whose responses were scored, which can be compared.
        figures: the figures with the group that each belongs to.
        sweeps: searches.
        made: when, with what.
    """

    split: str
    rows: Sequence[Row]
    groups: Sequence[Group]
    figures: Sequence[tuple[Group | None, Figure]]
    sweeps: Sequence[SweepResults]
    made: str

    @property
    def classifiers(self) -> list[Row]:
        """Runs that name objects."""
        return [row for row in self.rows if row.classification]

    @property
    def unscored(self) -> list[Row]:
        """Runs without scores on the split."""
        return [row for row in self.rows if row.metrics is None]


def page(content: Content) -> str:
    """The whole page."""
    script = files("train.reporting").joinpath("page.js").read_text(encoding="utf-8")
    template = string.Template(files("train.reporting").joinpath("page.html").read_text(encoding="utf-8"))
    names = [group.first.metrics.recording for group in content.groups]
    title = f"Encoding models of {', '.join(dict.fromkeys(names))}" if names else "Encoding models"
    parts = [_head(content, title)]
    parts += [_group(group, content) for group in content.groups]
    parts += [_classifiers(content)] if content.classifiers else []
    curves = [figure for figure in _of(content, None) if not figure.name.startswith(CONFUSION)]
    parts += [_section("training", "Training", _figures(curves))] if curves else []
    parts += [_sweep(sweep, number) for number, sweep in enumerate(content.sweeps, 1)]
    parts += [_published(), _runs(content), f"<footer>{_text(content.made)}</footer>"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return template.substitute(title=_text(title), body="\n".join(parts), script=script, script_hash=digest)


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _section(anchor: str, title: str, *content: str) -> str:
    return f'<section id="{anchor}"><h2>{_text(title)}</h2>\n' + "\n".join(content) + "</section>"


def _head(content: Content, title: str) -> str:
    links = [(f"data-{_number(content, group)}", group.title) for group in content.groups]
    links += [("classes", "Naming objects")] * bool(content.classifiers)
    links += [("training", "Training")] * any(not p.name.startswith(CONFUSION) for p in _of(content, None))
    links += [(f"sweep-{n}", f"Search {sweep.name}") for n, sweep in enumerate(content.sweeps, 1)]
    links += [("published", "Published numbers"), ("runs", "Commands and versions")]
    parts = [f"<h1>{_text(title)}</h1>"]
    if any(group.simulated for group in content.groups):
        parts.append('<p class="mark"><b>SIMULATED.</b> A recording here is simulated: no brain took part.</p>')
    parts += [f'<p class="lead">{_squared(_finding(group))}</p>' for group in content.groups]
    if not content.groups and not content.classifiers:
        parts.append(f'<p class="lead">No run has been scored on {_text(content.split)} yet.</p>')
    if content.unscored:
        lines = "".join(f"<li><b>{_text(row.name)}</b>: {_text(row.state)}</li>" for row in content.unscored)
        parts.append(
            f'<div class="mark">Not in the tables, because not scored on {_text(content.split)} yet:'
            f"<ul>{lines}</ul></div>"
        )
    parts.append("<nav>" + "".join(f'<a href="#{anchor}">{_text(label)}</a>' for anchor, label in links) + "</nav>")
    return "<header>" + "\n".join(parts) + "</header>"


def _number(content: Content, group: Group) -> int:
    return content.groups.index(group) + 1


def _finding(group: Group) -> str:
    best = group.ranked()[0]
    score = best.regression.r2
    begin = f"{group.first.metrics.recording}: "
    if len(group.rows) > 1 and group.leads["r2"]:
        lead = group.leads["r2"][0]
        return f"{begin}R2 {number(score.mean)} {interval(score.ci95)} with {best.title}. {sentence(group, lead)}"
    return f"{begin}R2 {number(score.mean)} {interval(score.ci95)} with {best.title}."


# ---------------------------------------------------------------------------------------------------------- tables


def _header(title: str, first: str = "descending", text: bool = False) -> str:
    kind = f' class="text{" family" if title == "family" else ""}"' if text else ""
    return f'<th scope="col"{kind} data-first="{first}"><button type="button">{_squared(title)}</button></th>'


def _squared(text: str) -> str:
    """A text of ours for the page, with R2 as it is printed."""
    return re.sub(r"\bR2\b", "R²", _text(text))


def _table(header: Iterable[str], body: Iterable[str], foot: str = "") -> str:
    foot = f"<tfoot>{foot}</tfoot>" if foot else ""
    rows = "\n".join(body)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="table"><table>'
        f"<thead><tr>{''.join(header)}</tr></thead>\n<tbody>{rows}</tbody>{foot}</table></div>"
    )


def _group(group: Group, content: Content) -> str:
    columns = [column for column in group.columns if column.in_short]
    header = [_header("model", "ascending", text=True), _header("family", "ascending", text=True)]
    header += [
        _header(f"{c.title} {c.arrow}", "ascending" if c.key in LOWER_IS_BETTER else "descending") for c in columns
    ]
    header += [_header("parameters"), _header("training"), _header("hardware", "ascending", text=True)]
    header += [_header("selected on", "ascending", text=True)]
    body = [_row(group, index, row, columns, content) for index, row in enumerate(group.rows)]
    notes = "".join(f"<li>{_squared(note)}</li>" for note in group.notes(in_short=True))
    notes += '<li class="sorting">A heading sorts the table by its column.</li>'
    anchor = f"data-{_number(content, group)}"
    parts = [_table(header, body, _ceiling(group, columns)), f'<ul class="notes">{notes}</ul>']
    parts += [_leads(group)] if len(group.rows) > 1 else []
    parts += [_curves(group)] if group.curves else []
    return _section(anchor, group.title, *parts, _figures(_of(content, group)))


def _row(group: Group, index: int, row: Row, columns: Sequence[Column], content: Content) -> str:
    anchor = f"run-{content.rows.index(row) + 1}"
    cells = [
        f'<th scope="row" class="text" data-value="{_text(row.title)}"><a href="#{anchor}">{_text(row.title)}</a>'
        f'<span class="what">{_text(row.what)}</span></th>',
        f'<td class="text family">{_text(row.family)}</td>',
    ]
    for column in columns:
        score = group.score(row, column)
        best = ' class="best"' if group.is_bold(index, column) else ""
        if score is None:
            cells.append('<td data-value="">-</td>')
        else:
            band = f'<span class="ci">{interval(score.ci95)}</span>' if score.ci95 else ""
            cells.append(f'<td{best} data-value="{score.mean!r}">{number(score.mean)}{band}</td>')
    size = "" if row.parameters is None else row.parameters[0]
    shown, _, fitted = sized(row).partition(" (")
    fitted = f'<span class="ci">{fitted.rstrip(")")}</span>' if fitted else ""
    cells += [f'<td data-value="{size}">{shown}{fitted}</td>']
    cells += [f'<td data-value="{"" if row.seconds is None else row.seconds}">{duration(row.seconds)}</td>']
    cells += [f'<td class="text wide">{_text(row.hardware)}</td>', f'<td class="text">{_text(chosen_on(row))}</td>']
    return f"<tr>{''.join(cells)}</tr>"


def _ceiling(group: Group, columns: Sequence[Column]) -> str:
    if not group.ceiling:
        return ""
    cells = "".join(f"<td>{number(group.ceiling_of(column))}</td>" for column in columns)
    name = '<th scope="row" class="text">ceiling</th><td class="family"></td>'
    return f"<tr>{name}{cells}{'<td></td>' * 4}</tr>"


def _leads(group: Group) -> str:
    header = [_header("model", "ascending", True), _header("ahead of", "ascending", True)]
    header += [_header("difference in R2"), _header("95 % interval"), _header("beyond it", "ascending", True)]
    body = []
    for lead in group.leads["r2"]:
        of, over = group.rows[lead.better].title, group.rows[lead.worse].title
        verdict = "-" if lead.interval is None else "yes" if lead.is_certain else "no"
        low = "" if lead.interval is None else lead.interval[0]
        body.append(
            f'<tr><th scope="row" class="text">{_text(of)}</th><td class="text">{_text(over)}</td>'
            f'<td data-value="{lead.difference!r}">{number(lead.difference)}</td>'
            f'<td data-value="{low}">{interval(lead.interval) or "-"}</td><td class="text">{verdict}</td></tr>'
        )
    return "<h3>Each model against the next best, on the same stimuli</h3>" + _table(header, body)


def _curves(group: Group) -> str:
    header = [_header("training stimuli", "ascending", True), *(_header(f"{size:,}") for size in group.sizes)]
    body = []
    for curve in group.curves:
        cells = []
        for point in map(curve.at, group.sizes):
            score, band = on_curve(point)
            value = "" if point is None else repr(point.mean)
            cells.append(
                f'<td data-value="{value}">{score}{f"""<span class="ci">{band}</span>""" if band else ""}</td>'
            )
        gain = "" if curve.gain is None else repr(curve.gain)
        what = f'<span class="what">{_text(curve.what)}</span>' if curve.what != curve.name else ""
        body.append(
            f'<tr><th scope="row" class="text">{_text(curve.name)}{what}</th>{"".join(cells)}'
            f'<td data-value="{gain}">{number(curve.gain)}</td></tr>'
        )
    words = "".join(f"<li>{_squared(note)}</li>" for note in notes(group.curves))
    table = _table([*header, _header("per doubling")], body)
    return f'<h3>More training stimuli</h3>{table}<ul class="notes">{words}</ul>'


def _classifiers(content: Content) -> str:
    titles = ("top-1 ↑", "top-5 ↑", "balanced accuracy ↑")
    header = [_header("model", "ascending", True), _header("recording", "ascending", True), _header("stimuli")]
    header += [*map(_header, titles), _header("selected on", "ascending", True)]
    body = []
    for row in content.classifiers:
        found = row.classification
        scores = "".join(
            f'<td data-value="{"" if score is None else repr(score)}">{number(score)}</td>'
            for score in (found.top1, found.top5, found.balanced_accuracy)
        )
        body.append(
            f'<tr><th scope="row" class="text">{_text(row.title)}<span class="what">{_text(row.what)}</span></th>'
            f'<td class="text">{_text(row.metrics.recording)}</td><td>{row.metrics.stimuli:,}</td>{scores}'
            f'<td class="text">{_text(chosen_on(row))}</td></tr>'
        )
    drawn = [figure for figure in _of(content, None) if figure.name.startswith(CONFUSION)]
    return _section("classes", "Naming the object", _table(header, body), _figures(drawn))


def _sweep(sweep: SweepResults, place: int) -> str:
    body = []
    for line in sweep.rows:
        first, *others = line
        cells = "".join(f'<td class="text">{_text(cell)}</td>' for cell in others)
        body.append(f'<tr><th scope="row" class="text">{_text(first)}</th>{cells}</tr>')
    header = [_header(title, "ascending", True) for title in sweep.header]
    figure = _image(sweep.figure, "png", f"{sweep.name}: what was found where") if sweep.figure else ""
    notes = f"<p>{_text(sweep.summary)}</p>"
    return _section(f"sweep-{place}", f"Search {sweep.name}", notes, figure, _table(header, body))


def _published() -> str:
    header = [_header("model", "ascending", True), _header("family", "ascending", True)]
    header += [_header("R2 ↑"), _header("MSE ↓", "ascending"), _header("EV ↑")]
    body = [
        f'<tr><th scope="row" class="text">{_text(row.model)}</th><td class="text family">{_text(row.family)}</td>'
        f"<td>{row.r2}</td><td>{row.mse}</td><td>{row.explained_variance}</td></tr>"
        for row in published.TABLE
    ]
    words = (
        f"<p><b>Published, not measured here</b>, and on other data than the tables above unless these are the same "
        f"recording and split. {_text(published.SOURCE)}.</p>"
    )
    return _section("published", "For reference: the study's published numbers", words, _table(header, body))


# --------------------------------------------------------------------------------------------------------- figures


def _of(content: Content, group: Group | None) -> list[Figure]:
    return [figure for of, figure in content.figures if of is group]


def _figures(drawn: Sequence[Figure]) -> str:
    shown = "".join(_image(p.files["svg"], "svg+xml", p.caption, p.name) for p in drawn)
    return f'<div class="figures">{shown}</div>' if shown else ""


def _image(data: bytes, kind: str, caption: str, name: str = "") -> str:
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    saved = f' <span class="soft">figures/{_text(name)}.pdf, .svg, .png</span>' if name else ""
    image = f'<img src="{source}" alt="{_text(caption)}">'
    return f"<figure>{image}<figcaption>{_squared(caption)}{saved}</figcaption></figure>"


# ------------------------------------------------------------------------------------------------------------ runs


def _runs(content: Content) -> str:
    intro = (
        "<p>What reproduces each row: the commands as they were typed, from the project's folder, and all settings.</p>"
    )
    details = [_run(row, number) for number, row in enumerate(content.rows, 1)]
    return _section("runs", "Commands and versions", intro, *details)


def _run(row: Row, place: int) -> str:
    environment = row.environment
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
    facts = {
        "folder": row.path,
        "data": environment.data,
        "stimuli and responses": row.metrics.fingerprint if row.metrics else None,
        "training stimuli": f"{row.metrics.training_stimuli:,}"
        if row.metrics and row.metrics.training_stimuli
        else None,
        "selected on": chosen_on(row) if row.metrics else None,
        "found by": row.found_by,
        "state": row.state if row.metrics is None else None,
        "commit": environment.git_commit,
        "python": environment.python,
        "versions": versions or None,
        "hardware": row.hardware,
        "parameters": sized(row),
        "training": duration(row.seconds),
    }
    lines = "".join(
        f"<dt>{name}</dt><dd>{_text(value)}</dd>" for name, value in facts.items() if value not in (None, "-")
    )
    commands = "\n".join(row.commands) or "the run does not tell (no env.json)"
    recipe = yaml.safe_dump(row.recipe, sort_keys=False, allow_unicode=True) if row.recipe else "no recipe.yaml"
    return (
        f'<details id="run-{place}" open><summary>{_text(row.title)}'
        f'<span class="what">{_text(row.what)}</span></summary>'
        f"<pre>{_text(commands)}</pre><dl>{lines}</dl>"
        f"<details><summary>recipe.yaml</summary><pre>{_text(recipe)}</pre></details></details>"
    )
