"""Fine-tune a vision backbone to predict the responses of a recording's sites.

accelerate launch [...] train/finetune.py [RECIPE.yaml] --data DIR --out RUN [--section.key value ...]
launch/local.sh -n 2    train/finetune.py [RECIPE.yaml] --data DIR --out RUN [--section.key value ...]
"""

import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated

from pydantic import Field

from data_prep.common.errors import run_command
from data_prep.common.option_fields import FolderLocation
from train.run.folder import open_run
from train.run.recipe import MOST_RECORDINGS, Recipe
from train.run.recipe_command import parse_resumable

EXAMPLES = (
    "train/recipes/resnet50.yaml --data data/it --out runs/resnet50",
    "train/recipes/resnet50.yaml --data data/it --out runs/slower --optimizer.lr 3e-4 --epochs 60",
)


class Finetune(Recipe):
    """Fine-tune a vision backbone to predict the responses of a recording's sites."""

    data: Annotated[list[FolderLocation], Field(min_length=1, max_length=MOST_RECORDINGS)]
    """Shard folder made by data_prep/pack.py, or its URL (https://, s3://, gs://, hf://, ...); several train one
    backbone on several recordings, with a readout for each."""
    out: Path
    """Run folder to create."""
    resume: bool = False
    """Resume the run in --out from its last checkpoint; a job that is restarted (SPIKETUNE_JOB) does so by itself."""


def parse_command_line(words: list[str]) -> tuple[Finetune, Recipe]:
    """The options, and the recipe in them."""
    return parse_resumable(Finetune, Recipe, words, EXAMPLES, lambda run: open_run(run)[1])


def main() -> None:
    """Parse, check, build, train, close."""
    options, recipe = parse_command_line(sys.argv[1:])

    from train.distributed.runtime import start_runtime
    from train.finetuning.setup.assembly import build
    from train.finetuning.setup.preparation import prepare
    from train.finetuning.setup.resume import rewind_to, starting_point

    run = prepare(recipe, options.data, options.out, options.resume)
    recipe = run.recipe
    with (
        start_runtime(
            run.deepspeed,
            recipe.precision,
            recipe.deterministic,
            start_timeout=recipe.faults.start_timeout,
            timeout=recipe.faults.timeout,
        ) as runtime,
        closing(run.folder),
    ):
        if run.resume:
            runtime.run_on_main(run.folder.lock)
        start = starting_point(run, runtime)
        training = build(run, start, runtime)
        with closing(training.monitor), run.folder.logging_failures(runtime.rank):
            if run.resume:
                rewind_to(start, run, training.monitor, runtime)
            training.run()


if __name__ == "__main__":
    run_command(main, on_ranks=True)
