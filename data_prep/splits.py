"""Which stimuli are held out: at random, by whole groups, or in folds; and pack's options for that."""

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from data_prep.common.errors import BadInput
from data_prep.recording import SPLITS, Deal, Recording, Stimulus


def assign_splits(
    n: int, fractions: Mapping[str, float], seed: int, groups: Sequence[str] | np.ndarray | None = None
) -> list[str]:
    """Assign each of `n` stimuli to a split at random.

    The stimuli are permuted by `numpy.random.default_rng(seed).permutation`; the first floor(val * n) go to val, the
    next floor(test * n) to test, the rest to train. With `groups`, whole groups are permuted and assigned in the same
    way until a split has its share, so no group straddles two splits.

    Args:
        n: number of stimuli.
        fractions: share of each split; they must add up to 1.
        seed: of the permutation.
        groups: a group name per stimulus, or None.

    Raises:
        BadInput: fractions that are negative, unknown or do not add up to 1, or that leave no training stimuli.
    """
    if unknown := set(fractions) - set(SPLITS):
        raise BadInput(f"split fractions: unknown split {sorted(unknown)[0]!r}; use {', '.join(SPLITS)}")
    if not all(share >= 0 for share in fractions.values()) or not abs(sum(fractions.values()) - 1) < 1e-6:
        raise BadInput(f"split fractions must not be negative and must add up to 1, not {dict(fractions)}")
    names = np.arange(n) if groups is None else np.asarray(groups)
    _, group_of = np.unique(names, return_inverse=True)
    sizes = np.bincount(group_of)
    split_of_group = np.full(len(sizes), "train", dtype=object)
    remaining = deque(np.random.default_rng(seed).permutation(len(sizes)))
    for split in ("val", "test"):
        room = int(fractions.get(split, 0.0) * n + 1e-9)
        while room > 0 and remaining:
            group = remaining.popleft()
            split_of_group[group] = split
            room -= sizes[group]
    splits = [str(split) for split in split_of_group[group_of]]
    if "train" not in splits:
        raise BadInput(f"split fractions {dict(fractions)} leave none of {n} stimuli ({len(sizes)} groups) to train on")
    return splits


@dataclass(frozen=True)
class RandomDeal:
    """A deal by `assign_splits`, see `Deal`.

    Attributes:
        fractions: share of each split.
        seed: of the permutation.
        groups: a group name per stimulus, or None.
    """

    fractions: Mapping[str, float]
    seed: int
    groups: Sequence[str] | None = None

    def __call__(self, copies: np.ndarray) -> list[str]:
        """See `Deal`."""
        return assign_splits(len(copies), self.fractions, self.seed, with_copies(self.groups, copies))


@dataclass(frozen=True)
class FoldDeal:
    """A deal that holds out one of several folds as val, see `Deal`.

    Attributes:
        folds: their number.
        fold: the one held out, counted from 1.
        seed: of the division.
        groups: a group name per stimulus, or None.
        name: of the recording, for the message.
    """

    folds: int
    fold: int
    seed: int
    groups: Sequence[str] | None
    name: str

    def __call__(self, copies: np.ndarray) -> list[str]:
        """See `Deal`."""
        groups = with_copies(self.groups, copies)
        labels = np.arange(len(copies)) if groups is None else np.asarray(groups)
        count = len(np.unique(labels))
        if count < self.folds:
            raise BadInput(f"--folds {self.folds}: {self.name} has only {count} groups or stimuli")
        held_out = np.zeros(len(labels), bool)
        held_out[folds(labels, self.folds, self.seed)[self.fold - 1]] = True
        return np.where(held_out, "val", "train").tolist()


@dataclass(frozen=True)
class PartialDeal:
    """A deal of some stimuli of a recording; the source gives the split of the others.

    Attributes:
        deal: of these stimuli.
        positions: theirs, ascending.
        splits: of all stimuli, before.
    """

    deal: Deal
    positions: Sequence[int]
    splits: Sequence[str]

    def __call__(self, copies: np.ndarray) -> list[str]:
        """See `Deal`."""
        splits = list(self.splits)
        dealt = self.deal(merged_groups(copies[list(self.positions)]))
        for position, split in zip(self.positions, dealt, strict=True):
            splits[position] = split
        return splits


@dataclass(frozen=True)
class Dealt:
    """Splits that a source gives or that were dealt at random.

    Attributes:
        splits: one per stimulus.
        rule: how they were made, for the manifest.
        deal: how to deal them again; None where the source gives them.
    """

    splits: list[str]
    rule: Any
    deal: Deal | None = None

    def within(self, splits: Sequence[str], positions: Sequence[int]) -> "Dealt":
        """The splits of a whole recording, of which these are the stimuli at `positions`.

        Args:
            splits: of all stimuli as the source gives them; those at `positions` are replaced.
            positions: ascending.
        """
        whole = list(splits)
        for position, split in zip(positions, self.splits, strict=True):
            whole[position] = split
        return Dealt(whole, self.rule, None if self.deal is None else PartialDeal(self.deal, positions, whole))


def with_copies(groups: Sequence[str] | np.ndarray | None, copies: np.ndarray) -> Sequence[str] | np.ndarray | None:
    """Groups of stimuli, merged where copies of an image are in several; as they are where none is.

    Args:
        groups: a label per stimulus; None if each is a group of its own.
        copies: for each stimulus, the position of the first one with the same image.
    """
    if groups is None:
        return None if np.array_equal(copies, np.arange(len(copies))) else copies
    merged = merged_groups(np.asarray(groups), copies)
    return groups if len(np.unique(merged)) == len(np.unique(groups)) else merged


def grouping_facts(group_by: str | None) -> tuple[str, ...]:
    """The facts about stimuli whose groups are checked for straddling splits."""
    return ("object",) if group_by in (None, "object") else ("object", group_by)


def straddling(groups: Mapping[str, Sequence[Mapping[str, set[str]]]]) -> dict[str, dict[str, int]]:
    """Count the groups with stimuli both in train and in a held-out split.

    Args:
        groups: per split, for each of its shards, the values of each fact that occur there.

    Returns:
        For each fact with such groups, how many there are of how many: `{"object": {"groups": 3, "of": 64}}`.
    """
    train: dict[str, set[str]] = defaultdict(set)
    held_out: dict[str, set[str]] = defaultdict(set)
    for split, shards in groups.items():
        values_of = train if split == "train" else held_out
        for shard in shards:
            for fact, values in shard.items():
                values_of[fact] |= values
    return {
        fact: {"groups": len(values & held_out[fact]), "of": len(values | held_out[fact])}
        for fact, values in train.items()
        if values & held_out[fact]
    }


def merged_groups(*labels: np.ndarray) -> np.ndarray:
    """Groups of stimuli that have any label in common, directly or through others: for each, its first position.

    Args:
        labels: one or more arrays with a label per stimulus (stimuli,).

    Returns:
        For each stimulus, the position of the first one of its group, int64 (stimuli,).
    """
    first = np.arange(len(labels[0]))
    numbered = [np.unique(of_stimuli, return_inverse=True)[1] for of_stimuli in labels]
    while True:
        before = first
        for number in numbered:
            lowest = np.full(len(first), len(first))
            np.minimum.at(lowest, number, first)
            first = lowest[number]
        if np.array_equal(first, before):
            return first


def folds(groups: np.ndarray, count: int, seed: int, *, stratified: bool = False) -> list[np.ndarray]:
    """Divide stimuli into folds.

    Args:
        groups: a label per stimulus.
        count: folds.
        seed: of the division.
        stratified: spread the stimuli of each group evenly over the folds; by default the stimuli of a group stay
            together (unique labels give a plain random division).

    Returns:
        Positions of each fold, ascending. Each stimulus is in one fold; no fold is empty if there are enough groups.
    """
    labels, group_of = np.unique(groups, return_inverse=True)
    random = np.random.default_rng([seed, len(groups), count])
    if stratified:
        order = np.concatenate([random.permutation(np.flatnonzero(group_of == g)) for g in range(len(labels))])
        fold_of = np.empty(len(groups), np.int64)
        fold_of[order] = np.arange(len(groups)) % count
    else:
        # Largest groups first, each into the fold that is smallest so far.
        sizes, filled, fold_of_group = np.bincount(group_of), np.zeros(count), np.empty(len(labels), np.int64)
        shuffled = random.permutation(len(labels))
        for group in shuffled[np.argsort(-sizes[shuffled], kind="stable")]:
            fold_of_group[group] = np.argmin(filled)
            filled[fold_of_group[group]] += sizes[group]
        fold_of = fold_of_group[group_of]
    return [np.flatnonzero(fold_of == fold) for fold in range(count)]


# -------------------------------------------------------------------------------------------------- pack's options

# The options that each kind of split uses, besides `split`.
_OPTIONS_OF = {
    "source": (),
    "random": ("split_fractions", "split_seed"),
    "grouped": ("split_by", "split_fractions", "split_seed"),
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

    split: Literal["source", "random", "grouped", "leave-out", "k-fold"] = "source"
    """How stimuli are held out: as the source and its options define; individual stimuli at random; whole groups at
    random, such as objects; the groups named by --hold-out; or one of several folds."""
    split_by: str | None = None
    """The fact that groups stimuli (object, category, a table column ...), for grouped, leave-out and k-fold."""
    split_fractions: tuple[float, float] = (0.09, 0.10)
    """Shares of the stimuli for val and test, for random and grouped."""
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
        deal: Deal = FoldDeal(self.folds, self.fold, self.split_seed, groups, name)
        if self.split != "k-fold":
            val, test = self.split_fractions
            deal = RandomDeal({"train": 1 - val - test, "val": val, "test": test}, self.split_seed, groups)
        return Dealt(deal(np.arange(n)), rule, deal)

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
