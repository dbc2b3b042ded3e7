"""Which stimuli are for training and which are held out: seeded, and by whole groups where asked. Folds, too."""

from collections.abc import Mapping, Sequence

import numpy as np

from data_prep.common.errors import BadInput
from data_prep.recording import SPLITS


def assign_splits(n: int, fractions: Mapping[str, float], seed: int, groups: Sequence[str] | None = None) -> list[str]:
    """Assign each of `n` stimuli to a split at random.

    The stimuli are permuted by `numpy.random.default_rng(seed).permutation`; the first floor(val * n) go to val, the
    next floor(test * n) to test, the rest to train. With `groups`, whole groups are permuted and dealt out in the same
    way until a split has its share, so that no group straddles two splits.

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
        raise BadInput(f"split fractions must be positive and add up to 1, not {dict(fractions)}")
    names = np.arange(n) if groups is None else np.asarray(groups)
    _, group_of = np.unique(names, return_inverse=True)
    sizes = np.bincount(group_of)
    split_of_group = np.full(len(sizes), "train", dtype=object)
    order = iter(np.random.default_rng(seed).permutation(len(sizes)))
    for split in ("val", "test"):
        room = int(fractions.get(split, 0.0) * n + 1e-9)
        while room > 0 and (group := next(order, None)) is not None:
            split_of_group[group] = split
            room -= sizes[group]
    splits = [str(split) for split in split_of_group[group_of]]
    if "train" not in splits:
        raise BadInput(f"{n} stimuli in {len(sizes)} groups leave none to train on with fractions {dict(fractions)}")
    return splits


def grouping_facts(group_by: str | None) -> tuple[str, ...]:
    """The facts about stimuli that are watched for groups that straddle splits."""
    return ("object",) if group_by in (None, "object") else ("object", group_by)


def straddling(groups: Mapping[str, Sequence[Mapping[str, set[str]]]]) -> dict[str, dict[str, int]]:
    """Groups whose stimuli are in train and in a split that is held out.

    Args:
        groups: per split, for each of its shards, the values of each fact that occur there.

    Returns:
        For each fact with such groups their number, and that of all groups: `{"object": {"groups": 3, "of": 64}}`.
    """
    per_split: dict[str, dict[str, set[str]]] = {}
    for split, shards in groups.items():
        for shard in shards:
            for fact, values in shard.items():
                per_split.setdefault(fact, {}).setdefault(split, set()).update(values)
    found = {}
    for fact, values_of in per_split.items():
        held_out = set().union(*(values for split, values in values_of.items() if split != "train"))
        if shared := values_of.get("train", set()) & held_out:
            found[fact] = {"groups": len(shared), "of": len(set().union(*values_of.values()))}
    return found


def folds(groups: np.ndarray, count: int, seed: int, *, stratified: bool = False) -> list[np.ndarray]:
    """Deal stimuli out to folds.

    Args:
        groups: a label per stimulus.
        count: folds.
        seed: of the division.
        stratified: deal the stimuli of each group out evenly; by default the stimuli of a group stay together (unique
            labels give a plain random division).

    Returns:
        Positions of each fold, ascending; each stimulus is in one, and none is empty where there are enough groups.
    """
    labels, group_of = np.unique(groups, return_inverse=True)
    random = np.random.default_rng([seed, len(groups), count])
    if stratified:
        order = np.concatenate([random.permutation(np.flatnonzero(group_of == g)) for g in range(len(labels))])
        fold_of = np.empty(len(groups), np.int64)
        fold_of[order] = np.arange(len(groups)) % count
    else:
        # Large groups first, each to the fold that is smallest so far.
        sizes, filled, fold_of_group = np.bincount(group_of), np.zeros(count), np.empty(len(labels), np.int64)
        shuffled = random.permutation(len(labels))
        for group in shuffled[np.argsort(-sizes[shuffled], kind="stable")]:
            fold_of_group[group] = np.argmin(filled)
            filled[fold_of_group[group]] += sizes[group]
        fold_of = fold_of_group[group_of]
    return [np.flatnonzero(fold_of == fold) for fold in range(count)]
