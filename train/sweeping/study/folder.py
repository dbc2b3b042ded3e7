"""The folder of a study's replication.

RUNS/study.json                    on which data, of which size, by which split epochs are selected
RUNS/rows/NAME/  NAME.log          a row's run folder and output; a row may have a second run. NAME_SMALL is a run of
                                   reduced size, NAME_SMALL_RANDOM_WEIGHTS one without its pretrained weights
RUNS/rows.json                     how far each row is
RUNS/table.md  table.csv           the study's table with our numbers
RUNS/figure1.{png,svg,pdf}         its figure
RUNS/report/                       the report on all rows
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from data_prep.common.atomic_writes import write_json
from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import parse_json, read_regular_file
from data_prep.common.validation_messages import first_fault
from data_prep.shards.manifest import Manifest
from train.run.folder import check_writable
from train.sweeping.queue_folder import QueueFolder
from train.sweeping.study.rows import Row, Step

SelectsOn = Literal["inner", "val"]


class StudyFacts(BaseModel):
    """What all rows of a folder have in common; the content of study.json."""

    model_config = ConfigDict(extra="ignore", use_attribute_docstrings=True)

    study: str
    """Name of the queue."""
    recording: str
    """Fingerprint of the data."""
    data: str
    """Name of the recording."""
    small: bool
    """Whether rows run at reduced size."""
    selects_on: SelectsOn
    """The split that selects the epoch of what is trained."""
    random_weights: list[str]
    """Networks that begin with random weights, because theirs could not be had."""

    def has_random_weights(self, row: Row) -> bool:
        """Whether random weights stand for pretrained ones in a row."""
        return any(network in self.random_weights for network in row.networks)


@dataclass(frozen=True)
class RowState:
    """How far a row is.

    Attributes:
        state: waiting, running, done, failed or left out.
        reason: why it failed or was left out.
    """

    state: str
    reason: str = ""


class StudyFolder(QueueFolder):
    """Paths in the folder of a study."""

    def __init__(self, path: Path):
        super().__init__(path, "rows")
        self.states = path / "rows.json"
        self.table = path / "table.md"
        self.csv = path / "table.csv"
        self.report = path / "report"

    def figure(self, kind: str) -> Path:
        """The study's Figure 1 in a format: png, svg or pdf."""
        return self.path / f"figure1.{kind}"

    def run_of(self, row: Row, step: Step, facts: StudyFacts) -> Path:
        """The run folder of a row's step; its name says what of it is not as in the study."""
        small = "_SMALL" if facts.small else ""
        return self.run(f"{step.run}{small}{'_RANDOM_WEIGHTS' if facts.has_random_weights(row) else ''}")

    @property
    def is_study(self) -> bool:
        """Whether a study was begun in this folder."""
        return self.states.is_file() and self.study.is_file()

    def known(self) -> StudyFacts:
        """What was written when the study was begun.

        Raises:
            BadInput: the file is damaged.
        """
        try:
            return StudyFacts.model_validate(self.facts())
        except ValidationError as error:
            raise BadInput(f"{self.study} was not written by train/study.py ({first_fault(error)})") from None

    def check(self, manifest: Manifest, small: bool, selects_on: SelectsOn) -> None:
        """Refuse a folder that this study cannot begin or join.

        Raises:
            BadInput: it holds something else, or the study on other data, of another size or by another split.
        """
        if self.study.is_file():
            known = self.known()
            if known.recording != manifest.fingerprint:
                raise BadInput(f"{self.path} holds the study on other data ({known.data}); choose another --out")
            if known.small != small:
                now, before = ("with", "without") if small else ("without", "with")
                raise BadInput(f"{self.path} was begun {before} --small, not {now} it; choose another --out")
            if known.selects_on != selects_on:
                raise BadInput(
                    f"{self.path} was begun with --select-on {known.selects_on}, not {selects_on}; choose another --out"
                )
        elif self.path.exists() and (not self.path.is_dir() or (any(self.path.iterdir()) and not self.lock.exists())):
            raise BadInput(f"{self.path} exists and is not an empty folder; choose another --out")
        check_writable(self.path)

    def begin(
        self, name: str, manifest: Manifest, small: bool, selects_on: SelectsOn, random_weights: Sequence[str]
    ) -> None:
        """Write what all rows have in common; study.json marks the folder as complete."""
        self.write_states({})
        facts = StudyFacts(
            study=name,
            recording=manifest.fingerprint,
            data=manifest.name,
            small=small,
            selects_on=selects_on,
            random_weights=list(random_weights),
        )
        write_json(self.study, facts.model_dump())

    def write_states(self, states: Mapping[str, RowState]) -> None:
        """Write how far each row is."""
        write_json(self.states, {name: [state.state, state.reason] for name, state in states.items()})

    def read_states(self) -> dict[str, RowState]:
        """How far each row is; nothing before the study has begun.

        Raises:
            BadInput: the file is damaged.
        """
        if not self.states.exists():
            return {}
        try:
            content: Any = parse_json(read_regular_file(self.states))
            return {str(name): RowState(str(state), str(reason)) for name, (state, reason) in content.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise BadInput(
                f"{self.states} is damaged ({error}); remove it and run the study's command again, which rewrites it"
            ) from None
