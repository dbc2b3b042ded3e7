"""Write a report: its page, tables and figures."""

import datetime
from collections.abc import Sequence
from pathlib import Path

from data_prep.common.atomic_writes import write_bytes, write_json
from train.reporting.page import render_page
from train.reporting.report_contents import compare
from train.run.environment import environment
from train.run.folder import check_writable


def write_report(
    folders: Sequence[Path],
    out: Path,
    split: str,
    pair: tuple[Path, Path] | None,
    data: Sequence[str] | None = None,
) -> None:
    """Compare runs, write the report, and print a summary.

    Args:
        folders: of runs, probes, ensembles and searches.
        out: folder for the report.
        split: whose scores are compared.
        pair: two of the folders, to be compared site by site; by default the two best.
        data: shard folders with the trials of what was scored; by default those that the runs were made from.

    Raises:
        BadInput: a folder cannot be read, or the pair is not among them.
    """
    check_writable(out)
    report = compare(folders, split, pair, data)
    for figure in report.figures:
        for kind, content in figure.files.items():
            write_bytes(out / "figures" / f"{figure.name}.{kind}", content)
    write_bytes(out / "table.md", f"{report.markdown()}\n".encode())
    write_bytes(out / "table.csv", report.csv().encode())
    write_json(out / "power.json", report.power.content)
    write_bytes(out / "report.html", render_page(report, _made()).encode())
    print(report.summary())
    print(f"\nwritten to {out}: report.html, table.md, table.csv, power.json, figures/ ({len(report.figures)})")


def _made() -> str:
    commit = environment()["git_commit"]
    made = f"Made {datetime.date.today():%Y-%m-%d} by train/report.py"
    return f"{made}, commit {commit}." if commit else f"{made}."
