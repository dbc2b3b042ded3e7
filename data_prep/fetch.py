"""Download a public recording.

    python data_prep/fetch.py {majaj2015,freemanziemba2013,tvsd,it-course} --out DIR

What came of a broken download stays, and the next call goes on from there.
"""

import shlex
from functools import partial
from pathlib import Path

import tyro
from pydantic import BaseModel, ConfigDict, Field

from data_prep.common.command_line import parse
from data_prep.common.errors import run_command
from data_prep.remote.datasets import DATASETS, Dataset, DatasetName
from data_prep.remote.public_files import PublicFiles

EXAMPLES = (
    "majaj2015 --out downloads/majaj2015",
    "tvsd --out downloads/tvsd --retries 20",
)


class Fetch(BaseModel):
    """Download a public recording."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    dataset: tyro.conf.Positional[DatasetName]
    """Which one."""
    out: Path
    """Folder for the files; what is there already is not downloaded again."""
    mirror: str | None = None
    """Address of a folder (http or https) that has the same files under the same names, e.g. of your institute."""
    retries: int = Field(5, ge=0, le=1000)
    """How many times in a row a file may fail to come on before it is given up."""
    timeout: float = Field(60.0, gt=0, le=86_400)
    """Seconds of silence after which a connection is given up and tried again."""


def _introduce(dataset: Dataset) -> None:
    print(f"{dataset.title}\n  cite:    {dataset.citation}\n  licence: {dataset.licence}", flush=True)
    if dataset.note:
        print(f"  note:    {dataset.note}", flush=True)


def main() -> None:
    """Parse the command line, download, and say how to go on."""
    options = parse(Fetch, examples=EXAMPLES)
    dataset = DATASETS[options.dataset]
    files = PublicFiles(options.mirror, options.retries, options.timeout, report=partial(print, flush=True))
    _introduce(dataset)
    for file in dataset.files:
        files.fetch(file, options.out)
    print("go on with:")
    for name, words in dataset.pack.items():
        print(f"  python data_prep/pack.py {words.format(folder=shlex.quote(str(options.out)))} --out data/{name}")


if __name__ == "__main__":
    run_command(main)
