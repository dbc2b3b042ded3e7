"""What a run was trained on, beside what it is scored on: stimuli, recordings, and the scale of the responses."""

from dataclasses import dataclass

import numpy as np

from data_prep.shards.manifest import Manifest, from_json_list
from train.data.seen import FITTED, SELECTED, SeenRecord

FARTHEST_MEAN, LARGEST_RATIO = 1.0, 2.0  # see `other_scale`
OTHER_SCALE = "other_scale"  # entry of metrics.json


def training_stimuli(record: SeenRecord, recording: str | None, selected_in_train: bool) -> int:
    """The number of training stimuli that a run fitted or chose its epoch on, whatever the shards are now.

    Args:
        record: of the run.
        recording: one of several that it was trained on; None counts all.
        selected_in_train: whether the stimuli that chose its epoch were part of train.
    """
    roles = (FITTED, SELECTED) if selected_in_train else (FITTED,)
    own = [part for role in roles for part in record.of_role(role) if not part.inherited_from]
    return sum(len(part.stimulus_ids) for part in own if recording in (None, part.recording))


@dataclass(frozen=True)
class ResponseScale:
    """Mean and standard deviation of each site's responses over a train split; float64 (sites,)."""

    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def of(cls, manifest: Manifest) -> "ResponseScale":
        """Of a recording; NaN for a site without training responses."""
        return cls(from_json_list(manifest.rates.mean), from_json_list(manifest.rates.std))


def other_scale(trained: ResponseScale, scored: ResponseScale) -> str:
    """In a few words, how the responses of a recording differ in scale from those that a run was trained on.

    Sites drift from day to day, so these are medians over sites: the means lie more than a standard deviation apart, or
    the standard deviations differ by more than a factor of two.

    Returns:
        "" if they are alike, or if no site varies in both.
    """
    varies = (trained.std > 0) & (scored.std > 0)  # NaN does not
    if not varies.any():
        return ""
    mean, std = trained.mean[varies], trained.std[varies]
    distance = np.median(np.abs(scored.mean[varies] - mean) / std)
    ratio = np.median(scored.std[varies] / std)
    if distance <= FARTHEST_MEAN and 1 / LARGEST_RATIO <= ratio <= LARGEST_RATIO:
        return ""
    now, before = (
        f"{np.median(scale.mean[varies]):.3g} with a standard deviation of {np.median(scale.std[varies]):.3g}"
        for scale in (scored, trained)
    )
    return f"{now} in train, by the medians over sites, not {before}"
