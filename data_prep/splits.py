"""Which stimuli are held out: at random, by whole groups, in folds, or the last ones."""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.common.errors import BadInput
from data_prep.recording import SPLITS, Deal


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
    _check_fractions(fractions)
    names = np.arange(n) if groups is None else np.asarray(groups)
    _, group_of = np.unique(names, return_inverse=True)
    sizes = np.bincount(group_of)
    split_of_group = np.full(len(sizes), "train", dtype=object)
    remaining = deque(np.random.default_rng(seed).permutation(len(sizes)))
    for split in ("val", "test"):
        room = _stimuli_of(fractions, split, n)
        while room > 0 and remaining:
            group = remaining.popleft()
            split_of_group[group] = split
            room -= sizes[group]
    splits = [str(split) for split in split_of_group[group_of]]
    if "train" not in splits:
        raise BadInput(f"split fractions {dict(fractions)} leave none of {n} stimuli ({len(sizes)} groups) to train on")
    return splits


def _check_fractions(fractions: Mapping[str, float]) -> None:
    if unknown := set(fractions) - set(SPLITS):
        raise BadInput(f"split fractions: unknown split {sorted(unknown)[0]!r}; use {', '.join(SPLITS)}")
    if not all(share >= 0 for share in fractions.values()) or not abs(sum(fractions.values()) - 1) < 1e-6:
        raise BadInput(f"split fractions must not be negative and must add up to 1, not {dict(fractions)}")


def _stimuli_of(fractions: Mapping[str, float], split: str, n: int) -> int:
    """How many of `n` stimuli a held-out split gets."""
    return int(fractions.get(split, 0.0) * n + 1e-9)


def ordered_splits(copies: np.ndarray, fractions: Mapping[str, float]) -> list[str]:
    """The first stimuli go to train, the next floor(val * n) to val, and the last floor(test * n) to test.

    A copy goes where its image comes first, so none is held out that is trained on; then the later splits are smaller.

    Args:
        copies: for each stimulus, in the order of the recording, the position of the first one with the same image.
        fractions: share of each split; they must add up to 1.

    Raises:
        BadInput: fractions that are negative, unknown or do not add up to 1, or that leave no training stimuli.
    """
    _check_fractions(fractions)
    n = len(copies)
    val, test = (_stimuli_of(fractions, split, n) for split in ("val", "test"))
    splits = ["train"] * (n - val - test) + ["val"] * val + ["test"] * test
    if "train" not in splits:
        raise BadInput(f"split fractions {dict(fractions)} leave none of {n} stimuli to train on")
    return [splits[first] for first in copies.tolist()]


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
class OrderedDeal:
    """A deal by `ordered_splits`, see `Deal`.

    Attributes:
        fractions: share of each split.
    """

    fractions: Mapping[str, float]

    def __call__(self, copies: np.ndarray) -> list[str]:
        """See `Deal`."""
        return ordered_splits(copies, self.fractions)


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
