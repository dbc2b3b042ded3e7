"""Download a public recording.

    python data_prep/fetch.py {cowley2023,majaj2015,freemanziemba2013,tvsd,it-course} --out DIR

An interrupted download resumes where it stopped when the command is run again.
"""

import shlex
from functools import partial
from pathlib import Path

import tyro
from pydantic import BaseModel, ConfigDict, Field

from data_prep.common.command_line import parse
from data_prep.common.errors import run_command
from data_prep.remote.datasets import DATASETS, Dataset, DatasetName

EXAMPLES = (
    "cowley2023 --out downloads/cowley2023",
    "tvsd --out downloads/tvsd --retries 20",
)


class Fetch(BaseModel):
    """Download a public recording."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    dataset: tyro.conf.Positional[DatasetName]
    """The recording."""
    out: Path
    """Folder for the files; files that exist are not downloaded again."""
    mirror: str | None = None
    """URL (http or https) of a folder with the same files under the same names, such as your institute's mirror."""
    retries: int = Field(5, ge=0, le=1000)
    """Retries per file in a row without progress."""
    timeout: float = Field(60.0, gt=0, le=86_400)
    """Seconds without data after which a connection is reopened."""


def _describe(dataset: Dataset) -> str:
    lines = [dataset.title, f"  cite:    {dataset.citation}", f"  licence: {dataset.licence}"]
    if dataset.note:
        lines.append(f"  note:    {dataset.note}")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, download, and print the commands that pack the recording."""
    options = parse(Fetch, examples=EXAMPLES)
    from data_prep.remote.public_files import PublicFiles

    dataset = DATASETS[options.dataset]
    report = partial(print, flush=True)
    files = PublicFiles(options.mirror, options.retries, options.timeout, report=report)
    report(_describe(dataset))
    for file in dataset.files:
        files.fetch(file, options.out)
    print("pack it with:")
    for name, words in dataset.pack.items():
        print(f"  python data_prep/pack.py {words.format(folder=shlex.quote(str(options.out)))} --out data/{name}")


if __name__ == "__main__":
    run_command(main)
