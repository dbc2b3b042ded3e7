"""Write the results of a study: its table after every row, and the report when a worker ends."""

from data_prep.common import locks
from data_prep.common.atomic_writes import write_bytes
from train.reporting.report_files import write_report
from train.reporting.study_table import CSV_FIELDS, PUBLISHED_FIELDS, SPLIT, StudyResults, read_study
from train.reporting.table import escape_markdown, in_csv, in_markdown, in_terminal
from train.sweeping.study.folder import StudyFolder


def write_study_table(folder: StudyFolder) -> StudyResults:
    """Write table.md and table.csv from what has been scored so far."""
    with locks.exclusive(folder.results_lock):
        results = read_study(folder.path)
        parts = [f"### {escape_markdown(table.title)}\n\n{in_markdown(table)}" for table in results.tables]
        write_bytes(folder.table, ("\n\n".join(parts) + "\n").encode())
        fields = (*CSV_FIELDS, *PUBLISHED_FIELDS) if results.is_comparable else CSV_FIELDS
        write_bytes(folder.csv, in_csv(results.tables, fields).encode())
    return results


def write_study_report(folder: StudyFolder) -> str:
    """Write the tables, and the report on all rows in which they and the figure are shown.

    Returns:
        The tables, for a terminal.
    """
    results = write_study_table(folder)
    with locks.exclusive(folder.results_lock):
        for kind, data in (results.figure.files if results.figure is not None else {}).items():
            write_bytes(folder.figure(kind), data)
        write_report([folder.path], folder.report, SPLIT, None)
    parts = ["\n".join([in_terminal(table), *table.notes]) for table in results.tables]
    figure = "" if results.figure is None else "figure1.pdf, "
    return "\n\n".join([*parts, f"written to {folder.path}: table.md, table.csv, {figure}report/report.html"])
