"""The outcome of each entry of the GPU check, kept in a file of JSON lines that is complete at every moment."""

import json
import os
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PASSED, FAILED, MEASURED, SKIPPED, OUT_OF_TIME = "passed", "failed", "measured", "skipped", "out of time"


class Skipped(Exception):
    """This entry cannot run here. The message says why."""


class OutOfTime(Exception):
    """There was no time for what this entry needs. The message names it."""


@dataclass(frozen=True)
class Finding:
    """What an entry has found.

    Attributes:
        values: measurements and facts by name; numbers, texts, or lists of numbers.
        required: what must hold, in words; empty if the entry only measures.
        faults: in what way it does not hold.
    """

    values: dict[str, Any]
    required: str = ""
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """A line of the file.

    Attributes:
        part, entry: what was run.
        outcome: one of the constants above.
        message: what went wrong, or why it did not run.
        required, values: see `Finding`.
        seconds: that it took.
    """

    part: str
    entry: str
    outcome: str
    message: str = ""
    required: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @classmethod
    def of(cls, part: str, entry: str, finding: Finding, seconds: float) -> "Result":
        """The result of an entry that ran to its end."""
        outcome = FAILED if finding.faults else PASSED if finding.required else MEASURED
        return cls(part, entry, outcome, "; ".join(finding.faults), finding.required, finding.values, round(seconds, 2))


class ResultsFile:
    """Appends results to a file, each as soon as it is there, and prints them.

    Args:
        path: of the file; an existing one is replaced.
    """

    def __init__(self, path: Path):
        self.path, self.results = path, list[Result]()
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    def add(self, result: Result) -> None:
        """Append a result; it is on the disk when this returns."""
        with self._lock:
            self.results.append(result)
            with self.path.open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")
                file.flush()
                os.fsync(file.fileno())
            words = f": {result.message}" if result.message else ""
            print(f"{result.outcome:<11} {result.part}: {result.entry} ({result.seconds:.1f} s){words}", flush=True)

    @property
    def failed(self) -> bool:
        """Whether an entry failed."""
        return any(result.outcome == FAILED for result in self.results)


def read_results(path: Path) -> list[Result]:
    """The results in a file, also of a check that was killed while it wrote a line."""
    results = []
    for line in path.read_text().splitlines():
        try:
            results.append(Result(**json.loads(line)))
        except (ValueError, TypeError):  # the last line, cut off
            continue
    return results
