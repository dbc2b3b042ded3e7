"""Scored stimuli that were seen before: refused, dropped or kept, and marked in metrics.json and in every table."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from data_prep.common.errors import BadInput
from data_prep.common.terminal import printable
from data_prep.shards.image_identity import ImageIdentities
from train.data.seen import FITTED, SELECTED, Overlap, SeenRecord, is_among, joined
from train.evaluation.options import SeenPolicy
from train.run.recipe import MOST_STIMULI

NAMED = 5  # stimuli that a message names
UNSEEN = "none"  # the mark of a score without a stimulus that was seen before
NO_RECORD = "what it was fitted on: an earlier version trained it"
Part = Literal["train", "left_out", "folds"]
PARTS_WITH_LEAKS = ("train", "left_out")
Count = Annotated[int, Field(ge=0, le=MOST_STIMULI)]
Text = Annotated[str, AfterValidator(printable)]


class Seen(BaseModel):
    """The `seen` block of metrics.json: which of the scored stimuli were seen before, by the content of their images.

    Attributes:
        fitted: that the network or regression was fitted on, itself or through the weights and members it is made of.
        taught: that only its teacher was fitted on.
        selected: that chose an epoch.
        dropped: fitted or taught, and left out of the score (--seen drop).
        stimuli: the first that were fitted or taught and are scored.
        part: what is scored, if not held-out stimuli: train; left_out, of which some may be taught; or folds, each of
            which is predicted by a fit on the others.
        unknown: origins of which nobody knows what was seen; the counts above leave them out.
        pretrained: networks whose published weights it began with; what these were trained on is not compared.
    """

    model_config = ConfigDict(extra="ignore")

    fitted: Count = 0
    taught: Count = 0
    selected: Count = 0
    dropped: Count = 0
    stimuli: list[Text] = []
    part: Part | None = None
    unknown: list[Text] = []
    pretrained: list[Text] = []

    def content(self) -> dict[str, object]:
        """The block as it is written: counts always, other entries where there is something to say."""
        counts = ("fitted", "taught", "selected", "dropped")
        return self.model_dump(include={*counts}) | self.model_dump(exclude={*counts}, exclude_defaults=True)

    @property
    def leaks(self) -> int:
        """Scored stimuli that flatter the score."""
        return 0 if self.part in PARTS_WITH_LEAKS else self.fitted + self.taught

    @property
    def mark(self) -> str:
        """The block in a few words, for a table."""
        if self.part == "train":
            dropped = f", {self.dropped:,} dropped" if self.dropped else ""
            return f"train: {self.fitted:,} fitted{dropped}"
        words = []
        if self.leaks:
            words.append(f"{self.leaks:,} KEPT")
        if self.dropped:
            words.append(f"{self.dropped:,} dropped")
        if self.part == "left_out":
            words.append("left out")
        if self.part == "folds":
            words.append("out of fold")
        if self.unknown:
            words.append("unknown")
        return ", ".join(words) or UNSEEN


def seen_in(metrics: Mapping[str, Any]) -> Seen | None:
    """The block of a metrics.json that this program wrote; None in files of earlier versions."""
    return Seen.model_validate(metrics["seen"]) if "seen" in metrics else None


def mark_of(seen: Seen | None) -> str:
    """The mark of a table for what metrics.json says; files of earlier versions say nothing."""
    return "unknown" if seen is None else seen.mark


def selected_on(splits: Iterable[str], split: str, seen: Seen) -> list[str]:
    """The entry `selected_on` of metrics.json: also the scored split, if some of its stimuli chose something.

    Args:
        splits: that chose the epoch.
        split: that is scored.
        seen: which of its stimuli were seen.
    """
    scored = [split] if seen.selected and split in ("val", "test") else []
    return list(dict.fromkeys([*splits, *scored]))


class NothingLeftOut(BadInput):
    """A run that has no training stimuli of which it is known that it was not fitted on them."""


@dataclass(frozen=True)
class Comparison:
    """Scored stimuli compared with a record.

    Attributes:
        scored: which of them are to be scored, bool (stimuli,).
        seen: the block of metrics.json about those.
    """

    scored: np.ndarray
    seen: Seen


@dataclass(frozen=True)
class SeenRule:
    """What to do about stimuli that were seen before.

    Attributes:
        where: the folder that is scored, for messages.
        split: of the stimuli, for messages.
        policy: of --seen.
        part: what is scored, if not held-out stimuli.
    """

    where: str
    split: str
    policy: SeenPolicy
    part: Part | None = None

    @property
    def _refuses_leaks(self) -> bool:
        return self.policy == "refuse" and self.part not in PARTS_WITH_LEAKS

    def compare(self, record: SeenRecord | None, images: ImageIdentities, stimulus_ids: list[str]) -> Comparison:
        """Compare stimuli with what a predictor has seen.

        Args:
            record: of the predictor; None if it has none.
            images: of the stimuli.
            stimulus_ids: theirs.

        Raises:
            BadInput: some were fitted, which the policy refuses, or all, so that none is left.
        """
        known = record or SeenRecord(unknown=(NO_RECORD,))
        return self.apply(known, images, known.overlap(images), stimulus_ids)

    def apply(
        self, record: SeenRecord, images: ImageIdentities, overlap: Overlap, stimulus_ids: list[str]
    ) -> Comparison:
        """`compare` for an overlap that is known already."""
        leaks, count = overlap.leaks, len(stimulus_ids)
        scored = ~leaks if self.policy == "drop" else np.ones(count, bool)
        if not scored.any() or (leaks.any() and self._refuses_leaks):
            raise BadInput(self._refusal(record, images, leaks, stimulus_ids))
        left = overlap.at(scored)
        named = np.flatnonzero(scored & leaks)[: 0 if self.part in PARTS_WITH_LEAKS else NAMED]
        seen = Seen(
            fitted=int(left.fitted.sum()),
            taught=int((left.taught & ~left.fitted).sum()),
            selected=int(left.selected.sum()),
            dropped=int(count - scored.sum()),
            stimuli=[stimulus_ids[position] for position in named],
            part=self.part,
            unknown=list(record.unknown),
            pretrained=list(record.pretrained),
        )
        return Comparison(scored, seen)

    def _refusal(self, record: SeenRecord, images: ImageIdentities, leaks: np.ndarray, stimulus_ids: list[str]) -> str:
        rows = np.flatnonzero(leaks)
        names = ", ".join(stimulus_ids[row] for row in rows[:NAMED]) + (", ..." if len(rows) > NAMED else "")
        origins = record.origins(images.at(rows))
        by = f" by {' and '.join(origins)}" if origins else ""
        fact = f"{self.where}: {len(rows):,} of the {len(leaks):,} stimuli of {self.split} were fitted before{by}"
        fact = f"{fact}, going by their images ({names})"
        if len(rows) == len(leaks):
            return f"{fact}; nothing is left to score" if self.policy == "drop" else f"{fact}; --seen keep scores them"
        return (
            f"{fact}; --seen drop scores the other {len(leaks) - len(rows):,}, --seen keep scores all, and either is "
            "marked"
        )


def left_out_of(record: SeenRecord | None, run: str, recording: str | None, train: ImageIdentities) -> np.ndarray:
    """The training stimuli that a run held back to choose its epoch, and that no part of its network was fitted on.

    Args:
        record: of the run.
        run: its folder, for messages.
        recording: one of several that it was trained on; else None.
        train: images of the train split as it is now.

    Returns:
        Positions, ascending.

    Raises:
        NothingLeftOut: the run has no record, or none of these stimuli are there.
    """
    if record is None:
        raise NothingLeftOut(
            f"{run} has no record of what it was fitted on (an earlier version trained it), so what it left out is "
            "not known; train it again"
        )
    own = [part for part in record.of_role(SELECTED) if not part.inherited_from and recording in (None, part.recording)]
    fitted = joined([part.images for part in record.of_role(FITTED)])
    positions = np.flatnonzero(is_among(train, joined([part.images for part in own])) & ~is_among(train, fitted))
    if not len(positions):
        raise NothingLeftOut(
            f"{run} left out none of these training stimuli: it, or its weights, were fitted on all of them"
        )
    return positions
