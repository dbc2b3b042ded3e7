"""Export a run: its predictions, or its network."""

import sys
from collections.abc import Callable
from pathlib import Path

from data_prep.common.atomic_writes import write_bytes
from data_prep.common.errors import BadInput
from data_prep.shards.folder import ShardFolder
from train.evaluation.network_export import Trained, load_trained, write_predictor, write_timm
from train.evaluation.options import Export
from train.evaluation.prediction_export import Assembly, assemble, mat_bytes, netcdf_bytes, read_predictions
from train.run.checkpoint import current, load_progress
from train.run.folder import RunFolder, check_writable, open_run

PREDICTIONS: dict[str, tuple[str, Callable[[Assembly], bytes]]] = {
    "netcdf": ("nc", netcdf_bytes),
    "mat": ("mat", mat_bytes),
}
FILES = {
    "timm": ("model.safetensors", "config.json"),
    "predictor": ("network.pt2", "predictor.json", "predictor.py"),
}


def export(options: Export) -> None:
    """Check everything, then write each format and print its files.

    Raises:
        BadInput: the run cannot be exported as asked, or a file exists already.
    """
    check_recording(options)
    targets = _targets(options)
    assembly = _assembly(options) if PREDICTIONS.keys() & targets.keys() else None
    trained = _trained(options) if FILES.keys() & targets.keys() else None
    for name, paths in targets.items():
        how = ""
        if name in PREDICTIONS:
            write_bytes(paths[0], PREDICTIONS[name][1](assembly))
        elif name == "timm":
            paths, how = write_timm(trained, options.out)
        else:
            paths = write_predictor(trained, options.out)
        print(f"{name}: {', '.join(map(str, paths))}" + (f"\n  {how}" if how else ""), flush=True)


def _targets(options: Export) -> dict[str, list[Path]]:
    """The files of each format.

    Raises:
        BadInput: one is there already, or they cannot be written there.
    """
    check_writable(options.out)
    files = {
        name: [f"predictions_{_tag(options)}.{PREDICTIONS[name][0]}"] if name in PREDICTIONS else list(FILES[name])
        for name in options.format
    }
    targets = {name: [options.out / file for file in of] for name, of in files.items()}
    if there := [path for paths in targets.values() for path in paths if path.exists()]:
        raise BadInput(f"{there[0]} exists already; choose another --out")
    return targets


def _tag(options: Export) -> str:
    return RunFolder(options.run).evaluation(options.split, options.checkpoint).name


def _assembly(options: Export) -> Assembly:
    folder = RunFolder(options.run)
    if not folder.recipe.is_file():
        raise BadInput(f"{options.run} is no run folder (it has no recipe.yaml)")
    scored = folder.evaluation(options.split, options.checkpoint, options.recording)
    predictions = read_predictions(scored / "predictions.npz")
    return assemble(predictions, _shards(options, folder), options.split)


def _shards(options: Export, folder: RunFolder) -> ShardFolder | None:
    """The shard folder, for what it tells of stimuli and sites; a run may outlive it."""
    if options.data is not None:
        return ShardFolder(options.data)
    try:
        return ShardFolder(_place(options, folder))
    except BadInput as fault:
        print(f"without facts about stimuli and sites: {fault}", file=sys.stderr)
        return None


def _trained(options: Export) -> Trained:
    folder, recipe = open_run(options.run)
    checkpoint = current(folder.checkpoints, options.checkpoint)
    progress = load_progress(checkpoint)
    where = options.data or _place(options, folder)
    rows = slice(None)
    if options.recording is not None:
        rows = progress.rows_of(options.recording, "--recording")
        progress = progress.of(options.recording, "--recording")
    manifest = ShardFolder(where).manifest
    progress.check_fits(manifest, str(where))
    return load_trained(recipe, checkpoint, progress, manifest, rows)


def check_recording(options: Export) -> None:
    """Refuse a run of several recordings none of which is named, and a name that is none of them.

    Raises:
        BadInput: naming them.
    """
    names = RunFolder(options.run).recordings()
    if names and options.recording not in names:
        raise BadInput(f"{options.run} was trained on {', '.join(names)}: name one of them with --recording")
    if not names and options.recording is not None:
        raise BadInput(f"--recording: {options.run} was not trained on several recordings; leave it out")


def _place(options: Export, folder: RunFolder) -> str:
    """The shard folder of the recording."""
    places = folder.data_folders()
    return places[0] if options.recording is None else places[folder.recordings().index(options.recording)]
