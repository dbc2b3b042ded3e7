"""What the sources that keep images and responses apart have in common."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic import BaseModel, Field

from data_prep.common.errors import BadInput
from data_prep.recording import Recording, Stimulus
from data_prep.sources.files.image_files import Loaded
from data_prep.splits import assign_splits


class HeldOutVal(BaseModel, extra="forbid", use_attribute_docstrings=True):
    """Which stimuli are for validation, where the source has a test split of its own."""

    val_fraction: float = Field(0.09, ge=0, lt=1)
    """Share of the stimuli for validation, taken at random from those for training."""
    group_by: str | None = None
    """Fact about the stimuli (object, category ...) whose values no two of the random splits may share."""
    seed: int = Field(0, ge=0, le=2**63 - 1)
    """Seed of the split."""

    def _fractions(self) -> dict[str, float]:
        return {"val": self.val_fraction}

    def deal(self, meta: Sequence[dict[str, Any]], path: Path) -> tuple[list[str], dict[str, Any]]:
        """Assign stimuli to splits at random.

        Args:
            meta: facts of each of them, of which `group_by` may be one.
            path: of the source, for the message.

        Returns:
            a split for each, and the rule for the provenance.

        Raises:
            BadInput: a stimulus lacks the fact to group by, or none is left to train on.
        """
        groups = None
        if self.group_by is not None:
            if any(self.group_by not in facts for facts in meta):
                known = ", ".join(sorted(set.intersection(*(set(facts) for facts in meta)))) or "nothing"
                raise BadInput(f"{path}: --group-by {self.group_by}: not known of every stimulus; known is {known}")
            groups = [str(facts[self.group_by]) for facts in meta]
        held_out = self._fractions()
        splits = assign_splits(len(meta), {"train": 1.0 - sum(held_out.values())} | held_out, self.seed, groups)
        return splits, {"seed": self.seed, "group_by": self.group_by, **held_out}

    def refuse_options(self, reason: str) -> None:
        """Refuse options about the split where they would be ignored; `reason` begins the sentence."""
        for option in HeldOut.model_fields:
            field = type(self).model_fields.get(option)
            if field is not None and getattr(self, option) != field.default:
                raise BadInput(f"{reason}, so --{option.replace('_', '-')} would be ignored; leave it out")


class HeldOut(HeldOutVal):
    """Which stimuli are held out, where the source has no splits."""

    val_fraction: float = Field(0.09, ge=0, lt=1)
    """Share of the stimuli for validation."""
    test_fraction: float = Field(0.10, ge=0, lt=1)
    """Share of the stimuli for testing."""

    def _fractions(self) -> dict[str, float]:
        return {"val": self.val_fraction, "test": self.test_fraction}


def objects_of(meta: Sequence[dict[str, Any]]) -> list[str] | None:
    """The object that each stimulus shows, or None where that is not known of every one."""
    return [str(facts["object"]) for facts in meta] if all("object" in facts for facts in meta) else None


class Images(Protocol):
    """Where images lie, such as `ImageFiles`."""

    def reading(self) -> AbstractContextManager[Callable[[str], Loaded]]:
        """Open for reading: a function from an image's name to the image."""


@dataclass(kw_only=True)
class PresentedRecording(Recording):
    """A recording whose images lie in files and whose responses come from elsewhere, stimulus by stimulus.

    Attributes (beside those of `Recording`):
        images: where they lie.
        image_names: each stimulus's, for `images`.
    """

    images: Images
    image_names: list[str]

    @abstractmethod
    def responses(self, indices: Sequence[int]) -> Iterator[tuple[np.ndarray | None, np.ndarray | None]]:
        """Yield rates and trials of the stimuli at `indices`, as a Stimulus has them."""

    def read(self, indices: Sequence[int]) -> Iterator[Stimulus]:
        """Yield the stimuli at `indices`; files are open while this runs, and only in the process that runs it.

        Raises:
            BadInput: an image that is missing, unreadable or absurdly large, or responses that cannot be read.
        """
        with self.images.reading() as load:
            for i, (rates, trials) in zip(indices, self.responses(indices), strict=True):
                image, encoding, note = load(self.image_names[i])
                yield Stimulus(
                    id=self.stimulus_ids[i],
                    image=image,
                    encoding=encoding,
                    rates=rates,
                    trials=trials,
                    meta=self.meta[i] | note,
                )
