"""What train/evaluate.py does with what it is given: predictors to score, members to combine, images to predict."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from train.distributed.runtime import Runtime
from train.evaluation.ensemble_evaluation import combine_members, prepare_ensembles
from train.evaluation.ensemble_record import is_fine_tuned
from train.evaluation.ensembles import Ensemble
from train.evaluation.evaluation_job import prepare
from train.evaluation.options import Evaluate
from train.evaluation.predicting.images_job import prepare_images
from train.evaluation.predicting.split_job import prepare_split
from train.evaluation.run_evaluation import run_job
from train.run.recipe import Recipe

Step = Callable[[Runtime], None]


@dataclass(frozen=True)
class Evaluation:
    """What all ranks do, one step after the other.

    Attributes:
        recipe: whose settings of processes hold.
        steps: each called with the runtime.
    """

    recipe: Recipe
    steps: Sequence[Step]


def prepare_evaluation(options: Evaluate) -> Evaluation:
    """Check everything that can be checked before the process group starts.

    Raises:
        BadInput: options, folders or data that do not go together.
    """
    if options.images is not None:
        return Evaluation(Recipe(), [prepare_images(options).run])
    if options.is_ensemble:
        return _ensemble(options)
    path = options.runs[0]
    if not is_fine_tuned(path):
        return Evaluation(Recipe(), [job.run for job in prepare_split(options, path)])
    jobs = prepare(options, path, options.split)
    return Evaluation(jobs[0].recipe, [partial(run_job, job) for job in jobs])


def _ensemble(options: Evaluate) -> Evaluation:
    prepared = prepare_ensembles(options)
    steps: list[Step] = [partial(run_job, job) for job in prepared.jobs]
    steps += [job.run for job in prepared.splits]
    assert options.out is not None
    steps.append(partial(_combine, options.out, prepared.ensembles))
    return Evaluation(prepared.jobs[0].recipe if prepared.jobs else Recipe(), steps)


def _combine(out: Path, ensembles: Sequence[Ensemble], runtime: Runtime) -> None:
    if runtime.is_main:
        combine_members(out, ensembles, runtime.ranks)
