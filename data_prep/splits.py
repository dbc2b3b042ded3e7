"""Which stimuli are for training and which are held out: seeded, and by whole groups where asked."""

from collections.abc import Mapping, Sequence

import numpy as np

from data_prep.errors import BadInput
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
