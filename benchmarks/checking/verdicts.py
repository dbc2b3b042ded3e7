"""What a stage of the check finds: one line each, with what to do where it is not well."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OK, SLOW, FAILED, SKIPPED = "ok", "slow", "failed", "skipped"
FILE = "verdicts.jsonl"
RECIPE_FILE = "recipe.json"  # the words after --recipe
ENDED = "ended"  # this file tells when the last stage of the first process was done, likewise
BEGAN = "CHECK_STAGE_BEGAN"  # the variable that tells when a stage's process was started, in seconds since 1970
WIDTH = 22  # of the subjects, the longest of which is a stage that failed


@dataclass(frozen=True)
class Verdict:
    """One line of the check.

    Attributes:
        subject: what was checked.
        outcome: one of the constants above.
        finding: in words.
        advice: what to do; empty if all is well.
        values: what was measured, by name, for `train/plan.py` and for comparisons.
    """

    subject: str
    outcome: str
    finding: str
    advice: str = ""
    values: dict[str, Any] = field(default_factory=dict)

    def append_to(self, folder: Path) -> None:
        """Add it to the file of verdicts in a folder."""
        with (folder / FILE).open("a") as file:
            file.write(f"{json.dumps(asdict(self))}\n")


def read_verdicts(folder: Path) -> list[Verdict]:
    """The verdicts in a folder so far."""
    path = folder / FILE
    lines = path.read_text().splitlines() if path.exists() else []
    return [Verdict(**json.loads(line)) for line in lines]


def listing(verdicts: Sequence[Verdict]) -> str:
    """A line for each verdict, and below it what to do."""
    lines = []
    for verdict in verdicts:
        lines.append(f"{verdict.outcome:<8}{verdict.subject:<{WIDTH}}{verdict.finding}")
        if verdict.advice:
            lines.append(f"{'':<8}{'':<{WIDTH}}-> {verdict.advice}")
    return "\n".join(lines)
