"""Predict the responses from a frozen network's activations, layer by layer, or from the pixels, exactly.

accelerate launch [...] train/probe.py [RECIPE.yaml] --data DIR --out RUN --layers all
launch/local.sh -n 2    train/probe.py --data DIR --out RUN --layers pixels
"""

import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated, Literal

from data_prep.common.errors import run_command
from data_prep.common.option_fields import OFTEN_CHANGED, FolderLocation
from train.evaluation.options import SeenPolicy
from train.run.folder import open_probe
from train.run.recipe import ProbeRecipe
from train.run.recipe_command import parse_resumable

EXAMPLES = (
    "--data data/it --out runs/pixels --layers pixels",
    "train/recipes/probes/resnet50.yaml --data data/it --out runs/layers --split cv",
)


class Probe(ProbeRecipe):
    """Predict the responses from a frozen network's activations, or from the pixels, exactly."""

    data: FolderLocation
    """Shard folder made by data_prep/pack.py, or its URL (https://, s3://, gs://, hf://, ...)."""
    out: Path
    """Run folder to create."""
    split: Annotated[Literal["val", "test", "cv"], OFTEN_CHANGED] = "val"
    """Stimuli to score: a split, by a regression on train; or all (cv), each fold by a regression on the others."""
    seen: SeenPolicy = "refuse"
    """If stimuli to score were fitted, by their network or by the probe itself, going by their images: refuse to score,
    drop them, or keep them. What is done is marked in metrics.json and tables."""
    scratch: Path | None = None
    """Folder for activations while the probe runs; a subfolder of the run folder by default."""
    resume: bool = False
    """Resume an interrupted probe; a job that is restarted (SPIKETUNE_JOB) does so by itself."""


def parse_command_line(words: list[str]) -> tuple[Probe, ProbeRecipe]:
    """The options, and the recipe in them."""
    return parse_resumable(Probe, ProbeRecipe, words, EXAMPLES, open_probe)


def main() -> None:
    """Parse, check, probe."""
    options, recipe = parse_command_line(sys.argv[1:])

    from train.distributed.runtime import start_runtime
    from train.probing.preparation import prepare
    from train.probing.probe_run import run, scratch_folder
    from train.run.monitor import Monitor

    job = prepare(recipe, options.data, options.out, options.split, options.seen, options.resume)
    with (
        start_runtime(None, "fp32", start_timeout=recipe.timeout, timeout=recipe.timeout) as runtime,
        closing(job.folder),
    ):
        facts = runtime.facts() | {"split": job.split, "parameters": {"all": job.extractor.parameters}}
        runtime.run_on_main(job.folder.lock if job.resume else lambda: job.folder.claim(job.recipe, [job.data], facts))
        runtime.run_on_main(lambda: job.record.write(job.folder.path))
        with (
            closing(Monitor(job.folder, runtime.is_main, recipe.trackers)) as monitor,
            job.folder.logging_failures(runtime.rank),
        ):
            run(job, scratch_folder(options.scratch, options.out), runtime, monitor)


if __name__ == "__main__":
    run_command(main, on_ranks=True)
