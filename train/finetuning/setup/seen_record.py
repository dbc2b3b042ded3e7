"""RUN/seen.npz: which images a run is fitted on and selected on, written before its first checkpoint."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_prep.common.errors import BadInput
from data_prep.shards.folder import ShardFolder
from data_prep.shards.image_identity import ImageIdentities
from train.data.seen import (
    FITTED,
    SELECTED,
    TAUGHT,
    SeenImages,
    SeenRecord,
    images_of_split,
    inherited_record,
    is_among,
    joined,
    record_of,
)
from train.data.stimuli import RecordingStimuli
from train.finetuning.setup.preparation import PreparedRun
from train.finetuning.setup.resume import StartingPoint
from train.models.inherited_record import record_of_weights
from train.run.recipe import Recipe

NAMED = 3  # stimuli that a message names


def record_of_run(run: PreparedRun, start: StartingPoint) -> SeenRecord:
    """The record of a run that begins, or that of one that resumes, checked and extended; for one process only.

    Raises:
        BadInput: the run that resumes was fitted on images that select now, or the other way round; or the record of
            the weights or of the teacher is damaged.
    """
    now = _own_record(run)
    before = None if start.is_fresh else record_of(run.folder.path)
    if before is not None:
        _check_same_sides(run.folder.path, before, now)
        record = before.adding(*now.parts)
    else:
        record = _with_ancestors(now, run.recipe)
        if not start.is_fresh:
            earlier = f"{run.folder.path} up to step {start.progress.step} (it had no record)"
            record = replace(record, unknown=(*record.unknown, earlier))
    return record


def _own_record(run: PreparedRun) -> SeenRecord:
    """What the run itself fits and selects on."""
    data = run.data
    parts = []
    for role, stimuli in ((FITTED, data.fit), (SELECTED, data.selection)):
        for folder, recording in zip(data.recordings.folders, stimuli.recordings, strict=True):
            parts.append(SeenImages(role, recording.name, "", _images(folder, recording), recording.stimulus_ids))
    return SeenRecord(tuple(parts))


def fitted_images(run: PreparedRun) -> ImageIdentities:
    """The images of the stimuli to fit, one recording after the other."""
    pairs = zip(run.data.recordings.folders, run.data.fit.recordings, strict=True)
    return joined([_images(folder, recording) for folder, recording in pairs])


def _images(folder: ShardFolder, stimuli: RecordingStimuli) -> ImageIdentities:
    return images_of_split(folder, stimuli.split.name).at(stimuli.subset)


def _with_ancestors(record: SeenRecord, recipe: Recipe) -> SeenRecord:
    """The record and those of the weights and the teacher."""
    weights, teacher = record_of_weights(recipe.backbone), recipe.distill.teacher
    record = record.inheriting(weights, f"weights {recipe.backbone.weights}")
    if teacher is not None:
        record = record.inheriting(inherited_record(Path(teacher)), f"teacher {teacher}", {FITTED: TAUGHT})
    return record


def _check_same_sides(run: Path, before: SeenRecord, now: SeenRecord) -> None:
    """Refuse to resume where fitted images now select, or the other way round: the stimuli were divided differently."""
    for was, role in ((SELECTED, FITTED), (FITTED, SELECTED)):
        for part in now.of_role(role):
            is_new = ~is_among(part.images, _own(before, role))
            moved = np.flatnonzero(is_among(part.images, _own(before, was)) & is_new)
            if len(moved):
                names = ", ".join(part.stimulus_ids[row] for row in moved[:NAMED])
                raise BadInput(
                    f"{run}: {len(moved):,} stimuli that were {was} until now would be {role} ({names}): they have "
                    "been divided differently; resume with the shards, and the version, that the run began with"
                )


def _own(record: SeenRecord, role: str) -> ImageIdentities:
    return joined([part.images for part in record.of_role(role) if not part.inherited_from])


# ------------------------------------------------------------------------------------------------------------- notes


def notes_on_seen(run: PreparedRun, record: SeenRecord) -> list[str]:
    """Held-out and selecting stimuli that were fitted: their scores will be refused, or flatter. For the log."""
    notes = []
    for where, images in _not_fitted(run):
        seen = record.overlap(images).leaks
        if seen.any():
            origins = record.origins(images.at(seen))
            by, count = f" by {' and '.join(origins)}" if origins else "", int(seen.sum())
            notes.append(
                f"warning: {count:,} of the {len(seen):,} stimuli of {where} show images that are fitted{by}: scores "
                "on them tell of memory, and train/evaluate.py refuses them unless told otherwise (--seen)"
            )
    return notes


def _not_fitted(run: PreparedRun) -> Iterator[tuple[str, ImageIdentities]]:
    """The stimuli that select, and each held-out split of each recording."""
    folders: Sequence[ShardFolder] = run.data.recordings.folders
    for folder, selecting in zip(folders, run.data.selection.recordings, strict=True):
        if selecting.split.name == "train":
            yield f"{selecting.name} that select", _images(folder, selecting)
        for name in folder.manifest.splits:
            if name != "train":
                yield f"{folder.manifest.name}, {name}", images_of_split(folder, name)
