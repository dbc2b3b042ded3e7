"""Evaluates an ensemble: opens its members, scores those that need it, combines them, writes the results.

OUT/ensemble.json, weights.npz         the members, and how they are combined (train/evaluation/ensemble_record.py)
OUT/env.json                           the command, versions and hardware
OUT/eval/<split>/...                   as in a run folder; and `left_out`, for use as a teacher or a member
OUT/seen.npz                           what the members have seen (train/data/seen.py)

With several recordings, the predictions of each recording are combined on their own.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.common.atomic_writes import write_json
from data_prep.common.errors import BadInput
from data_prep.common.process_identity import speaks
from data_prep.remote.url import public_location
from data_prep.shards.folder import ShardFolder
from train.data.bad_samples import BadSamples
from train.data.recordings import Recordings
from train.data.seen import FITTED, SeenImages, SeenRecord, images_of_split, inherited_record
from train.data.stimuli import RecordingStimuli
from train.evaluation.ensemble_record import (
    ENSEMBLE_FILE,
    EnsembleRecord,
    StackWeights,
    facts_of_members,
    is_fine_tuned,
    read_record,
    shard_folders_of,
    write_stack_weights,
)
from train.evaluation.ensembles import Ensemble, EnsemblePredictions, ScoredStimuli, group_into_members
from train.evaluation.evaluation_job import PARTS, EvaluationJob, prepare
from train.evaluation.metrics_file import METRICS_FILE, metrics_content
from train.evaluation.metrics_report import regression_block, report_head
from train.evaluation.moments import SiteMoments
from train.evaluation.options import Evaluate
from train.evaluation.predicting.split_job import SplitJob, prepare_split
from train.evaluation.predictions_file import PREDICTIONS_FILE, Predictions, predictions_of
from train.evaluation.run_evaluation import print_warnings, summary
from train.evaluation.seen_stimuli import NothingLeftOut, SeenRule, selected_on
from train.evaluation.training_facts import OTHER_SCALE
from train.models.saved_probe import SAVED_PROBE
from train.run.environment import environment
from train.run.folder import LEFT_OUT, RunFolder, open_run
from train.run.recipe import Loader, Recipe

# ----------------------------------------------------------------------------------------------------- preparation


@dataclass(frozen=True)
class PreparedEnsembles:
    """What makes an ensemble.

    Attributes:
        jobs: evaluations of fine-tuned members, to run first.
        splits: those of probes and ensembles that have no predictions of the split yet.
        ensembles: one for each recording.
    """

    jobs: list[EvaluationJob]
    splits: list[SplitJob]
    ensembles: list[Ensemble]


def prepare_ensembles(options: Evaluate) -> PreparedEnsembles:
    """Open the members of an ensemble, and check that they can be combined.

    The ensemble predicts the recordings of --data, by default those of the first run; every member must predict them.

    Raises:
        BadInput: options or members that do not go together.
    """
    out = _checked_out(options)
    recipes = [open_run(run)[1] if is_fine_tuned(run) else None for run in options.runs]
    jobs = [
        job
        for run, recipe in zip(options.runs, recipes, strict=True)
        if recipe is not None
        for job in _jobs(options, run, recipe)
    ]
    on_bad_sample = options.on_bad_sample
    if on_bad_sample is None:
        on_bad_sample = "skip" if any(job.bad_samples.skips for job in jobs) else "stop"
    loader = Loader(on_bad_sample=on_bad_sample, shard_cache=options.shard_cache)
    folders = [ShardFolder(data, loader.fetch) for data in options.data or shard_folders_of(options.runs[0])]
    ensembles = [
        _open_ensemble(options, recipes, shards, loader, has_left_out=_all_left_out(options.runs, recipes, jobs))
        for shards in Recordings(folders).folders
    ]
    _check_free(out, ensembles)
    unscored = [run for run in options.runs if not is_fine_tuned(run) and _is_unscored(run, ensembles)]
    same_data = options.model_copy(update={"data": options.data or shard_folders_of(options.runs[0])})
    splits = [job for run in unscored for job in prepare_split(same_data, run)]
    for ensemble in ensembles:
        _check_predictions(ensemble, unscored)
    return PreparedEnsembles(jobs, splits, ensembles)


def _is_unscored(run: Path, ensembles: Sequence[Ensemble]) -> bool:
    """Whether a probe or an ensemble that can predict any split has no predictions of this one."""
    folders = [RunFolder(run).results_on(ensemble.split, ensemble.recording) for ensemble in ensembles]
    can_predict = (run / ENSEMBLE_FILE).is_file() or (run / SAVED_PROBE).is_file()
    return can_predict and not any((folder / PREDICTIONS_FILE).exists() for folder in folders)


def _all_left_out(runs: Sequence[Path], recipes: Sequence[Recipe | None], jobs: Sequence[EvaluationJob]) -> bool:
    """Whether every fine-tuned run is about to predict what it left out; older predictions may be of fitted stimuli."""
    predicting = {job.run.folder.path for job in jobs if job.split == LEFT_OUT}
    return all(run in predicting for run, recipe in zip(runs, recipes, strict=True) if recipe is not None)


def _open_ensemble(
    options: Evaluate,
    recipes: Sequence[Recipe | None],
    shards: ShardFolder,
    loader: Loader,
    *,
    has_left_out: bool,
) -> Ensemble:
    members = group_into_members(options.runs, recipes, shards.manifest.name)
    record, bad_samples = _joined_record(options.runs), BadSamples(loader)
    if options.combine == "stack":
        record = record.adding(_stacked_on(record, shards))
    scored = _scored_stimuli(options, record, shards, bad_samples)
    return Ensemble(members, options.combine, shards, options.split, scored, bad_samples, has_left_out=has_left_out)


def _joined_record(runs: Sequence[Path]) -> SeenRecord:
    """What the members have seen."""
    record = SeenRecord()
    for run in runs:
        record = record.inheriting(inherited_record(run), f"member {run}")
    return record


def _stacked_on(record: SeenRecord, shards: ShardFolder) -> SeenImages:
    """The training stimuli that the weights are fitted on: at most those that chose a member's epoch.

    The members were fitted on the others themselves.
    """
    train = images_of_split(shards, "train")
    images = SeenImages(FITTED, shards.manifest.name, "", train, shards.split("train").stimulus_ids)
    return images.at(record.overlap(train).selected)


def _scored_stimuli(
    options: Evaluate, record: SeenRecord, shards: ShardFolder, bad_samples: BadSamples
) -> ScoredStimuli:
    """The split's stimuli that can be read and may be scored.

    Raises:
        BadInput: members were fitted on some of them, which --seen refuses.
    """
    split, size = shards.split(options.split), shards.manifest.image.side
    usable = bad_samples.usable_positions(split, size, responses=split.has_responses, classes=False)
    images = images_of_split(shards, split.name).at(usable)
    rule = SeenRule("the ensemble", options.split, options.seen, PARTS.get(options.split))
    compared = rule.compare(record, images, [split.stimulus_ids[position] for position in usable.tolist()])
    stimuli = RecordingStimuli(split, size, usable[compared.scored], split.has_responses)
    return ScoredStimuli(stimuli, compared.seen)


def _checked_out(options: Evaluate) -> Path:
    """The folder of the ensemble.

    Raises:
        BadInput: options that do not go together.
    """
    if options.out is None:
        raise BadInput("several runs make an ensemble; name its folder with --out")
    if options.split == LEFT_OUT:
        raise BadInput("--split: an ensemble is scored on train, val or test; left_out is written as well")
    if options.checkpoint != "best":
        raise BadInput("--checkpoint: an ensemble combines best checkpoints")
    for run in options.runs:
        if options.runs.count(run) > 1:
            raise BadInput(f"{run} is given twice; an ensemble counts each run once")
    return options.out


def _jobs(options: Evaluate, run: Path, recipe: Recipe) -> list[EvaluationJob]:
    """The evaluations that a fine-tuned run needs: of the split, and of its left-out stimuli.

    Only stacked weights need those; a mean without them cannot be a teacher or be stacked itself.
    """
    if not recipe.task.predicts_responses:
        raise BadInput(f"{run} does not predict responses, which is what an ensemble combines")
    jobs = prepare(options, run, options.split)
    try:
        return jobs + prepare(options, run, LEFT_OUT)
    except NothingLeftOut:
        if options.combine == "stack":
            raise
        return jobs


def _check_free(out: Path, ensembles: Sequence[Ensemble]) -> None:
    """Refuse a folder that contains anything but this ensemble; say so where its scores will be replaced.

    Raises:
        BadInput: it does.
    """
    if not (out / ENSEMBLE_FILE).is_file():
        RunFolder(out).check_free()
        return
    if not read_record(out).is_same_ensemble(_record(ensembles)):
        raise BadInput(f"{out} contains another ensemble; choose another --out")
    scored = [ensemble for ensemble in ensembles if _scores_of(out, ensemble).is_file()]
    if scored and speaks():
        print(
            f"note: {out} already has scores on {scored[0].split}; they are replaced, as its members may have changed",
            file=sys.stderr,
            flush=True,
        )


def _scores_of(out: Path, ensemble: Ensemble) -> Path:
    return RunFolder(out).results_on(ensemble.split, ensemble.recording) / METRICS_FILE


def _check_predictions(ensemble: Ensemble, unscored: Sequence[Path]) -> None:
    """Refuse probes and ensembles without predictions of the split or, to learn weights, of stimuli left out.

    Fine-tuned runs, and those that are `unscored`, are not checked: they are scored before they are combined.

    Raises:
        BadInput: naming the file.
    """
    for run in ensemble.runs:
        if not is_fine_tuned(run):
            if run not in unscored:
                ensemble.check_predictions(run)
            if ensemble.combine == "stack":
                predictions_of(run, LEFT_OUT, ensemble.recording)


# --------------------------------------------------------------------------------------------------------- results


def _record(ensembles: Sequence[Ensemble]) -> EnsembleRecord:
    """The record of an ensemble of one or several recordings."""
    members = [[str(run) for run in member.runs] for member in ensembles[0].members]
    data = [public_location(ensemble.shards.folder) for ensemble in ensembles]
    return EnsembleRecord(ensembles[0].combine, members, data, [ensemble.recording for ensemble in ensembles])


def combine_members(out: Path, ensembles: Sequence[Ensemble], ranks: int) -> None:
    """Combine what the members predict, write the results and print a summary.

    Args:
        out: folder.
        ensembles: of each recording.
        ranks: processes that scored the members.

    Raises:
        BadInput: the members cannot be combined.
    """
    metrics_of_recordings = write_ensembles(out, ensembles, ranks)
    for ensemble, metrics in zip(ensembles, metrics_of_recordings, strict=True):
        name = ensemble.split if len(ensembles) == 1 else f"{ensemble.recording}, {ensemble.split}"
        print(f"ensemble {out}, {name}: {len(ensemble.stimuli):,} stimuli  {summary(metrics)}", flush=True)
        print_warnings(ensemble.bad_samples)
    print(f"written to {out}", flush=True)


def _content(record: EnsembleRecord, weights: np.ndarray | None) -> dict[str, Any]:
    """ensemble.json, or the `ensemble` block of metrics.json; with each member's mean weight over sites, if learned."""
    members: list[dict[str, Any]] = [{"runs": runs} for runs in record.members]
    if weights is not None:
        for member, mean_weight in zip(members, weights.mean(axis=1).tolist(), strict=True):
            member["mean_weight"] = mean_weight
    data = record.data if len(record.data) > 1 else record.data[0]
    return {"combine": record.combine, "members": members, "data": data}


def write_ensembles(out: Path, ensembles: Sequence[Ensemble], ranks: int) -> list[dict[str, Any]]:
    """Combine, score and write: ensemble.json, and of each recording predictions and metrics.

    Args:
        out: folder.
        ensembles: of each recording.
        ranks: processes that scored the members.

    Returns:
        The metrics of each recording; empty where there are no responses.

    Raises:
        BadInput: members cannot be combined; then nothing is written.
    """
    predictions = [ensemble.predict() for ensemble in ensembles]
    has_several_recordings = len(ensembles) > 1
    # The weights for several recordings differ; they are in the metrics of each.
    weights = None if has_several_recordings else predictions[0].weights
    record = _record(ensembles)
    found_again = facts_of_members(out, record.members)
    write_json(out / ENSEMBLE_FILE, _content(record, weights) | {"recordings": record.recordings} | found_again)
    _write_weights(out, ensembles, predictions)
    write_json(RunFolder(out).env, environment() | {"world_size": ranks, "data": _content(record, None)["data"]})
    _seen_by(ensembles).write(out)
    return [
        _write(RunFolder(out), ensemble, predicted, ranks, ensemble.recording if has_several_recordings else None)
        for ensemble, predicted in zip(ensembles, predictions, strict=True)
    ]


def _write_weights(out: Path, ensembles: Sequence[Ensemble], predictions: Sequence[EnsemblePredictions]) -> None:
    """Keep what a stacked ensemble needs to predict other images."""
    learned = []
    for ensemble, predicted in zip(ensembles, predictions, strict=True):
        if predicted.weights is not None and predicted.mean is not None:
            site_ids = ensemble.manifest.site_ids
            learned.append(StackWeights(ensemble.recording, site_ids, predicted.weights, predicted.mean))
    if learned:
        write_stack_weights(out, learned)


def _seen_by(ensembles: Sequence[Ensemble]) -> SeenRecord:
    """What an ensemble of one or several recordings has seen."""
    record = _joined_record(ensembles[0].runs)
    if ensembles[0].combine == "stack":
        record = record.adding(*(_stacked_on(record, ensemble.shards) for ensemble in ensembles))
    return record


def _write(
    out: RunFolder, ensemble: Ensemble, predicted: EnsemblePredictions, ranks: int, recording: str | None
) -> dict[str, Any]:
    stimuli, manifest = ensemble.stimuli, ensemble.manifest
    folder = out.evaluation(ensemble.split, recording=recording)
    digest = Predictions(stimuli.stimulus_ids, manifest.site_ids, predicted.rates, stimuli.rates).write(folder)
    if predicted.left_out is not None:
        predicted.left_out.write(out.evaluation(LEFT_OUT, recording=recording))
    if stimuli.rates is None:
        return {}
    moments = SiteMoments.of(torch.from_numpy(predicted.rates), torch.from_numpy(stimuli.rates))
    noise = stimuli.noise_of_rates()
    metrics = report_head(stimuli.stimulus_ids, stimuli.rates, manifest, ensemble.split, ranks)
    metrics["predictions"] = digest
    metrics["regression"] = regression_block(moments, predicted.rates, stimuli.rates, manifest, noise)
    metrics |= _facts_of_members(_metrics_of(run, ensemble.split, ensemble.recording) for run in ensemble.runs)
    metrics["selected_on"] = selected_on(metrics["selected_on"], ensemble.split, ensemble.seen)
    if predicted.weights is not None:
        metrics["selected_on"].append("train, left out")
    metrics["seen"] = ensemble.seen.content()
    metrics["ensemble"] = _content(_record([ensemble]), predicted.weights)
    metrics |= ensemble.bad_samples.facts()
    write_json(folder / METRICS_FILE, metrics)
    return metrics


def _metrics_of(run: Path, split: str, recording: str) -> dict[str, Any]:
    path, advice = RunFolder(run).results_on(split, recording) / METRICS_FILE, "score the run again"
    metrics = metrics_content(path, advice)
    if not isinstance(metrics.get("selected_on"), list):
        raise BadInput(f"{path} is damaged (it has no `selected_on`); {advice}")
    return metrics


def _facts_of_members(metrics_of_runs: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Facts of an ensemble: every split that selected a member, all controls, and the training size if shared."""
    runs = list(metrics_of_runs)
    facts: dict[str, Any] = {"selected_on": list(dict.fromkeys(split for run in runs for split in run["selected_on"]))}
    controls = {run["control"] for run in runs if "control" in run}
    if controls:
        facts["control"] = " and ".join(sorted(controls))
    if any(run.get(OTHER_SCALE) for run in runs):
        facts[OTHER_SCALE] = True
    sizes = {run.get("training_stimuli") for run in runs}
    if len(sizes) == 1 and None not in sizes:
        facts["training_stimuli"] = sizes.pop()
    return facts
