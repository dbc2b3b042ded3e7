"""The page of a report: one HTML file that needs no network and runs no script but its own.

The template escapes every text. Should one slip through all the same, the page's content security policy runs only the
script whose hash it names, and loads nothing; figures are images, in which browsers run no scripts.
"""

import base64
import hashlib
import re
from dataclasses import asdict
from importlib.resources import files

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from train.evaluation.seen_stimuli import mark_of
from train.reporting import published
from train.reporting.glossary import glossary, meaning_of
from train.reporting.number_formats import duration
from train.reporting.report_contents import ReportContents
from train.reporting.report_tables import published_table, selected_on, size_cell, sweep_table
from train.reporting.reported_run import ReportedRun


def render_page(report: ReportContents, made: str) -> str:
    """The whole page.

    Args:
        report: what it shows.
        made: when and by what.
    """
    script = files("train.reporting").joinpath("page.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=PackageLoader("train.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"squared": squared, "base64": base64_text, "yaml": settings_text, "facts": run_facts}
    environment.filters["meaning"] = meaning_of
    recordings = dict.fromkeys(section.group.recording for section in report.sections)
    return environment.get_template("page.html").render(
        report=report,
        title=f"Encoding models of {', '.join(recordings)}" if recordings else "Encoding models",
        made=made,
        glossary=glossary(report.tables),
        published=published_table(),
        source=published.SOURCE,
        sweep_tables=[sweep_table(sweep) for sweep in report.sweeps],
        script=script,
        script_hash=base64_text(hashlib.sha256(script.encode()).digest()),
    )


def squared(text: str) -> str:
    """R2 as R²."""
    return re.sub(r"\bR2\b", "R²", text)


def base64_text(data: bytes) -> str:
    """Bytes for a data: address."""
    return base64.b64encode(data).decode()


def settings_text(run: ReportedRun) -> str:
    """A run's recipe as it stands in its file; of an ensemble its members and how they are combined."""
    if run.ensemble is not None:
        return yaml.safe_dump(asdict(run.ensemble), sort_keys=False, allow_unicode=True)
    return yaml.safe_dump(run.settings, sort_keys=False, allow_unicode=True) if run.settings else "no recipe.yaml"


def run_facts(run: ReportedRun) -> dict[str, str]:
    """What it takes to reproduce a run besides commands and settings, as far as it is known."""
    environment, metrics = run.environment, run.metrics
    stimuli = metrics.training_stimuli if metrics else None
    facts = {
        "folder": str(run.path),
        "data": environment.data,
        "fingerprint of the data": metrics.fingerprint if metrics else None,
        "training stimuli": f"{stimuli:,}" if stimuli else None,
        "selected on": selected_on(metrics) if metrics else None,
        "seen before": mark_of(metrics.seen) if metrics else None,
        "found by": run.found_by,
        "progress": run.progress if metrics is None else None,
        "commit": environment.git_commit,
        "python": environment.python,
        "versions": ", ".join(f"{name} {version}" for name, version in environment.versions.items()),
        "hardware": run.hardware,
        "parameters": size_cell(run).in_one_line,
        "training": duration(run.seconds),
    }
    return {name: fact for name, fact in facts.items() if fact and fact != "-"}
