"""The options of pack.py for which stimuli are held out, and a recording with the splits that they ask for."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from data_prep.common.errors import BadInput
from data_prep.recording import Deal, Recording, Stimulus
from data_prep.splits import Dealt, FoldDeal, OrderedDeal, RandomDeal

# The options that each kind of split uses, besides `split`.
_OPTIONS_OF = {
    "source": (),
    "random": ("split_fractions", "split_seed"),
    "grouped": ("split_by", "split_fractions", "split_seed"),
    "ordered": ("split_fractions",),
    "leave-out": ("split_by", "hold_out"),
    "k-fold": ("split_by", "folds", "fold", "split_seed"),
}
_REPLACED_OPTIONS = ("val_fraction", "test_fraction", "group_by")  # of the sources


class RecordingSource(Protocol):
    """The options of one of `data_prep/sources`."""

    def open(self) -> Recording:
        """Open the recording."""
        ...


class SplitOptions(BaseModel):
    """Which stimuli are held out."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    split: Literal["source", "random", "grouped", "ordered", "leave-out", "k-fold"] = "source"
    """How stimuli are held out: as the source and its options define; individual stimuli at random; whole groups at
    random, such as objects; the last ones in the source's order (`--split-fractions 0 0.5`: the first half is train,
    the second test); the groups named by --hold-out; or one of several folds."""
    split_by: str | None = None
    """The fact that groups stimuli (object, category, a table column ...), for grouped, leave-out and k-fold."""
    split_fractions: tuple[float, float] = (0.09, 0.10)
    """Shares of the stimuli for val and test, for random, grouped and ordered."""
    split_seed: int = Field(0, ge=0, le=2**63 - 1)
    """Seed for random, grouped and k-fold."""
    hold_out: tuple[str, ...] = ()
    """The groups that become val, such as one category, for leave-out."""
    folds: int = Field(10, ge=2, le=10_000)
    """Number of folds, for k-fold."""
    fold: int = Field(1, ge=1, le=10_000)
    """Which fold becomes val, counted from 1, for k-fold."""

    def open_recording(self, source: RecordingSource) -> Recording:
        """Open a source, and split its recording differently if these options ask for it.

        Raises:
            BadInput: options that this kind of split would ignore, a fact that is not known for every stimulus, or a
                split that leaves nothing to train on or to hold out.
        """
        self._check()
        if self.split == "source":
            return source.open()
        _check_replaced(source, self.split)
        recording = source.open()
        positions = _with_responses(recording)
        groups = None
        if self.split_by is not None:
            facts = _facts(recording, self.split_by)
            groups = [facts[position] for position in positions]
        return DividedRecording(
            recording, positions, self._divide(len(positions), groups, recording.name), self.split_by
        )

    def _check(self) -> None:
        for name in ("split_by", "split_fractions", "split_seed", "hold_out", "folds", "fold"):
            is_set = getattr(self, name) != type(self).model_fields[name].default
            if is_set and name not in _OPTIONS_OF[self.split]:
                raise BadInput(f"{_flag(name)} would be ignored with --split {self.split}; leave it out")
        if self.split in ("grouped", "leave-out") and self.split_by is None:
            raise BadInput(f"--split {self.split} needs --split-by, e.g. --split-by object")
        if self.split == "leave-out" and not self.hold_out:
            raise BadInput("--split leave-out needs --hold-out: the groups to hold out")
        if self.split == "k-fold" and self.fold > self.folds:
            raise BadInput(f"--fold {self.fold}: must be 1 to {self.folds}, the number of --folds")

    def _divide(self, n: int, groups: list[str] | None, name: str) -> Dealt:
        rule = {"method": self.split} | {name: getattr(self, name) for name in _OPTIONS_OF[self.split]}
        if self.split == "leave-out":
            assert groups is not None, "leave-out needs --split-by"
            return Dealt(np.where(self._left_out(groups, name), "val", "train").tolist(), rule)
        deal = self._deal(groups, name)
        return Dealt(deal(np.arange(n)), rule, deal)

    def _deal(self, groups: list[str] | None, name: str) -> Deal:
        if self.split == "k-fold":
            return FoldDeal(self.folds, self.fold, self.split_seed, groups, name)
        val, test = self.split_fractions
        fractions = {"train": 1 - val - test, "val": val, "test": test}
        return OrderedDeal(fractions) if self.split == "ordered" else RandomDeal(fractions, self.split_seed, groups)

    def _left_out(self, groups: list[str], name: str) -> np.ndarray:
        """Which stimuli belong to the groups of --hold-out: bool (stimuli,)."""
        unknown = set(self.hold_out) - set(groups)
        if unknown:
            raise BadInput(f"--hold-out {min(unknown)}: {name} has no such {self.split_by}; it has {_listed(groups)}")
        held_out = np.isin(groups, self.hold_out)
        if held_out.all():
            raise BadInput(f"--hold-out {' '.join(self.hold_out)} covers all of {name}; leave some to train on")
        return held_out


class DividedRecording(Recording):
    """A recording, or the part of it that has responses, with new splits.

    Args:
        recording: as its source delivers it.
        positions: of the stimuli to keep, ascending.
        dealt: the splits, one per position.
        group_by: the fact that keeps stimuli together.
    """

    def __init__(self, recording: Recording, positions: list[int], dealt: Dealt, group_by: str | None):
        super().__init__(
            name=recording.name,
            simulated=recording.simulated,
            sites=recording.sites,
            response_window_ms=recording.response_window_ms,
            units=recording.units,
            truth=recording.truth,
            stimulus_ids=[recording.stimulus_ids[position] for position in positions],
            objects=None if recording.objects is None else [recording.objects[position] for position in positions],
            meta=None if recording.meta is None else [recording.meta[position] for position in positions],
            splits=dealt.splits,
            deal=dealt.deal,
            group_by=group_by,
            provenance=recording.provenance | {"split": dealt.rule},
        )
        self._recording, self._positions = recording, positions
        left_out = len(recording.stimulus_ids) - len(positions)
        if left_out:
            warning = f"{left_out} stimuli without responses were left out"
            self.provenance["warnings"] = [*recording.provenance.get("warnings", []), warning]

    def read(self, indices: Sequence[int]) -> Iterator[Stimulus]:
        """See `Recording.read`."""
        return self._recording.read([self._positions[index] for index in indices])


def _check_replaced(source: RecordingSource, split: str) -> None:
    """Refuse options of a source that this kind of split would ignore."""
    for name in _REPLACED_OPTIONS:
        field = type(source).model_fields.get(name) if isinstance(source, BaseModel) else None
        if field is not None and getattr(source, name) != field.default:
            raise BadInput(f"{_flag(name)} would be ignored with --split {split}; use --split-fractions and --split-by")


def _with_responses(recording: Recording) -> list[int]:
    """The positions of the stimuli in splits that have responses."""
    positions = [position for position in range(len(recording.splits)) if recording.has_responses(position)]
    if not positions:
        raise BadInput(f"{recording.name}: no stimulus has responses; there is nothing to split")
    return positions


def _facts(recording: Recording, name: str) -> list[str]:
    """A fact about every stimulus, as text."""
    values: Sequence[Any]
    if recording.meta is not None:
        values = [facts.get(name) for facts in recording.meta]
        known = sorted(set().union(*recording.meta))
    else:
        values = recording.objects if name == "object" and recording.objects else [None]
        known = ["object"] if recording.objects else []
    if None in values:
        raise BadInput(
            f"--split-by {name}: not known for every stimulus of {recording.name}; known facts: "
            f"{_listed(known) or 'none'}"
        )
    return [str(value) for value in values]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _listed(names: Sequence[str]) -> str:
    distinct = sorted(set(names))
    ending = ", ..." if len(distinct) > 8 else ""
    return ", ".join(distinct[:8]) + ending
