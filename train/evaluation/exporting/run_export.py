"""Exports a run: its predictions, or its network."""

import sys
from pathlib import Path

from data_prep.common.atomic_writes import write_bytes
from data_prep.common.errors import BadInput
from data_prep.shards.folder import ShardFolder
from train.data.seen import inherited_record
from train.evaluation.ensemble_record import ENSEMBLE_FILE, is_fine_tuned, read_record, shard_folders_of
from train.evaluation.exporting.network_export import TrainedNetwork, load_trained, write_timm
from train.evaluation.exporting.prediction_export import Assembly, assemble, mat_bytes, netcdf_bytes
from train.evaluation.exporting.predictor_export import ARCHIVE, FILES, write_archive, write_predictor
from train.evaluation.options import Export
from train.evaluation.predicting.opening import open_predictor
from train.evaluation.predictions_file import PREDICTIONS_FILE, read_predictions
from train.run.checkpoint import load_progress, resolve_checkpoint
from train.run.folder import RunFolder, check_writable, open_run

PREDICTION_SUFFIXES = {"netcdf": ".nc", "mat": ".mat"}
NETWORK_FILES = {
    "timm": ("model.safetensors", "config.json"),
    "predictor": FILES,
    "predictor-zip": (ARCHIVE,),
}


def export(options: Export) -> None:
    """Check everything, then write each format and print its files.

    Raises:
        BadInput: the run cannot be exported as asked, or a file already exists.
    """
    _check_recording(options)
    _check_files(options)
    # All are loaded before anything is written.
    assembly = _load_assembly(options) if set(options.format) & PREDICTION_SUFFIXES.keys() else None
    network = _load_network(options) if "timm" in options.format else None
    opened = None
    if {"predictor", "predictor-zip"} & set(options.format):
        opened = open_predictor(options.run, options.recording, options.checkpoint)
    for name in options.format:
        if assembly is not None and name in PREDICTION_SUFFIXES:
            path = _prediction_file(options, name)
            write_bytes(path, netcdf_bytes(assembly) if name == "netcdf" else mat_bytes(assembly))
            _print_files(name, [path])
        elif network is not None and name == "timm":
            paths, loading = write_timm(network, options.out)
            _print_files(name, paths)
            print(f"  {loading}", flush=True)
        elif opened is not None:
            write = write_predictor if name == "predictor" else write_archive
            _print_files(name, write(opened, options.out))


def _print_files(name: str, paths: list[Path]) -> None:
    print(f"{name}: {', '.join(map(str, paths))}", flush=True)


def _prediction_file(options: Export, name: str) -> Path:
    split = RunFolder(options.run).evaluation(options.split, options.checkpoint).name
    return options.out / f"predictions_{split}{PREDICTION_SUFFIXES[name]}"


def _check_recording(options: Export) -> None:
    """With several recordings, one has to be named; otherwise none.

    Raises:
        BadInput: naming the recordings.
    """
    names = _recordings(options.run)
    if names and options.recording not in names:
        raise BadInput(f"{options.run} was trained on {', '.join(names)}: name one of them with --recording")
    if not names and options.recording is not None:
        raise BadInput(f"--recording: {options.run} was not trained on several recordings; leave it out")


def _recordings(run: Path) -> list[str]:
    """The names of the recordings that a run or an ensemble predicts, if there are several; else empty."""
    if not (run / ENSEMBLE_FILE).is_file():
        return RunFolder(run).recordings()
    names = read_record(run).recordings
    return names if len(names) > 1 else []


def _check_files(options: Export) -> None:
    """Refuse to overwrite a file.

    Raises:
        BadInput: a file already exists, or the folder cannot be written.
    """
    check_writable(options.out)
    for name in options.format:
        if name in PREDICTION_SUFFIXES:
            paths = [_prediction_file(options, name)]
        else:
            paths = [options.out / file for file in NETWORK_FILES[name]]
        for path in paths:
            if path.exists():
                raise BadInput(f"{path} already exists; choose another --out")


def _load_assembly(options: Export) -> Assembly:
    folder = RunFolder(options.run)
    if not folder.recipe.is_file() and not (options.run / ENSEMBLE_FILE).is_file():
        raise BadInput(f"{options.run} is not the folder of a run, a probe or an ensemble")
    scored = folder.evaluation(options.split, options.checkpoint, options.recording)
    predictions = read_predictions(scored / PREDICTIONS_FILE)
    return assemble(predictions, _find_shards(options, folder), options.split)


def _find_shards(options: Export, folder: RunFolder) -> ShardFolder | None:
    """The shard folder, for facts about stimuli and sites; None if it no longer exists."""
    if options.data is not None:
        return ShardFolder(options.data)
    try:
        return ShardFolder(_data_of(options, folder))
    except BadInput as error:
        print(f"warning: exported without facts about stimuli and sites: {error}", file=sys.stderr)
        return None


def _load_network(options: Export) -> TrainedNetwork:
    if not is_fine_tuned(options.run):
        raise BadInput(f"--format timm: {options.run} has no network of its own; use --format predictor")
    folder, recipe = open_run(options.run)
    checkpoint = resolve_checkpoint(folder.checkpoints, options.checkpoint)
    progress = load_progress(checkpoint)
    data = options.data or _data_of(options, folder)
    rows = slice(None)
    if options.recording is not None:
        rows = progress.rows_of(options.recording, "--recording")
        progress = progress.for_recording(options.recording, "--recording")
    manifest = ShardFolder(data).manifest
    progress.check_fits(manifest, str(data))
    return load_trained(recipe, checkpoint, progress, manifest, inherited_record(folder.path), rows)


def _data_of(options: Export, folder: RunFolder) -> str:
    """The shard folder of the recording."""
    folders = shard_folders_of(folder.path)
    if options.recording is None:
        return folders[0]
    return folders[_recordings(folder.path).index(options.recording)]
