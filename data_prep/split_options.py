"""Another division of a recording into splits than its source has: options of data_prep/pack.py."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from data_prep.common.errors import BadInput
from data_prep.recording import Recording, Stimulus
from data_prep.splits import assign_splits, folds

# The options that each way of dividing reads, beside `split`.
OPTIONS = {
    "source": (),
    "random": ("split_fractions", "split_seed"),
    "grouped": ("split_by", "split_fractions", "split_seed"),
    "leave-out": ("split_by", "hold_out"),
    "k-fold": ("split_by", "folds", "fold", "split_seed"),
}
SOURCES_OWN = ("val_fraction", "test_fraction", "group_by")  # options of sources that such a division replaces


class Division(BaseModel):
    """Which stimuli are held out."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    split: Literal["source", "random", "grouped", "leave-out", "k-fold"] = "source"
    """Who is held out: as the source (and its options) has it; stimuli at random; whole groups, e.g. objects; the
    groups named by --hold-out; or one of several folds."""
    split_by: str | None = None
    """What groups stimuli (object, category, a column of the table ...), for grouped, leave-out and k-fold."""
    split_fractions: tuple[float, float] = (0.09, 0.10)
    """Shares of the stimuli for val and test, for random and grouped."""
    split_seed: int = Field(0, ge=0, le=2**63 - 1)
    """Seed for random, grouped and k-fold."""
    hold_out: tuple[str, ...] = ()
    """The groups that become val, for leave-out, e.g. one category."""
    folds: int = Field(10, ge=2, le=10_000)
    """Number of folds, for k-fold."""
    fold: int = Field(1, ge=1, le=10_000)
    """Which fold becomes val, counted from 1, for k-fold."""

    def open(self, source: Any) -> Recording:
        """Open a source, and divide its recording otherwise where that is asked for.

        Args:
            source: the options of one of `data_prep/sources`.

        Raises:
            BadInput: options that this way of dividing would ignore, facts that the source does not know, or a
                division that leaves nothing to train on or to hold out.
        """
        self._check(source)
        recording = source.open()
        if self.split == "source":
            return recording
        known = _with_responses(recording)
        groups = None if self.split_by is None else _facts(recording, self.split_by)
        if groups is not None:
            groups = [groups[i] for i in known]
        splits = self._splits(len(known), groups, recording.name)
        return DividedRecording(recording, known, splits, self.split_by, self._rule())

    def _check(self, source: BaseModel) -> None:
        defaults = type(self).model_fields
        for name in ("split_by", "split_fractions", "split_seed", "hold_out", "folds", "fold"):
            if name not in OPTIONS[self.split] and getattr(self, name) != defaults[name].default:
                raise BadInput(f"{_flag(name)} would be ignored with --split {self.split}; leave it out")
        if self.split == "source":
            return
        for name, field in type(source).model_fields.items():
            if name in SOURCES_OWN and getattr(source, name) != field.default:
                raise BadInput(
                    f"{_flag(name)} would be ignored with --split {self.split}; use --split-fractions and --split-by"
                )
        if self.split in ("grouped", "leave-out") and self.split_by is None:
            raise BadInput(f"--split {self.split} needs --split-by, e.g. --split-by object")
        if self.split == "leave-out" and not self.hold_out:
            raise BadInput("--split leave-out needs --hold-out, the groups that are to be held out")
        if self.split == "k-fold" and self.fold > self.folds:
            raise BadInput(f"--fold {self.fold}: there are {self.folds} folds, counted from 1 (--folds)")

    def _splits(self, n: int, groups: list[str] | None, name: str) -> list[str]:
        if self.split in ("random", "grouped"):
            val, test = self.split_fractions
            return assign_splits(n, {"train": 1 - val - test, "val": val, "test": test}, self.split_seed, groups)
        if self.split == "leave-out":
            if absent := set(self.hold_out) - set(groups):
                raise BadInput(f"--hold-out {min(absent)}: no such {self.split_by} in {name}; it has {_some(groups)}")
            held_out = np.isin(groups, self.hold_out)
        else:
            labels = np.arange(n) if groups is None else np.array(groups)
            if len(np.unique(labels)) < self.folds:
                raise BadInput(f"--folds {self.folds}: {name} has only {len(np.unique(labels))} groups or stimuli")
            held_out = np.zeros(n, bool)
            held_out[folds(labels, self.folds, self.split_seed)[self.fold - 1]] = True
        if held_out.all():
            raise BadInput(f"--hold-out: {', '.join(self.hold_out)} is all that {name} has; leave some to train on")
        return np.where(held_out, "val", "train").tolist()

    def _rule(self) -> dict[str, Any]:
        """What the manifest says of how the stimuli were divided."""
        return {"method": self.split} | {name: getattr(self, name) for name in OPTIONS[self.split]}


class DividedRecording(Recording):
    """A recording, or the part of it that has responses, with other splits.

    Args:
        recording: as its source delivers it.
        positions: of the stimuli to keep, ascending.
        splits: of those.
        group_by: the fact that keeps stimuli together.
        rule: how the splits came about, for the manifest.
    """

    def __init__(
        self, recording: Recording, positions: list[int], splits: list[str], group_by: str | None, rule: dict[str, Any]
    ):
        self._recording, self._positions = recording, positions
        for name in ("name", "simulated", "sites", "response_window_ms", "units", "truth"):
            setattr(self, name, getattr(recording, name))
        self.stimulus_ids = [recording.stimulus_ids[i] for i in positions]
        self.objects = None if recording.objects is None else [recording.objects[i] for i in positions]
        self.meta = None if recording.meta is None else [recording.meta[i] for i in positions]
        self.splits, self.group_by = splits, group_by
        self.provenance = recording.provenance | {"split": rule}
        if left := len(recording.stimulus_ids) - len(positions):
            warning = f"{left} stimuli without responses were left out of the division"
            self.provenance["warnings"] = [*recording.provenance.get("warnings", []), warning]

    def read(self, indices: Sequence[int]) -> Iterator[Stimulus]:
        """See `Recording.read`."""
        return self._recording.read([self._positions[i] for i in indices])


def _with_responses(recording: Recording) -> list[int]:
    """The stimuli of splits that have responses."""
    known = [i for i in range(len(recording.splits)) if recording.has_responses(i)]
    if not known:
        raise BadInput(f"{recording.name}: no stimulus has responses; there is nothing to divide")
    return known


def _facts(recording: Recording, key: str) -> list[str]:
    """A fact about every stimulus, as text."""
    if recording.meta is not None:
        values = [facts.get(key) for facts in recording.meta]
    else:
        values = recording.objects if key == "object" and recording.objects else [None]
    if None in values:
        known = sorted(set().union(*(recording.meta or []))) or (["object"] if recording.objects else ["nothing"])
        raise BadInput(
            f"--split-by {key}: {recording.name} does not tell it of every stimulus; it knows {_some(known)}"
        )
    return [str(value) for value in values]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _some(names: Sequence[str]) -> str:
    names = sorted(set(names))
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
