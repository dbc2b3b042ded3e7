"""Score what an ensemble's members still have to predict, and join their predictions."""

from collections.abc import Sequence

from data_prep.common.errors import BadInput
from data_prep.shards.folder import ShardFolder
from train.data.bad_samples import BadSamples
from train.data.recordings import Recordings
from train.evaluation.ensembles import Ensemble, check_place, data_of, is_fine_tuned, members_of, write_ensembles
from train.evaluation.options import Evaluate
from train.evaluation.run_results import shown_scores, warn_of_bad_samples
from train.evaluation.run_scoring import Job, prepare
from train.run.folder import LEFT_OUT, open_run
from train.run.recipe import Loader


def prepare_ensembles(options: Evaluate) -> tuple[list[Job], list[Ensemble]]:
    """What has to be scored for an ensemble, and who is in it: an ensemble for each recording.

    Those are the recordings of --data, by default those of the first run; every member must predict them.

    Raises:
        BadInput: options or members that do not go together.
    """
    if options.out is None:
        raise BadInput("several runs make an ensemble; name its folder with --out")
    if options.split == LEFT_OUT or options.checkpoint != "best":
        raise BadInput("an ensemble is of best checkpoints, on train, val or test; left_out is written beside those")
    if doubled := [run for run in options.runs if options.runs.count(run) > 1]:
        raise BadInput(f"{doubled[0]} is named twice; each run of an ensemble counts once")
    recipes = [open_run(run)[1] if is_fine_tuned(run) else None for run in options.runs]
    jobs: list[Job] = []
    for run, recipe in zip(options.runs, recipes, strict=True):
        if recipe is not None:
            if not recipe.task.predicts_responses:
                raise BadInput(f"{run} predicts no responses; an ensemble joins predictions of those")
            left_out = options.combine == "stack" or recipe.early_stopping.split == "inner"
            for name in (options.split, *([LEFT_OUT] * left_out)):
                jobs += prepare(options, run, name)
    skips = options.on_bad_sample or ("skip" if any(job.screening.skips for job in jobs) else "stop")
    loader = Loader(on_bad_sample=skips, shard_cache=options.shard_cache)
    shards = [ShardFolder(place, loader.fetch) for place in options.data or data_of(options.runs[0])]
    ensembles = [
        Ensemble(members_of(options.runs, recipes, opened.manifest.name), options.combine, opened, BadSamples(loader))
        for opened in Recordings(shards).folders
    ]
    check_place(options.out, ensembles)
    for ensemble in ensembles:
        ensemble.check_complete(options.split)
    return jobs, ensembles


def join(options: Evaluate, ensembles: Sequence[Ensemble], ranks: int) -> None:
    """Join what the members predicted, write, and say how good it is."""
    found = write_ensembles(options.out, ensembles, options.split, ranks)
    for ensemble, metrics in zip(ensembles, found, strict=True):
        of = f"{ensemble.recording}, " if len(ensembles) > 1 else ""
        print(f"ensemble, {of}{options.split}: {shown_scores(metrics)}", flush=True)
        warn_of_bad_samples(ensemble.screening)
    print(f"written to {options.out}", flush=True)
