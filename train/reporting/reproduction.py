"""What it takes to make a predictor again: the commands of a run, and of an ensemble those of its members first."""

import shlex
from collections.abc import Iterator
from pathlib import Path

from data_prep.common.errors import BadInput
from data_prep.common.terminal import printable
from train.evaluation.ensemble_record import ENSEMBLE_FILE, EnsembleRecord, member_folder, read_record
from train.reporting.run_files import Environment, read_environment
from train.run.folder import RunFolder, is_probe

DEEPEST = 20  # levels of ensembles of ensembles


def commands_of(path: Path, split: str) -> list[str]:
    """The commands that make a predictor and score it; empty where they are not known.

    Args:
        path: of a run, a probe or an ensemble.
        split: that is scored.
    """
    if (path / ENSEMBLE_FILE).is_file():
        return list(dict.fromkeys(_of_ensemble(path, split, DEEPEST)))
    environment = read_environment(RunFolder(path).env)
    if not environment.command:
        return []
    if is_probe(RunFolder(path)) and _split_of(environment.command) == split:
        return [_launched(environment)]
    scoring = shlex.join(["launch/local.sh", "train/evaluate.py", str(path), "--split", split])
    return [_launched(environment), scoring]


def _of_run(path: Path) -> Iterator[str]:
    """The command that trained a run or a probe, if it is on record."""
    environment = read_environment(RunFolder(path).env)
    if environment.command:
        yield _launched(environment)


def _of_ensemble(path: Path, split: str, levels: int) -> Iterator[str]:
    """The commands of all members, then that of the ensemble, which also scores those members that need it."""
    record = read_record(path)
    runs = [run for member in record.members for run in member]
    for run in runs:
        yield from _of_member(path, record, run, split, levels - 1)
    environment = read_environment(RunFolder(path).env)
    if environment.command and _split_of(environment.command) == split:
        yield _launched(environment)
        return
    words = ["train/evaluate.py", *runs, "--combine", record.combine, "--split", split, "--out", str(path)]
    yield printable(shlex.join(["launch/local.sh", *words]))


def _of_member(ensemble: Path, record: EnsembleRecord, run: str, split: str, levels: int) -> Iterator[str]:
    try:
        path = member_folder(ensemble, record, run)
        if levels and (path / ENSEMBLE_FILE).is_file():
            yield from _of_ensemble(path, split, levels)
            return
        commands = list(_of_run(path))
    except BadInput:
        commands = []
    yield from commands or [printable(f"# {run}: how this member was made is not known here")]


def _launched(environment: Environment) -> str:
    script, *arguments = environment.command
    return f"launch/local.sh -n {environment.world_size} {shlex.join([f'train/{script}', *arguments])}"


def _split_of(command: list[str]) -> str:
    """The split that a command of train/evaluate.py or train/probe.py scored."""
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word == "--split":
            return following
        if word.startswith("--split="):
            return word.partition("=")[2]
    return "val"
