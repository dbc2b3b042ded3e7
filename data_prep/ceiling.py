"""How well any model could do: the reliability of trial-averaged responses."""

import numpy as np

CONSTANT = 1e-24  # a variance below this part of the squared mean is what float64 rounding makes of a constant


def split_half_reliability(trials: np.ndarray, random_splits: int = 100, seed: int = 0) -> np.ndarray:
    """Spearman-Brown corrected split-half reliability of the trial average, per site.

    The repetitions of every stimulus are split at random into halves (an odd one out goes to either half with equal
    chance), the half averages are correlated over stimuli, r, and corrected to the full number of repetitions,
    rho = 2 r / (1 + r) (Spearman 1910; Brown 1910); rho is averaged over the random splits. rho bounds R2 and
    explained variance; its square root bounds Pearson's r.

    Args:
        trials: float (stimuli, repetitions, sites), NaN = missing. For each site, stimuli with fewer than two
            repetitions are left out.
        random_splits: number of random splits averaged over.
        seed: of the splits.

    Returns:
        float64 (sites,); NaN where fewer than three stimuli have two repetitions or the responses do not vary.
    """
    generator = np.random.default_rng(seed)
    present = ~np.isnan(trials)
    values = np.where(present, trials, 0.0)
    count = present.sum(axis=1)
    rhos = np.array([_one_split(generator, values, present, count) for _ in range(random_splits)])
    defined = ~np.isnan(rhos)
    with np.errstate(invalid="ignore"):
        return np.where(defined, rhos, 0).sum(axis=0) / defined.sum(axis=0)


def _one_split(generator: np.random.Generator, values: np.ndarray, present: np.ndarray, count: np.ndarray):
    order = generator.permuted(np.tile(np.arange(values.shape[1]), (len(values), 1)), axis=1)[:, :, None]
    shuffled = np.take_along_axis(present, order, axis=1)
    first_size = (count + generator.integers(0, 2, (len(values), 1))) // 2
    first = shuffled & (np.cumsum(shuffled, axis=1) <= first_size[:, None, :])
    values = np.take_along_axis(values, order, axis=1)
    total, first_total = values.sum(axis=1, dtype=np.float64), np.where(first, values, 0).sum(axis=1, dtype=np.float64)
    usable = count >= 2
    with np.errstate(invalid="ignore", divide="ignore"):
        r = _correlation(first_total / first_size, (total - first_total) / (count - first_size), usable)
        return 2 * r / (1 + r)


def _correlation(a: np.ndarray, b: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """Pearson's r over the usable rows of each column; NaN where fewer than three are usable or one is constant."""
    n = usable.sum(axis=0)
    a, b = (np.where(usable, x, 0.0) for x in (a, b))
    mean_a, mean_b = a.sum(axis=0) / n, b.sum(axis=0) / n
    a, b = np.where(usable, a - mean_a, 0.0), np.where(usable, b - mean_b, 0.0)
    aa, bb = (a * a).sum(axis=0), (b * b).sum(axis=0)
    varies = (aa > CONSTANT * n * mean_a**2) & (bb > CONSTANT * n * mean_b**2)
    return np.where((n >= 3) & varies, (a * b).sum(axis=0) / np.sqrt(aa * bb), np.nan)
