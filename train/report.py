"""Compare runs, probes and searches: a page for the browser, tables and figures for a paper.

python train/report.py RUN [RUN ...] --out DIR [--split val] [--pair RUN RUN]
"""

import datetime
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field

from data_prep.common.atomic_writes import write_bytes
from data_prep.common.command_line import parse
from data_prep.common.errors import BadInput, run_command
from train.reporting.figures import figures
from train.reporting.page import Content, page
from train.reporting.rows import Row, read_rows, shortest_names
from train.reporting.sweep_results import SweepResults, is_sweep, read_sweep
from train.reporting.tables import as_csv, groups_of, in_terminal, markdown
from train.run.folder import check_writable, environment


class Report(BaseModel):
    """Compare runs, probes and searches: a page for the browser, tables and figures for a paper."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    runs: Annotated[list[Path], tyro.conf.Positional] = Field(min_length=1)
    """Folders of train/finetune.py, train/probe.py and train/sweep.py; of a search its best trial is compared."""
    out: Path
    """Folder for report.html, table.md, table.csv and figures/."""
    split: Literal["train", "val", "test", "cv"] = "val"
    """The split whose scores are compared."""
    pair: tuple[Path, Path] | None = None
    """Two of the runs, to be compared site by site; by default the two best."""


def collect(options: Report) -> tuple[list[Row], list[SweepResults]]:
    """Read everything that is compared.

    Raises:
        BadInput: a folder holds no run, or is named twice.
    """
    sweeps = {run: read_sweep(run) for run in options.runs if is_sweep(run)}
    pairs = [(sweeps[run].best if run in sweeps else run, run) for run in options.runs]
    runs = {run: given for run, given in pairs if run is not None}
    if len({run.resolve() for run in runs}) < sum(run is not None for run, _ in pairs):
        raise BadInput("a run is named twice; name each once")
    if not runs:
        return [], list(sweeps.values())
    names = shortest_names(list(runs.values()))
    rows = []
    for (run, given), name in zip(runs.items(), names, strict=True):
        found_by = name if given in sweeps else None
        rows += read_rows(run, options.split, name if found_by is None else f"{name}: best", found_by)
    return rows, list(sweeps.values())


def chosen_pair(options: Report, rows: Sequence[Row]) -> tuple[Path, Path] | None:
    """The runs that --pair names, as the rows name them.

    Raises:
        BadInput: one is not among the runs, or has no scores of sites.
    """
    if options.pair is None:
        return None
    found = []
    for path in options.pair:
        row = next((row for row in rows if row.path.resolve() == path.resolve() and row.regression), None)
        if row is None:
            raise BadInput(f"--pair: {path} is not one of the runs with scores of sites; name two of them")
        found.append(row.path)
    return found[0], found[1]


def main() -> None:
    """Parse, read, compare, draw, write."""
    options = parse(Report, args=sys.argv[1:])
    check_writable(options.out)
    rows, sweeps = collect(options)
    groups, classifiers = groups_of(rows), [row for row in rows if row.classification]
    drawn = list(figures(groups, rows, chosen_pair(options, rows)))
    commit = environment()["git_commit"]
    made = f"Made {datetime.date.today():%Y-%m-%d} by train/report.py{f', commit {commit}' if commit else ''}."
    content = Content(options.split, rows, groups, drawn, sweeps, made)
    for _, image in drawn:
        for kind, data in image.files.items():
            write_bytes(options.out / "figures" / f"{image.name}.{kind}", data)
    write_bytes(options.out / "table.md", (markdown(groups, classifiers) + "\n").encode())
    write_bytes(options.out / "table.csv", as_csv(groups, classifiers).encode())
    write_bytes(options.out / "report.html", page(content).encode())
    print(in_terminal(groups, classifiers, content.unscored))
    print(f"\nwritten to {options.out}: report.html, table.md, table.csv, figures/ ({len(drawn)})")


if __name__ == "__main__":
    run_command(main)
