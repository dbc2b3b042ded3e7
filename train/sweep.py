"""Search over recipes: a grid, or points that TPE samples; every trial is an `accelerate launch` of train/finetune.py.

python train/sweep.py SWEEP.yaml --data DIR --out SWEEP_DIR [--processes N]

Run the same command again, on this machine or another one, to join the search.
"""

from pathlib import Path

import tyro
from pydantic import BaseModel, ConfigDict, Field

from data_prep.common.command_line import parse
from data_prep.common.errors import run_command
from data_prep.common.markdown import tables_as_columns
from data_prep.common.option_fields import FolderLocation

EXAMPLES = (
    "train/recipes/sweeps/SWEEP.yaml --data data/it --out sweeps/a",
    "train/recipes/sweeps/SWEEP.yaml --data data/it --out sweeps/a --processes 2",
)


class SweepCommand(BaseModel):
    """Search over recipes: a grid, or points that TPE samples.

    Run the same command again, on this machine or another one that shares the folder, to join the search.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    sweep: tyro.conf.Positional[Path]
    """File that defines the search (SWEEP.yaml), see docs/sweeps.md."""
    data: FolderLocation
    """Shard folder made by data_prep/pack.py, or its URL (https://, s3://, gs://, hf://, ...)."""
    out: Path
    """Folder of the search to create or join."""
    processes: int | None = Field(None, ge=1, le=1024)
    """Processes per trial; by default one per GPU, or one without GPUs."""
    retry_failed: bool = False
    """Run trials again that have failed, from their last completed epoch."""


def main() -> None:
    """Parse, check, search, score the best, print the results."""
    options = parse(SweepCommand, examples=EXAMPLES)

    from train.sweeping.queue_worker import StopRequest, print_line
    from train.sweeping.worker import open_worker

    with StopRequest() as stop:
        worker = open_worker(options.sweep, options.data, options.out, options.processes, stop, options.retry_failed)
        print_line(
            f"{len(worker.plan.runs)} trials over {', '.join(worker.plan.keys)}; {worker.launcher.describe()} each"
        )
        worker.work()
        worker.score_best(worker.publish())
    results = tables_as_columns(worker.folder.table.read_text(encoding="utf-8"))
    print_line(f"\n{results}\n\nbest recipe: {worker.folder.best}")


if __name__ == "__main__":
    run_command(main)
