"""Score a run, a probe or an ensemble on a split, over all ranks; combine several into an ensemble; predict images.

accelerate launch [...] train/evaluate.py RUN --split val
launch/local.sh -n 2    train/evaluate.py RUN PROBE RUN ... --combine stack --out ENSEMBLE
launch/local.sh -n 2    train/evaluate.py RUN --images FOLDER --out DIR
"""

from data_prep.common.command_line import parse
from data_prep.common.errors import run_command
from train.evaluation.options import Evaluate

EXAMPLES = (
    "runs/a --split test",
    "runs/a runs/b probes/c --combine stack --out runs/ensemble",
    "runs/ensemble --images my_images --out predicted",
)


def main() -> None:
    """Parse, check, score or predict, write."""
    options = parse(Evaluate, examples=EXAMPLES)
    options.check()

    from train.distributed.runtime import start_runtime
    from train.evaluation.steps import prepare_evaluation

    evaluation = prepare_evaluation(options)
    with start_runtime(
        None,
        "fp32",
        evaluation.recipe.deterministic,
        start_timeout=evaluation.recipe.faults.start_timeout,
        timeout=evaluation.recipe.faults.timeout,
    ) as runtime:
        for step in evaluation.steps:
            step(runtime)


if __name__ == "__main__":
    run_command(main, on_ranks=True)
