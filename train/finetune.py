"""Fine-tune a vision backbone to predict the responses of a recording's sites.

accelerate launch [...] train/finetune.py [RECIPE.yaml] --data DIR --out RUN [--section.key value ...]
launch/local.sh -n 2    train/finetune.py [RECIPE.yaml] --data DIR --out RUN [--section.key value ...]
"""

import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import Field

from data_prep.common.command_line import Place, parse
from data_prep.common.errors import run_command
from train.run.folder import begun_by_this_job, open_run
from train.run.recipe import MOST_RECORDINGS, Recipe, leading_recipe


class Finetune(Recipe):
    """Fine-tune a vision backbone to predict the responses of a recording's sites.

    A recipe (.yaml) as the first word gives the defaults: train/finetune.py [RECIPE.yaml] --data DIR --out RUN ...
    """

    data: Annotated[list[Place], Field(min_length=1, max_length=MOST_RECORDINGS)]
    """Shard folder made by data_prep/pack.py, or its URL (https://, s3://, gs://, hf://, ...); several train one
    backbone on several recordings, with a readout for each."""
    out: Path
    """Run folder to make."""
    resume: bool = False
    """Go on with the run in --out from its last checkpoint; a job that is started again (SPIKETUNE_JOB) does so."""


def parse_command_line(words: list[str]) -> tuple[Finetune, Recipe]:
    """A command line, whose first word may be a recipe, as options and as the recipe they amount to.

    With --resume and no recipe, the run's own recipe gives the defaults.

    Raises:
        BadInput: anything in it that is unknown, out of bounds or contradictory.
    """
    recipe, words = leading_recipe(words, Recipe)
    options = _parse_flags(words, recipe or Recipe(data="" if "--resume" in words else None))
    resume = options.resume or begun_by_this_job(options.out)
    if resume and recipe is None:
        options = _parse_flags(words, open_run(options.out)[1])
    options.resume = resume
    recipe = Recipe(**{name: getattr(options, name) for name in Recipe.model_fields})
    recipe.check()
    return options, recipe


def _parse_flags(words: list[str], defaults: Recipe) -> Finetune:
    missing = {"data": defaults.places or tyro.MISSING, "out": tyro.MISSING}
    return parse(Finetune, args=words, default=Finetune.model_construct(**(dict(defaults) | missing), resume=False))


def main() -> None:
    """Parse, check, build, train, close."""
    options, recipe = parse_command_line(sys.argv[1:])

    from train.distributed.runtime import start_runtime
    from train.finetuning.assembly import build
    from train.finetuning.preparation import prepare
    from train.finetuning.resume import starting_point

    job = prepare(recipe, options.data, options.out, options.resume)
    recipe = job.recipe
    settings = (job.deepspeed, recipe.precision, recipe.deterministic)
    with start_runtime(*settings, timeouts=recipe.faults.timeouts) as runtime, closing(job.folder):
        if job.resume:
            runtime.run_on_main(job.folder.hold)
        start = starting_point(job, runtime)
        training = build(job, start, runtime)
        with closing(training.monitor), job.folder.keeping_failures(runtime.rank):
            if job.resume:
                training.go_on(start)
            training.run()


if __name__ == "__main__":
    run_command(main)
