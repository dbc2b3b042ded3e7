"""Compare runs, probes and searches: a page for the browser, tables and figures for a paper.

python train/report.py RUN [RUN ...] --out DIR [--split val] [--pair RUN RUN] [--data DIR ...]
"""

from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field

from data_prep.common.command_line import parse
from data_prep.common.errors import run_command
from data_prep.common.option_fields import FolderLocation

MOST_FOLDERS = 64  # of shards

EXAMPLES = (
    "runs --out report",
    "runs/a runs/b probes/c --out report",
    "runs/a runs/b --out report --split test --pair runs/a runs/b",
)


class Report(BaseModel):
    """Compare runs, probes and searches: a page for the browser, tables and figures for a paper."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    runs: Annotated[list[Path], tyro.conf.Positional] = Field(min_length=1)
    """Folders made by train/finetune.py, train/probe.py, train/evaluate.py, train/sweep.py and train/study.py, or a
    folder that holds some; a search stands for its best trial."""
    out: Path
    """Folder for report.html, table.md, table.csv, power.json and figures/."""
    split: Literal["train", "val", "test", "cv"] = "val"
    """The split whose scores are compared."""
    pair: tuple[Path, Path] | None = None
    """Two of the runs, to be compared site by site; by default the two best."""
    data: Annotated[list[FolderLocation], Field(min_length=1, max_length=MOST_FOLDERS)] | None = None
    """Shard folders or their URLs, whose single trials tell what other numbers of repetitions would show; by default
    those on this machine that the runs were made from."""


def main() -> None:
    """Parse, read, compare, draw, write."""
    options = parse(Report, examples=EXAMPLES)

    from train.reporting.report_files import write_report

    write_report(options.runs, options.out, options.split, options.pair, options.data)


if __name__ == "__main__":
    run_command(main)
