"""Reads the folder of a run for a report."""

from pathlib import Path

from data_prep.common.errors import BadInput
from data_prep.common.terminal import printable
from train.evaluation.ensemble_record import ENSEMBLE_FILE, read_record
from train.evaluation.metrics_file import METRICS_FILE
from train.reporting.reported_run import ReportedRun
from train.reporting.run_files import read_environment, read_history, read_metrics, read_settings
from train.run.folder import RunFolder


def read_run(path: Path, split: str, name: str, found_by: str | None = None) -> list[ReportedRun]:
    """Read a run, scored or not; a run that was scored on several recordings once for each.

    Raises:
        BadInput: it is not a run folder, or a file in it is damaged.
    """
    evaluation = RunFolder(path).evaluation(split)
    scored = [] if (evaluation / METRICS_FILE).is_file() else sorted(evaluation.glob(f"*/{METRICS_FILE}"))
    if not scored:
        return [_read_recording(path, split, name, found_by)]
    recordings = [metrics.parent.name for metrics in scored]
    return [
        _read_recording(path, split, f"{name}: {printable(recording)}", found_by, recording) for recording in recordings
    ]


def _read_recording(
    path: Path, split: str, name: str, found_by: str | None, recording: str | None = None
) -> ReportedRun:
    folder = RunFolder(path)
    metrics_file = folder.evaluation(split, recording=recording) / METRICS_FILE
    is_ensemble = (path / ENSEMBLE_FILE).is_file()
    if not path.is_dir() or not (folder.recipe.is_file() or metrics_file.is_file() or is_ensemble):
        raise BadInput(
            f"{path} is not a run folder; give folders made by train/finetune.py, train/probe.py, train/evaluate.py or "
            "train/sweep.py"
        )
    return ReportedRun(
        path=path,
        name=name,
        split=split,
        metrics=read_metrics(metrics_file) if metrics_file.is_file() else None,
        environment=read_environment(folder.env),
        settings=read_settings(folder.recipe),
        history=[_scores_of(line, recording) for line in read_history(folder.history)],
        found_by=found_by,
        recording=recording,
        ensemble=read_record(path) if is_ensemble else None,
    )


def _scores_of(epoch: dict[str, object], recording: str | None) -> dict[str, object]:
    """An epoch with the scores of one of several recordings in place of their means."""
    recordings = epoch.get("recordings")
    scores = recordings.get(recording) if isinstance(recordings, dict) else None
    if not isinstance(scores, dict):
        return epoch
    return epoch | {split: scores for split in ("inner", "val") if split in epoch}
