"""Which stimuli of a probe were fitted before they are scored: by its network, or by its own regressions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from data_prep.common.errors import BadInput
from data_prep.shards.folder import ShardFolder
from data_prep.shards.image_identity import ImageIdentities
from train.data.seen import FITTED, SeenImages, SeenRecord, images_of_split, is_among, joined
from train.data.stimuli import RecordingStimuli
from train.evaluation.seen_stimuli import Part, Seen, SeenRule
from train.probing.layer_regressions import Partition

PARTS: dict[str, Part] = {"cv": "folds"}


def images_of(shards: ShardFolder, splits: Mapping[str, RecordingStimuli]) -> ImageIdentities:
    """The images of all stimuli, one split after the other."""
    return joined([images_of_split(shards, name).at(stimuli.subset) for name, stimuli in splits.items()])


@dataclass(frozen=True)
class ProbeCheck:
    """Compares the stimuli that a probe scores with what was fitted.

    Attributes:
        ancestry: what the network has seen.
        images: of all stimuli.
        stimulus_ids: theirs.
        rule: what to do about those that were fitted.
    """

    ancestry: SeenRecord
    images: ImageIdentities
    stimulus_ids: list[str]
    rule: SeenRule

    def compare(self, partitions: Sequence[Partition]) -> tuple[list[Partition], Seen]:
        """The partitions without the held-out stimuli that are dropped, and what is known of the others.

        Raises:
            BadInput: some were fitted, which is refused, or nothing is left of a partition.
        """
        overlap = self.ancestry.overlap(self.images)
        fitted = overlap.fitted | self._fitted_in_own_partition(partitions)
        scored = np.sort(np.concatenate([partition.held_out for partition in partitions]))
        images, ids = self.images.at(scored), [self.stimulus_ids[position] for position in scored.tolist()]
        compared = self.rule.apply(self.ancestry, images, replace(overlap, fitted=fitted).at(scored), ids)
        kept = scored[compared.scored]
        partitions = [replace(part, held_out=part.held_out[np.isin(part.held_out, kept)]) for part in partitions]
        if not all(len(part.held_out) for part in partitions):
            raise BadInput(
                f"{self.rule.where}: --seen drop leaves nothing of a fold to score; take fewer folds "
                "(cross_validation.folds)"
            )
        return partitions, compared.seen

    def _fitted_in_own_partition(self, partitions: Sequence[Partition]) -> np.ndarray:
        """The held-out stimuli whose image is also among those that their partition fits: bool (stimuli,)."""
        fitted = np.zeros(len(self.stimulus_ids), bool)
        for part in partitions:
            fitted[part.held_out] = is_among(self.images.at(part.held_out), self.images.at(part.fit))
        return fitted

    def record(self, recording: str, partitions: Sequence[Partition]) -> SeenRecord:
        """What the probe has seen once it is done; with cv, every stimulus."""
        fit = np.unique(np.concatenate([part.fit for part in partitions]))
        ids = [self.stimulus_ids[position] for position in fit.tolist()]
        own = SeenImages(FITTED, recording, "", self.images.at(fit), ids)
        return SeenRecord((own,)).inheriting(self.ancestry, "weights")
