"""Run every system of the study, score it, and put our numbers beside the published ones.

bash launch/study.sh --data DIR --out RUNS [--small] [-n N]
"""

from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field

from data_prep.common.command_line import parse
from data_prep.common.errors import RunFailed, run_command
from data_prep.common.option_fields import FolderLocation

EXAMPLES = (
    "--data data/it --out runs/study",
    "--data data/simulated --out runs/small --small",
    "--data data/it --out runs/study --rows resnet152_whole densenet169_whole",
)


class StudyCommand(BaseModel):
    """Run every system of the study, score it, and put our numbers beside the published ones.

    Run the same command again, on this machine or another one that shares the folder, to join the study or to go on
    where it was stopped.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    data: FolderLocation
    """Shard folder made by data_prep/pack.py, or its URL (https://, s3://, gs://, hf://, ...)."""
    out: Path
    """Folder of the study to create, continue or join."""
    small: bool = False
    """All rows at reduced size, to see that everything runs: 64 px, few stimuli, one epoch, random weights where
    pretrained ones cannot be had."""
    rows: list[str] = Field([], max_length=100)
    """Rows to run (docs/study.md lists them); all by default."""
    at_most: int | None = Field(None, ge=1, le=1000)
    """Number of rows that this worker runs at most, e.g. 1 in each of several jobs; by default all that are left."""
    select_on: Literal["inner", "val"] = "inner"
    """The split that selects the epoch of what is trained: part of train, or val, as the study did."""
    retry_failed: bool = False
    """Run rows again that have failed; of the search, its failed trials."""
    processes: Annotated[int | None, tyro.conf.arg(aliases=("-n",))] = Field(None, ge=1, le=1024)
    """Processes per command; by default one per GPU, or one without GPUs."""


def main() -> None:
    """Parse, check, run the rows, compare."""
    options = parse(StudyCommand, examples=EXAMPLES)

    from train.reporting.study_report import write_study_report, write_study_table
    from train.sweeping.queue_worker import StopRequest, print_line
    from train.sweeping.study.rows import find_rows
    from train.sweeping.study.worker import StudyOptions, open_study

    settings = StudyOptions(
        data=options.data,
        out=options.out,
        rows=find_rows(options.rows),
        small=options.small,
        selects_on=options.select_on,
        processes=options.processes,
        retries_failed=options.retry_failed,
    )
    with StopRequest() as stop:
        worker = open_study(settings, stop)
        print_line(worker.describe())
        failed = worker.work(lambda: write_study_table(worker.folder), options.at_most)
        print_line(f"\n{write_study_report(worker.folder)}")
    if failed:
        raise RunFailed(f"{', '.join(failed)} failed (see {worker.folder.states}); --retry-failed runs them again")


if __name__ == "__main__":
    run_command(main)
