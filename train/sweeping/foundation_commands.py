"""The commands of train/ that a foundation consists of, each in a folder of its own, done once."""

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_prep.common.errors import BadInput, RunFailed
from data_prep.common.safe_reading import read_regular_file
from train.evaluation.predictions_file import METRICS_FILE
from train.models.population import POPULATION_FILE
from train.probing.population_making import make_population
from train.run.folder import RunFolder
from train.sweeping.queue_worker import print_line
from train.sweeping.study.worker import LAUNCHER
from train.sweeping.trial import COMMANDS, Launcher, outcome


class FoundationCommands:
    """Runs commands whose results are not there yet.

    Args:
        split: that is scored.
        licence: of the recordings, for the cards of populations.
        processes: per command; by default one per GPU, or one.
    """

    def __init__(self, split: str, licence: str | None, processes: int | None):
        self._split, self._licence, self._launcher = split, licence, Launcher(processes)

    def metrics_of(self, folder: Path) -> Path:
        """The scores in the folder of a probe or a stack."""
        return RunFolder(folder).evaluation(self._split) / METRICS_FILE

    def probe(self, folder: Path, *words: object) -> Path:
        """Make a probe; go on with one that was begun.

        Returns:
            Its folder.

        Raises:
            BadInput, RunFailed: it ended with an error.
        """
        if self.metrics_of(folder).is_file():
            return folder
        resume = ["--resume"] if RunFolder(folder).recipe.is_file() else []
        if not resume:  # an attempt was killed before the probe had claimed its folder
            shutil.rmtree(folder, ignore_errors=True)
        self._run("probe.py", folder, *words, *resume)
        return folder

    def stack(self, folder: Path, members: Sequence[Path]) -> Path:
        """Stack probes of one recording; returns the stack's folder.

        Raises:
            BadInput, RunFailed: it ended with an error.
        """
        if not self.metrics_of(folder).is_file():
            shutil.rmtree(folder, ignore_errors=True)
            self._run("evaluate.py", folder, *members, "--combine", "stack")
        return folder

    def population(self, folder: Path, probes: Sequence[Path]) -> Path:
        """Make the population of probes; returns its folder."""
        if not (folder / POPULATION_FILE).is_file():
            facts = make_population(probes, folder, self._licence)
            print_line(f"population of {facts.sites:,} sites -> {folder}")
        return folder

    def _run(self, command: str, folder: Path, *words: object) -> None:
        """Run a command; what it prints is added to FOLDER.log."""
        log = folder.with_name(f"{folder.name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        print_line(f"{command} -> {log}")
        processes = self._launcher.processes
        launch: list[object] = [LAUNCHER, "local", "-n", processes] if processes > 1 else []
        options = ["--out", folder, "--split", self._split]
        started = [sys.executable, *map(str, [*launch, COMMANDS / command, *words, *options])]
        start = log.stat().st_size if log.exists() else 0
        code = run_logged(started, log, self._launcher.environment())
        printed = read_regular_file(log)[start:].decode(errors="replace")
        ended = outcome(code, printed, log)
        if ended.kind == "bad input":
            raise BadInput(ended.reason)
        if ended.kind != "done":
            raise RunFailed(f"{command} for {folder} ended: {ended.reason}; run the same command again to go on")


def run_logged(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
    """Run a command whose output is added to a file; returns its exit code."""
    with log.open("ab") as file:
        return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
