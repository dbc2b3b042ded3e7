"""Score a fine-tuned run on a split, over all ranks; with several runs, score their ensemble.

accelerate launch [...] train/evaluate.py RUN --split val
launch/local.sh -n 2    train/evaluate.py RUN --split val
launch/local.sh -n 2    train/evaluate.py RUN PROBE RUN ... --combine stack --out ENSEMBLE
"""

from data_prep.common.command_line import parse
from data_prep.common.errors import BadInput, run_command
from train.evaluation.options import Evaluate
from train.run.recipe import Recipe

EXAMPLES = (
    "runs/a --split test",
    "runs/a runs/b probes/c --combine stack --out runs/ensemble",
)


def main() -> None:
    """Parse, check, score, write."""
    options = parse(Evaluate, examples=EXAMPLES)
    is_ensemble = len(options.runs) > 1 or options.out is not None
    if options.combine != "mean" and not is_ensemble:
        raise BadInput("--combine needs several runs, and only one is given")

    from train.distributed.runtime import start_runtime
    from train.evaluation.ensemble_evaluation import combine_members, prepare_ensembles
    from train.evaluation.evaluation_job import prepare
    from train.evaluation.run_evaluation import run_job

    if is_ensemble:
        jobs, ensembles = prepare_ensembles(options)
    else:
        jobs, ensembles = prepare(options, options.runs[0], options.split), []
    recipe = jobs[0].recipe if jobs else Recipe()
    with start_runtime(
        None,
        "fp32",
        recipe.deterministic,
        start_timeout=recipe.faults.start_timeout,
        timeout=recipe.faults.timeout,
    ) as runtime:
        for job in jobs:
            run_job(job, runtime)
        if options.out is not None and runtime.is_main:
            combine_members(options.out, ensembles, runtime.ranks)


if __name__ == "__main__":
    run_command(main, on_ranks=True)
