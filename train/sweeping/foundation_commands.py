"""The commands of train/ that a foundation consists of, each in a folder of its own, done once."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data_prep.common import locks
from data_prep.common.errors import BadInput, RunFailed
from train.evaluation.metrics_file import METRICS_FILE
from train.models.population import POPULATION_FILE
from train.probing.population_making import make_population
from train.run.folder import RunFolder
from train.sweeping.queue_worker import LONGEST_HEARTBEAT, StopRequest, print_line
from train.sweeping.supervised_process import Heartbeat, hold_lock
from train.sweeping.trial import Launcher, resuming

BEAT_FILE = "foundation.beat"


class FoundationCommands:
    """Runs commands whose results are not there yet, each of which ends when this process ends.

    Args:
        split: that is scored.
        licence: of the recordings, for the cards of populations.
        processes: per command; by default one per GPU, or one.
        stop: whether this process was asked to end.
    """

    def __init__(self, split: str, licence: str | None, processes: int | None, stop: StopRequest):
        self._split, self._licence, self._launcher, self._stop = split, licence, Launcher(processes), stop

    @contextmanager
    def alone_in(self, out: Path) -> Iterator[None]:
        """Keep others out of the folder of a foundation, in which commands can be run meanwhile; waits for them."""
        beat = out / BEAT_FILE
        beat.touch()
        if locks.is_locked(beat):
            print_line(f"another command works on {out}; waiting for it")
        with hold_lock(beat, self._stop.check) as self._lock:
            self._heartbeat = Heartbeat(beat, "", LONGEST_HEARTBEAT)
            yield

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
        self._run("probe.py", folder, *words, *resuming(RunFolder(folder)))
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
        launched = self._launcher.local_command(command, *words, "--out", folder, "--split", self._split)
        ended = self._launcher.run(launched, self._heartbeat, self._lock, log, self._stop.check)
        if ended.kind == "bad input":
            raise BadInput(ended.reason)
        if ended.kind != "done":
            raise RunFailed(f"{command} for {folder} ended: {ended.reason}; run the same command again to go on")
