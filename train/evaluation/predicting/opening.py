"""Opens a run, a probe or an ensemble to predict images with it, without the recording that it was fitted on."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.common.errors import BadInput
from data_prep.shards.folder import ShardFolder
from data_prep.shards.manifest import Image, Manifest, Rates, from_json_list
from train.data.seen import record_of
from train.evaluation.ensemble_record import (
    ENSEMBLE_FILE,
    EnsembleRecord,
    check_unchanged,
    is_fine_tuned,
    member_folder,
    read_record,
    read_stack_weights,
)
from train.evaluation.predicting.image_predictor import (
    Combination,
    ImagePredictor,
    NetworkInUnits,
    PredictorNetwork,
    SizedNetwork,
)
from train.evaluation.training_facts import ResponseScale
from train.models.network import Network
from train.models.probe_network import load_probe_network
from train.run.checkpoint import load_matching_tensors, load_progress, resolve_checkpoint
from train.run.folder import RunFolder, check_no_links, open_probe, open_run
from train.run.progress import Progress

UNKNOWN_UNITS = "as recorded"
DEEPEST = 8  # ensembles of ensembles


def open_predictor(path: Path, recording: str | None = None, checkpoint: str = "best") -> ImagePredictor:
    """Load a run, a probe or an ensemble.

    Args:
        path: its folder.
        recording: which of several recordings it is to predict.
        checkpoint: of a run, `best` or `last`.

    Raises:
        BadInput: the folder is none of these, damaged, or does not predict that recording.
    """
    predictor = _open(path, recording, checkpoint, 0)
    if recording is not None and predictor.recording not in ("", recording):
        raise BadInput(f"{path} predicts the recording {predictor.recording}, not {recording!r}")
    return predictor


def _open(path: Path, recording: str | None, checkpoint: str, depth: int) -> ImagePredictor:
    if is_fine_tuned(path):
        return _open_run(path, recording, checkpoint)
    if checkpoint != "best":
        raise BadInput(f"{path} is a probe or an ensemble, which has no {checkpoint} checkpoint")
    if (path / ENSEMBLE_FILE).is_file():
        return _open_ensemble(path, recording, depth)
    return _open_probe(path)


# --------------------------------------------------------------------------------------------------------------- run


def _open_run(path: Path, recording: str | None, which: str) -> ImagePredictor:
    folder, recipe = open_run(path)
    checkpoint = resolve_checkpoint(folder.checkpoints, which)
    whole = progress = load_progress(checkpoint)
    rows = slice(None)
    if progress.has_several_recordings:
        if recording is None:
            names = ", ".join(progress.recordings)
            raise BadInput(f"{path} was trained on several recordings; say which one to predict: {names}")
        rows, progress = progress.rows_of(recording, str(path)), progress.for_recording(recording, str(path))
    network = Network(recipe.for_evaluation(), _outputs(progress), progress.image_size)
    network.load_state_dict(load_matching_tensors(network, checkpoint, "network", rows))
    responses = network.objective.responses
    return ImagePredictor(
        path=path,
        kind="run",
        checkpoint=checkpoint.name,
        recording=next(iter(progress.recordings), ""),
        units=_units(folder, whole, recording),
        site_ids=progress.site_ids if recipe.task.predicts_responses else None,
        classes=progress.classes if recipe.task.predicts_classes else None,
        network=PredictorNetwork([SizedNetwork(NetworkInUnits(network), progress.image_size)], None),
        record=record_of(path),
        scale=None if responses is None else ResponseScale(responses.rate_mean.numpy(), responses.rate_std.numpy()),
    )


def _outputs(progress: Progress) -> Manifest:
    """As much of a manifest as a network asks for whose weights, and with them each site's scale, are then loaded."""
    sites = len(progress.site_ids)
    return Manifest(
        name="unknown",
        simulated=False,
        provenance={},
        splits={},
        sites=[{"id": site} for site in progress.site_ids],
        classes=progress.classes,
        image=Image(width=progress.image_size, height=progress.image_size, mode="RGB"),
        rates=Rates(units=UNKNOWN_UNITS, mean=[0.0] * sites, std=[1.0] * sites),
        response_window_ms=None,
    )


def _units(folder: RunFolder, progress: Progress, recording: str | None) -> str:
    """The units of a recording; runs of earlier versions have not kept them, so that their shards are asked."""
    names = list(progress.recordings)
    name = recording if recording in names else next(iter(names), "")
    if name in progress.units:
        return progress.units[name]
    try:
        data = folder.data_folders()
        return ShardFolder(data[names.index(name) if name in names else 0]).manifest.rates.units
    except (BadInput, IndexError):
        return UNKNOWN_UNITS


# ------------------------------------------------------------------------------------------------------------- probe


def _open_probe(path: Path) -> ImagePredictor:
    recipe = open_probe(path)
    check_no_links(path)
    network, facts = load_probe_network(path, recipe)
    return ImagePredictor(
        path=path,
        kind="probe",
        checkpoint="",
        recording=facts.recording,
        units=facts.units,
        site_ids=facts.site_ids,
        classes=None,
        network=PredictorNetwork([SizedNetwork(network, facts.image_size)], None),
        record=record_of(path),
        scale=ResponseScale(from_json_list(facts.rate_mean), from_json_list(facts.rate_std)),
    )


# ---------------------------------------------------------------------------------------------------------- ensemble


def _open_ensemble(path: Path, recording: str | None, depth: int) -> ImagePredictor:
    check_no_links(path)
    record = read_record(path)
    if depth >= DEEPEST:
        raise BadInput(f"{path}: ensembles of ensembles deeper than {DEEPEST} are not opened")
    name = recording if recording in record.recordings else None
    if name is None and len(record.recordings) > 1:
        raise BadInput(f"{path} predicts several recordings; say which one: {', '.join(record.recordings)}")
    name = name or next(iter(record.recordings), None)
    members = _open_members(path, record, name, depth + 1)
    first = members[0]
    return ImagePredictor(
        path=path,
        kind="ensemble",
        checkpoint="",
        recording=name or first.recording,
        units=first.units,
        site_ids=first.site_ids,
        classes=None,
        network=PredictorNetwork(
            [network for member in members for network in member.network.sized_networks],
            _combination(path, record, name, members),
        ),
        record=record_of(path),
        scale=first.scale,
    )


def _open_members(path: Path, record: EnsembleRecord, recording: str | None, depth: int) -> list[ImagePredictor]:
    """The runs of all members, which predict the same sites."""
    runs = [run for member in record.members for run in member]
    members = []
    for run in runs:
        check_unchanged(path, record, run)
        members.append(_open(member_folder(path, record, run), recording, "best", depth))
    first = members[0]
    if first.site_ids is None:
        raise BadInput(f"{path}: {first.path} does not predict responses, which is what an ensemble combines")
    for other in members[1:]:
        if other.site_ids != first.site_ids:
            raise BadInput(f"{path}: {other.path} and {first.path} predict different sites; make the ensemble again")
    return members


def _combination(
    path: Path, record: EnsembleRecord, recording: str | None, members: Sequence[ImagePredictor]
) -> Combination:
    """The mean over all runs, or the weights of the groups, each of which is the mean over its runs."""
    site_ids = members[0].site_ids or []
    sites, runs = len(site_ids), [len(group) for group in record.members]
    weights, offset = np.full((sum(runs), sites), 1 / sum(runs)), np.zeros(sites)
    if record.combine == "stack":
        stack = read_stack_weights(path, recording)
        if stack.site_ids != site_ids or len(stack.weights) != len(runs):
            raise BadInput(f"{path}: the weights are of other members or sites; make the ensemble again")
        weights = np.repeat(stack.weights / np.array(runs)[:, None], runs, axis=0)
        offset = stack.mean * (1 - stack.weights.sum(axis=0))
    return Combination.of([member.network.as_combination(sites) for member in members], weights, offset)
