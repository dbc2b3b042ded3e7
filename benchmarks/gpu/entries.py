"""What a part of the GPU check consists of, and what its entries are told."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpu.forms import Form
from gpu.results import Finding, OutOfTime

SMALL_RECORDING, MANY_JPEGS = "small recording", "JPEGs"  # the entries that pack what others train on


@dataclass(frozen=True)
class Place:
    """Where an entry runs.

    Attributes:
        form: device and sizes.
        folder: for its files; entries find there what earlier ones have left.
    """

    form: Form
    folder: Path

    @property
    def recording(self) -> Path:
        """A small simulated recording with classes and trials.

        Raises:
            OutOfTime: there was no time to pack it; likewise `jpegs`.
        """
        self._check_in_time(SMALL_RECORDING)
        return self.folder / "recording"

    @property
    def jpegs(self) -> Path:
        """Many JPEGs with random responses."""
        self._check_in_time(MANY_JPEGS)
        return self.folder / "jpegs"

    def mark_out_of_time(self, entry: str) -> None:
        """Remember that there was no time for an entry, for those that need what it leaves."""
        self._mark(entry).parent.mkdir(exist_ok=True)
        self._mark(entry).touch()

    def _mark(self, entry: str) -> Path:
        return self.folder / "out of time" / entry.replace("/", "_")

    def _check_in_time(self, entry: str) -> None:
        if self._mark(entry).exists():
            raise OutOfTime(f"there was no time for {entry!r}, which this needs")

    def leave(self, name: str, value: Any) -> None:
        """Leave a value for later entries."""
        partial = self.folder / f"{name}.partial"
        partial.write_text(json.dumps(value))
        partial.rename(self.folder / f"{name}.json")

    def find(self, name: str) -> Any:
        """A value that the earlier entry of this name has left.

        Raises:
            OutOfTime: there was no time for that entry.
            LookupError: it has left none.
        """
        self._check_in_time(name)
        path = self.folder / f"{name}.json"
        if not path.exists():
            raise LookupError(f"{name!r} is missing: the entry that leaves it failed or did not run")
        return json.loads(path.read_text())


@dataclass(frozen=True)
class Entry:
    """One thing to find out, in a process of its own.

    Attributes:
        name: in tables.
        seconds: after which it is given up, if its part has as many left.
        work: finds it out; raises `Skipped` where it cannot, and any other error if it fails.
        needed: whether others use what it leaves.
    """

    name: str
    seconds: float
    work: Callable[[Place], Finding]
    needed: bool = False


@dataclass(frozen=True)
class Part:
    """Entries that belong together.

    Attributes:
        name: on the command line.
        stages: entries of one stage may run at the same time, those of the next when all of them are done.
        together: how many of a stage run at the same time at most.
        made_by: MODULE:FUNCTION that makes the part again in an entry's process; by default gpu.NAME:part.
    """

    name: str
    stages: list[list[Entry]]
    together: int = 1
    made_by: str = ""

    @property
    def entries(self) -> list[Entry]:
        """All of them, in order."""
        return [entry for stage in self.stages for entry in stage]

    def entry(self, name: str) -> Entry:
        """An entry by its name."""
        return next(entry for entry in self.entries if entry.name == name)

    def only(self, words: Sequence[str]) -> "Part":
        """The entries whose names contain one of the words, and those that others need."""
        stages = [[e for e in stage if e.needed or any(word in e.name for word in words)] for stage in self.stages]
        only_needed = all(entry.needed for stage in stages for entry in stage)
        return replace(self, stages=[] if only_needed and not all(entry.needed for entry in self.entries) else stages)
