"""Options of sources without splits: which stimuli to hold out at random."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, Field

from data_prep.common.errors import BadInput
from data_prep.splits import Dealt, RandomDeal


class HeldOutVal(BaseModel, extra="forbid", use_attribute_docstrings=True):
    """Which stimuli are for validation, if the source has a test split."""

    val_fraction: float = Field(0.09, ge=0, lt=1)
    """Share of the training stimuli to use for validation, chosen at random."""
    group_by: str | None = None
    """Fact about the stimuli (object, category ...) whose values must not be shared between the random splits."""
    seed: int = Field(0, ge=0, le=2**63 - 1)
    """Seed of the split."""

    def _held_out(self) -> dict[str, float]:
        return {"val": self.val_fraction}

    def assign(self, meta: Sequence[dict[str, Any]], path: Path) -> Dealt:
        """Assign stimuli to splits at random.

        Args:
            meta: facts about each stimulus, `group_by` among them.
            path: of the source, for the message.

        Raises:
            BadInput: a stimulus lacks the fact to group by, or none is left to train on.
        """
        groups = None
        if self.group_by is not None:
            if any(self.group_by not in facts for facts in meta):
                known = ", ".join(sorted(set.intersection(*(set(facts) for facts in meta)))) or "none"
                raise BadInput(
                    f"{path}: --group-by {self.group_by}: not known for every stimulus; known facts: {known}"
                )
            groups = [str(facts[self.group_by]) for facts in meta]
        held_out = self._held_out()
        deal = RandomDeal({"train": 1.0 - sum(held_out.values())} | held_out, self.seed, groups)
        rule = {"seed": self.seed, "group_by": self.group_by, **held_out}
        return Dealt(deal(np.arange(len(meta))), rule, deal)

    def refuse_split_options(self, reason: str, allowed: Collection[str] = ()) -> None:
        """Refuse these options, except those `allowed`, because they would be ignored; `reason` starts the sentence."""
        for option in HeldOut.model_fields:
            field = type(self).model_fields.get(option)
            if field is not None and option not in allowed and getattr(self, option) != field.default:
                raise BadInput(f"{reason}, so --{option.replace('_', '-')} would be ignored; leave it out")


class HeldOut(HeldOutVal):
    """Which stimuli are held out, if the source has no splits."""

    val_fraction: float = Field(0.09, ge=0, lt=1)
    """Share of the stimuli for validation."""
    test_fraction: float = Field(0.10, ge=0, lt=1)
    """Share of the stimuli for testing."""

    def _held_out(self) -> dict[str, float]:
        return {"val": self.val_fraction, "test": self.test_fraction}
