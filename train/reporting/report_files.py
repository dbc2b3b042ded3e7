"""Read the runs that a report compares, and write its page, tables and figures."""

import datetime
from collections.abc import Sequence
from pathlib import Path

from data_prep.common.atomic_writes import write_bytes
from data_prep.common.errors import BadInput
from train.reporting.figures import figures
from train.reporting.page import Content, page
from train.reporting.rows import Row, read_rows, shortest_names
from train.reporting.sweep_results import SweepResults, is_sweep, read_sweep
from train.reporting.tables import as_csv, groups_of, in_terminal, markdown
from train.run.environment import environment
from train.run.folder import check_writable


def write_report(folders: Sequence[Path], out: Path, split: str, pair: tuple[Path, Path] | None) -> None:
    """Read, compare, draw, write, and print the table.

    Args:
        folders: of runs, probes, ensembles and searches.
        out: folder for the report.
        split: whose scores are compared.
        pair: two of the folders, to be compared site by site; by default the two best.

    Raises:
        BadInput: a folder cannot be read, or the pair is not among them.
    """
    check_writable(out)
    rows, sweeps = collect(folders, split)
    groups, classifiers = groups_of(rows), [row for row in rows if row.classification]
    drawn = list(figures(groups, rows, chosen_pair(pair, rows)))
    commit = environment()["git_commit"]
    made = f"Made {datetime.date.today():%Y-%m-%d} by train/report.py{f', commit {commit}' if commit else ''}."
    content = Content(split, rows, groups, drawn, sweeps, made)
    for _, image in drawn:
        for kind, data in image.files.items():
            write_bytes(out / "figures" / f"{image.name}.{kind}", data)
    write_bytes(out / "table.md", (markdown(groups, classifiers) + "\n").encode())
    write_bytes(out / "table.csv", as_csv(groups, classifiers).encode())
    write_bytes(out / "report.html", page(content).encode())
    print(in_terminal(groups, classifiers, content.unscored))
    print(f"\nwritten to {out}: report.html, table.md, table.csv, figures/ ({len(drawn)})")


def collect(folders: Sequence[Path], split: str) -> tuple[list[Row], list[SweepResults]]:
    """Read everything that is compared.

    Raises:
        BadInput: a folder holds no run, or is named twice.
    """
    sweeps = {run: read_sweep(run) for run in folders if is_sweep(run)}
    pairs = [(sweeps[run].best if run in sweeps else run, run) for run in folders]
    runs = {run: given for run, given in pairs if run is not None}
    if len({run.resolve() for run in runs}) < sum(run is not None for run, _ in pairs):
        raise BadInput("a run is named twice; name each once")
    if not runs:
        return [], list(sweeps.values())
    names = shortest_names(list(runs.values()))
    rows = []
    for (run, given), name in zip(runs.items(), names, strict=True):
        found_by = name if given in sweeps else None
        rows += read_rows(run, split, name if found_by is None else f"{name}: best", found_by)
    return rows, list(sweeps.values())


def chosen_pair(pair: tuple[Path, Path] | None, rows: Sequence[Row]) -> tuple[Path, Path] | None:
    """The runs that --pair names, as the rows name them.

    Raises:
        BadInput: one is not among the runs, or has no scores of sites.
    """
    if pair is None:
        return None
    found = []
    for path in pair:
        row = next((row for row in rows if row.path.resolve() == path.resolve() and row.regression), None)
        if row is None:
            raise BadInput(f"--pair: {path} is not one of the runs with scores of sites; name two of them")
        found.append(row.path)
    return found[0], found[1]
