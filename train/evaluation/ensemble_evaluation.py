"""Evaluates an ensemble: opens its members, scores those that need it, combines them, writes the results.

OUT/ensemble.json                      the members, and how they are combined
OUT/eval/<split>/...                   as in a run folder; and `left_out`, for use as a teacher or a member

With several recordings, the predictions of each recording are combined on their own.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.common.atomic_writes import write_json
from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import parse_json, read_regular_file
from data_prep.remote.url import public_location
from data_prep.shards.folder import ShardFolder
from train.data.bad_samples import BadSamples
from train.data.recordings import Recordings
from train.evaluation.ensembles import Ensemble, EnsemblePredictions, group_into_members
from train.evaluation.metrics_report import regression_block, report_head
from train.evaluation.moments import SiteMoments
from train.evaluation.options import Evaluate
from train.evaluation.predictions_file import Predictions, predictions_of
from train.evaluation.run_evaluation import EvaluationJob, prepare, print_warnings, summary
from train.run.folder import LEFT_OUT, RunFolder, is_probe, open_run
from train.run.recipe import Loader, Recipe

ENSEMBLE_FILE = "ensemble.json"


def is_fine_tuned(run: Path) -> bool:
    """Whether a folder is a run of train/finetune.py, which has to be scored, rather than a probe or an ensemble.

    Raises:
        BadInput: it is none of these.
    """
    if (run / ENSEMBLE_FILE).is_file():
        return False
    if not RunFolder(run).recipe.is_file():
        raise BadInput(f"{run} is not the folder of a run, a probe or an ensemble")
    return not is_probe(RunFolder(run))


def shard_folders_of(run: Path) -> list[str]:
    """The shard folders, or their URLs, of a run, a probe or an ensemble.

    Raises:
        BadInput: they are not on record.
    """
    return read_record(run).data if (run / ENSEMBLE_FILE).is_file() else RunFolder(run).data_folders()


@dataclass(frozen=True)
class EnsembleRecord:
    """The content of ensemble.json, without the weights of the members.

    Attributes:
        combine: how the members are combined.
        members: the run folders of each member.
        data: the shard folder of each recording.
    """

    combine: str
    members: list[list[str]]
    data: list[str]

    def is_same_ensemble(self, other: "EnsembleRecord") -> bool:
        """Whether the same runs are combined in the same way on as many recordings, wherever their shards are."""
        return (self.combine, self.members, len(self.data)) == (other.combine, other.members, len(other.data))


def read_record(ensemble: Path) -> EnsembleRecord:
    """Read the ensemble.json of a folder.

    Raises:
        BadInput: it is missing or damaged.
    """
    path = ensemble / ENSEMBLE_FILE
    try:
        content = parse_json(read_regular_file(path))
        data = content["data"] if isinstance(content["data"], list) else [content["data"]]
        members = [member["runs"] for member in content["members"]]
        return EnsembleRecord(content["combine"], members, list(map(str, data)))
    except (OSError, ValueError, KeyError, TypeError):
        raise BadInput(f"{path} is damaged; make the ensemble again in another folder") from None


def _record(ensembles: Sequence[Ensemble]) -> EnsembleRecord:
    """The record of an ensemble of one or several recordings."""
    members = [[str(run) for run in member.runs] for member in ensembles[0].members]
    data = [public_location(ensemble.shards.folder) for ensemble in ensembles]
    return EnsembleRecord(ensembles[0].combine, members, data)


# ----------------------------------------------------------------------------------------------------- preparation


def prepare_ensembles(options: Evaluate) -> tuple[list[EvaluationJob], list[Ensemble]]:
    """Open the members of an ensemble, and check that they can be combined.

    The ensemble predicts the recordings of --data, by default those of the first run; every member must predict them.

    Returns:
        The evaluations to run first, and an ensemble for each recording.

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
        Ensemble(
            group_into_members(options.runs, recipes, shards.manifest.name),
            options.combine,
            shards,
            options.split,
            BadSamples(loader),
        )
        for shards in Recordings(folders).folders
    ]
    _check_free(out, ensembles)
    for ensemble in ensembles:
        _check_predictions(ensemble)
    return jobs, ensembles


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
    """The evaluations that a fine-tuned run needs: of the split, and of the left-out stimuli if these are used."""
    if not recipe.task.predicts_responses:
        raise BadInput(f"{run} does not predict responses, which is what an ensemble combines")
    jobs = prepare(options, run, options.split)
    if options.combine == "stack" or recipe.early_stopping.split == "inner":
        jobs += prepare(options, run, LEFT_OUT)
    return jobs


def _check_free(out: Path, ensembles: Sequence[Ensemble]) -> None:
    """Refuse a folder that contains anything but this ensemble.

    Raises:
        BadInput: it does.
    """
    if not (out / ENSEMBLE_FILE).is_file():
        RunFolder(out).check_free()
    elif not read_record(out).is_same_ensemble(_record(ensembles)):
        raise BadInput(f"{out} contains another ensemble; choose another --out")


def _check_predictions(ensemble: Ensemble) -> None:
    """Refuse probes and ensembles without predictions of the split or, to learn weights, of stimuli left out.

    Fine-tuned runs are not checked: they are scored before they are combined.

    Raises:
        BadInput: naming the file.
    """
    for run in ensemble.runs:
        if not is_fine_tuned(run):
            ensemble.check_sites(run)
            if ensemble.combine == "stack":
                predictions_of(run, LEFT_OUT, ensemble.recording)


# --------------------------------------------------------------------------------------------------------- results


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
        print(f"ensemble, {name}: {summary(metrics)}", flush=True)
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
    write_json(out / ENSEMBLE_FILE, _content(_record(ensembles), weights))
    return [
        _write(RunFolder(out), ensemble, predicted, ranks, ensemble.recording if has_several_recordings else None)
        for ensemble, predicted in zip(ensembles, predictions, strict=True)
    ]


def _write(
    out: RunFolder, ensemble: Ensemble, predicted: EnsemblePredictions, ranks: int, recording: str | None
) -> dict[str, Any]:
    stimuli, manifest = ensemble.stimuli, ensemble.manifest
    folder = out.evaluation(ensemble.split, recording=recording)
    Predictions(stimuli.stimulus_ids, manifest.site_ids, predicted.rates, stimuli.rates).write(folder)
    if predicted.left_out is not None:
        predicted.left_out.write(out.evaluation(LEFT_OUT, recording=recording))
    if stimuli.rates is None:
        return {}
    moments = SiteMoments.of(torch.from_numpy(predicted.rates), torch.from_numpy(stimuli.rates))
    noise = stimuli.noise_of_rates()
    metrics = report_head(stimuli.stimulus_ids, stimuli.rates, manifest, ensemble.split, ranks)
    metrics["regression"] = regression_block(moments, predicted.rates, stimuli.rates, manifest, noise)
    metrics |= _facts_of_members(_read_metrics(run, ensemble.split, ensemble.recording) for run in ensemble.runs)
    if predicted.weights is not None:
        metrics["selected_on"].append("train, left out")
    metrics["ensemble"] = _content(_record([ensemble]), predicted.weights)
    metrics |= ensemble.bad_samples.facts()
    write_json(folder / "metrics.json", metrics)
    return metrics


def _read_metrics(run: Path, split: str, recording: str) -> dict[str, Any]:
    path = RunFolder(run).results_on(split, recording) / "metrics.json"
    try:
        metrics = parse_json(read_regular_file(path))
        if not isinstance(metrics, dict) or not isinstance(metrics.get("selected_on"), list):
            raise ValueError("it has no `selected_on`")
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} is missing or damaged ({error}); score the run again") from None
    return metrics


def _facts_of_members(metrics_of_runs: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Facts of an ensemble: every split that selected a member, all controls, and the training size if shared."""
    runs = list(metrics_of_runs)
    facts: dict[str, Any] = {"selected_on": list(dict.fromkeys(split for run in runs for split in run["selected_on"]))}
    controls = {run["control"] for run in runs if "control" in run}
    if controls:
        facts["control"] = " and ".join(sorted(controls))
    sizes = {run.get("training_stimuli") for run in runs}
    if len(sizes) == 1 and None not in sizes:
        facts["training_stimuli"] = sizes.pop()
    return facts
