"""Predict the responses from a frozen network's activations, layer by layer, or from the pixels, exactly.

accelerate launch [...] train/probe.py [RECIPE.yaml] --data DIR --out RUN --layers all
launch/local.sh -n 2    train/probe.py --data DIR --out RUN --layers pixels
"""

import sys
from contextlib import closing
from pathlib import Path
from typing import Literal

import tyro

from data_prep.common.command_line import Place, parse
from data_prep.common.errors import run_command
from train.run.folder import begun_by_this_job, open_probe
from train.run.recipe import ProbeRecipe, leading_recipe


class Probe(ProbeRecipe):
    """Predict the responses from a frozen network's activations, or from the pixels, exactly.

    A recipe (.yaml) as the first word gives the defaults: train/probe.py [RECIPE.yaml] --data DIR --out RUN ...
    """

    data: Place
    """Shard folder made by data_prep/pack.py, or its URL (https://, s3://, gs://, hf://, ...)."""
    out: Path
    """Run folder to make."""
    split: Literal["val", "test", "cv"] = "val"
    """The stimuli to score: of a split, by a regression on train; or all, each fold by a regression on the others."""
    scratch: Path | None = None
    """Folder for activations while the probe runs; by default in the run folder."""
    resume: bool = False
    """Go on with a probe that was interrupted; a job that is started again (SPIKETUNE_JOB) does so."""


def parse_command_line(words: list[str]) -> tuple[Probe, ProbeRecipe]:
    """A command line, whose first word may be a recipe, as options and as the recipe they amount to.

    With --resume and no recipe, the probe's own recipe gives the defaults.
    """
    recipe, words = leading_recipe(words, ProbeRecipe)
    options = _parse_flags(words, recipe or ProbeRecipe(data="" if "--resume" in words else None))
    resume = options.resume or begun_by_this_job(options.out)
    if resume and recipe is None:
        options = _parse_flags(words, open_probe(options.out))
    options.resume = resume
    recipe = ProbeRecipe(**{name: getattr(options, name) for name in ProbeRecipe.model_fields})
    recipe.check()
    return options, recipe


def _parse_flags(words: list[str], defaults: ProbeRecipe) -> Probe:
    missing = {"data": tyro.MISSING if defaults.data is None else defaults.data, "out": tyro.MISSING}
    others = {"split": "val", "scratch": None, "resume": False}
    return parse(Probe, args=words, default=Probe.model_construct(**(dict(defaults) | missing), **others))


def main() -> None:
    """Parse, check, probe."""
    options, recipe = parse_command_line(sys.argv[1:])

    from train.distributed.runtime import start_runtime
    from train.probing.preparation import prepare
    from train.probing.probe_run import run, scratch_folder
    from train.run.monitor import Monitor

    job = prepare(recipe, options.data, options.out, options.split, options.resume)
    with start_runtime(None, "fp32", timeouts=(recipe.timeout, recipe.timeout)) as runtime, closing(job.folder):
        facts = {"processes": runtime.describe(), "split": job.split, "parameters": {"all": job.look.parameters}}
        runtime.run_on_main(job.folder.hold if job.resume else lambda: job.folder.claim(job.recipe, [job.data], facts))
        with closing(Monitor(job.folder, runtime.is_main)) as monitor, job.folder.keeping_failures(runtime.rank):
            run(job, scratch_folder(options.scratch, options.out), runtime, monitor)


if __name__ == "__main__":
    run_command(main)
