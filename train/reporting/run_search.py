"""Finds what a report compares: runs, probes, ensembles, searches and studies, each named or in a folder of them."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.common.errors import BadInput
from data_prep.common.terminal import printable
from train.evaluation.ensemble_record import ENSEMBLE_FILE
from train.evaluation.metrics_file import METRICS_FILE
from train.reporting.run_reading import read_run
from train.reporting.study_table import is_study, read_study
from train.reporting.sweep_results import is_sweep, read_sweep
from train.run.folder import RunFolder

DEEPEST = 4  # levels of folders that are searched
PAGE_FILE = "report.html"


@dataclass(frozen=True)
class FoundRuns:
    """What a report compares.

    Attributes:
        folders: of runs, probes, ensembles, searches and studies.
        skipped: of the folders that were searched: those that are none of these or cannot be read, and why.
    """

    folders: list[Path]
    skipped: list[str]


def find_runs(paths: Sequence[Path], split: str) -> FoundRuns:
    """Find the runs, probes, ensembles, searches and studies among some folders and in them.

    What is named itself is not checked here; what is found in a folder is skipped if it cannot be read.

    Args:
        paths: folders of runs, or folders that hold some.
        split: whose scores are read.

    Raises:
        BadInput: a folder is none of these, and holds none.
    """
    folders: list[Path] = []
    skipped: list[str] = []
    for path in paths:
        if _is_predictor(path) or not path.is_dir():
            folders.append(path)
            continue
        found, others = _search(path, split)
        if not found:
            raise BadInput(
                f"{path} is not a run folder and holds none; give folders made by train/finetune.py, train/probe.py, "
                f"train/evaluate.py or train/sweep.py, or a folder of such{_listed(others)}"
            )
        known = {folder.resolve() for folder in (*folders, *paths)}
        folders += [folder for folder in found if folder.resolve() not in known]
        skipped += others
    return FoundRuns(folders, skipped)


def _listed(skipped: Sequence[str]) -> str:
    return f" (skipped: {'; '.join(skipped)})" if skipped else ""


def _is_predictor(path: Path) -> bool:
    """Whether a folder is that of a run, a probe, an ensemble, a search or a study, even a damaged one."""
    folder = RunFolder(path)
    is_run = folder.recipe.is_file() or (path / ENSEMBLE_FILE).is_file()
    return is_run or is_sweep(path) or is_study(path) or any(path.glob(f"eval/*/{METRICS_FILE}"))


def _search(path: Path, split: str) -> tuple[list[Path], list[str]]:
    """The predictors within a folder, in alphabetical order, and what was skipped."""
    found: list[Path] = []
    skipped: list[str] = []
    for folder in _candidates(path, DEEPEST):
        name = printable(os.path.relpath(folder, path))
        if not _is_predictor(folder):
            skipped.append(f"{name}: no run")
            continue
        try:
            if is_study(folder):
                read_study(folder)
            elif is_sweep(folder):
                read_sweep(folder)
            else:
                read_run(folder, split, name)
        except BadInput as error:
            skipped.append(f"{name}: {error}")
        else:
            found.append(folder)
    return found, skipped


def _candidates(path: Path, levels: int) -> Iterator[Path]:
    """The predictors within a folder, and the folders in which there is none.

    Hidden folders, links and reports are passed over.
    """
    is_report = (path / PAGE_FILE).is_file()
    try:
        folders = sorted(path.iterdir())
    except OSError:  # it may not be read
        return
    for folder in folders:
        if folder.is_symlink() or not folder.is_dir() or folder.name.startswith("."):
            continue
        if is_report and folder.name == "figures":
            continue
        if _is_predictor(folder) or not levels:
            yield folder
            continue
        inner = list(_candidates(folder, levels - 1))
        if any(map(_is_predictor, inner)):
            yield from inner
        elif not (folder / PAGE_FILE).is_file():
            yield folder
