"""The single trials of what was scored, read from the shards that the runs were made from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.common.errors import BadInput
from data_prep.common.terminal import printable
from data_prep.remote.url import FolderUrl, parse_location
from data_prep.shards.folder import ShardFolder
from train.evaluation.comparison import ScoredPredictions
from train.evaluation.ensemble_record import shard_folders_of
from train.evaluation.power.trials import Trials
from train.reporting.groups import Group

MOST_BYTES = 2**29  # of the trials that are read
MOST_REPETITIONS = 10_000  # of a stimulus


@dataclass(frozen=True)
class RecordedTrials:
    """Trials, or why there are none.

    Attributes:
        trials: of the scored stimuli; None without.
        source: where they were read, or why they are not known, for a sentence.
    """

    trials: Trials | None
    source: str


class _Unusable(Exception):
    """A shard folder does not tell the trials of what was scored; the text says why."""


def trials_of(group: Group, data: Sequence[str] | None = None) -> RecordedTrials:
    """The trials of the stimuli that a group's runs were scored on.

    Args:
        group: of runs.
        data: shard folders or their URLs, of which one holds the recording; by default those on this machine that the
            runs were made from. Addresses in a run folder are not followed: they may be a stranger's.
    """
    scored = next(
        (run.run.predictions for run, paired in zip(group.runs, group.is_paired, strict=True) if paired), None
    )
    if scored is None:
        return RecordedTrials(None, "no run has predictions")
    reasons = []
    for location in _locations(group) if data is None else data:
        try:
            trials = Trials.of(_read(location, scored))
            if trials is None:
                raise _Unusable(printable(f"{location} has one trial of most stimuli, or none of some"))
            return RecordedTrials(trials, printable(str(location)))
        except _Unusable as reason:
            reasons.append(str(reason))
        except (BadInput, OSError) as error:
            reasons.append(printable(f"{location} cannot be read ({error})"))
    return RecordedTrials(None, reasons[0] if reasons else "the runs do not say which shards they were made from")


def _locations(group: Group) -> list[str]:
    found: dict[str, None] = {}
    for scored in group.runs:
        try:
            folders = shard_folders_of(scored.run.path)
        except (BadInput, OSError):
            continue
        found |= dict.fromkeys(folder for folder in folders if not isinstance(parse_location(folder), FolderUrl))
    return list(found)


def _read(location: str, scored: ScoredPredictions) -> np.ndarray:
    """The trials, float32 (stimuli, repetitions, sites), NaN = missing.

    Raises:
        _Unusable: there are none, or they are not those that were scored.
        BadInput, OSError: the folder cannot be read.
    """
    if isinstance(parse_location(location), Path) and not Path(location).is_dir():
        raise _Unusable(printable(f"{location} is not there"))
    folder = ShardFolder(location)
    if folder.manifest.site_ids != list(scored.site_ids):
        raise _Unusable(printable(f"{location} has other sites"))
    by_stimulus: dict[str, np.ndarray] = {}
    wanted, size = set(scored.stimulus_ids), 0
    for name, content in folder.manifest.splits.items():
        split = folder.split(name)
        if not content.responses or not split.trials_bytes:
            continue
        for position, stimulus in enumerate(split.stimulus_ids):
            trials = split.array(position, "trials.npy") if stimulus in wanted else None
            if trials is None:
                continue
            by_stimulus[stimulus] = trials
            size += trials.nbytes
            if size > MOST_BYTES or len(trials) > MOST_REPETITIONS:
                raise _Unusable(printable(f"the trials in {location} are too large to be planned from"))
    if not by_stimulus:
        raise _Unusable(printable(f"{location} has no single trials"))
    if len(by_stimulus) < len(wanted):
        raise _Unusable(printable(f"{location} has trials of {len(by_stimulus)} of the {len(wanted)} scored stimuli"))
    return _checked([by_stimulus[stimulus] for stimulus in scored.stimulus_ids], location, scored)


def _checked(by_stimulus: Sequence[np.ndarray], location: str, scored: ScoredPredictions) -> np.ndarray:
    trials = np.full((len(by_stimulus), max(map(len, by_stimulus)), len(scored.site_ids)), np.nan, np.float32)
    if trials.nbytes > MOST_BYTES:
        raise _Unusable(printable(f"the trials in {location} are too large to be planned from"))
    for row, values in enumerate(by_stimulus):
        trials[row, : len(values)] = values
    recorded = ~np.isnan(trials)
    with np.errstate(invalid="ignore"):
        average = np.where(recorded, trials, 0).sum(axis=1, dtype=np.float64) / recorded.sum(axis=1)
    fitted = ~np.isnan(scored.response)
    if not np.isclose(average[fitted], scored.response[fitted], rtol=1e-4, atol=1e-5).all():
        raise _Unusable(printable(f"what was scored is not the average of the trials in {location}"))
    return trials
