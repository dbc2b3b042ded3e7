"""How well any model could do: what of trial-averaged responses is signal, and what is noise that no image explains.

With n repetitions of each of S stimuli, s^2 the variance of a site's mean rates over stimuli and v that of its single
trials about them, the reliability of the trial average is rho = s^2 / (s^2 + v / n). Two ways lead to it:

- variance components (analysis of variance): V, the variance of the trial averages, estimates s^2 + v / n, and the
  variance of the repetitions about their average estimates v. `VarianceComponents` has everything that follows.
- split halves: the repetitions are split at random, the half averages correlated, and the correlation corrected to all
  repetitions (Spearman 1910; Brown 1910).

rho bounds R2 and explained variance; its square root bounds Pearson's r. docs/metrics.md compares their biases.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from data_prep.shards.manifest import Ceiling, to_json_list

CONSTANT = 1e-24  # a variance below this part of the squared mean is what float64 rounding makes of a constant
LEAST_STIMULI = 4  # with two repetitions; the unbiased estimate needs more than three
RESAMPLES, BOOTSTRAP_SEED = 1000, 0
_RESAMPLES_AT_ONCE = 100

UNBIASED = "variance components of repetitions and stimuli, unbiased"
RANDOM_SPLITS, SPLIT_SEED = 100, 0


def estimate_ceiling(blocks: Iterable[np.ndarray]) -> Ceiling | None:
    """All that a manifest says of ceilings; None where no stimulus has two repetitions.

    Args:
        blocks: of sites, one after the other: float (stimuli, repetitions, sites), NaN = missing. A site's estimates
            are the same however the sites are cut into blocks.
    """
    estimates = [_estimate(trials) for trials in blocks]
    repetitions = np.max([found.pop("repetitions") for found in estimates], axis=0)
    repetitions = repetitions[repetitions >= 2]
    if not repetitions.size:
        return None
    found = {name: np.concatenate([part[name] for part in estimates], axis=-1) for name in estimates[0]}
    resampled = found.pop("resampled")
    return Ceiling(
        method=UNBIASED,
        random_splits=RANDOM_SPLITS,
        seed=SPLIT_SEED,
        stimuli=len(repetitions),
        repetitions={"min": repetitions.min(), "mean": repetitions.mean(), "max": repetitions.max()},
        ci95=[percentile_interval(site) for site in resampled.T],
        mean_ci95=percentile_interval(_mean_over_sites(resampled)),
        **{name: to_json_list(values) for name, values in found.items()},
    )


def _estimate(trials: np.ndarray) -> dict[str, np.ndarray]:
    """The estimates of a block of sites, under their names in the manifest; the sites are the last axis."""
    statistics = TrialStatistics.of(trials)
    found = variance_components(statistics)
    return {
        "repetitions": statistics.count.max(axis=1),
        "resampled": bootstrap_reliability(statistics),
        "reliability": found.reliability,
        "split_half": split_half_reliability(trials, RANDOM_SPLITS, SPLIT_SEED),
        "ncsnr": found.ncsnr,
        "noise_ceiling": found.noise_ceiling,
        "explainable_share": found.explainable_share,
    }


def _mean_over_sites(values: np.ndarray) -> np.ndarray:
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(axis=1) / known.sum(axis=1)


def percentile_interval(values: np.ndarray) -> list[float] | None:
    """The central 95 % of bootstrap values; None where there are none."""
    values = values[np.isfinite(values)]
    return [float(bound) for bound in np.percentile(values, (2.5, 97.5))] if values.size else None


# ------------------------------------------------------------------------------------------- variance components


@dataclass(frozen=True)
class TrialStatistics:
    """What ceilings need to know of single trials; all float64 (stimuli, sites).

    Attributes:
        average: over the repetitions; NaN where there are none.
        variance: of the repetitions about their average, unbiased (dividing by n - 1); NaN for fewer than two.
        count: repetitions, n.
    """

    average: np.ndarray
    variance: np.ndarray
    count: np.ndarray

    @classmethod
    def of(cls, trials: Iterable[np.ndarray]) -> "TrialStatistics":
        """From the trials of each stimulus, float (repetitions, sites), NaN = missing."""
        rows = [_one_stimulus(stimulus) for stimulus in trials]
        return cls(*(np.stack(part) for part in zip(*rows, strict=True)))

    def noise_of_average(self) -> np.ndarray:
        """The noise variance in each trial average, v / n: float64 (stimuli, sites).

        A stimulus with one repetition is given the site's mean v over the others; NaN where there is no repetition, and
        for sites without any stimulus that has two.
        """
        known = ~np.isnan(self.variance)
        with np.errstate(invalid="ignore", divide="ignore"):
            site_mean = np.where(known, self.variance, 0).sum(axis=0) / known.sum(axis=0)
            return np.where(known, self.variance, site_mean) / np.where(self.count > 0, self.count, np.nan)


def _one_stimulus(trials: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    trials = trials.astype(np.float64)
    there = ~np.isnan(trials)
    count = there.sum(axis=0).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        average = np.where(there, trials, 0).sum(axis=0) / count
        squares = (np.where(there, trials - average, 0) ** 2).sum(axis=0)
        return average, np.where(count >= 2, squares / (count - 1), np.nan), count


@dataclass(frozen=True)
class VarianceComponents:
    """Signal and noise, over the stimuli with at least two repetitions; all float64 (..., sites).

    Attributes:
        stimuli: S, how many there are.
        total: V, the variance of the trial averages over stimuli, unbiased; NaN where they do not vary.
        noise: v, the mean variance of single trials about their average.
        noise_of_average: the mean of v / n over stimuli.
        mean_inverse_count: the mean of 1 / n over stimuli.
    """

    stimuli: np.ndarray
    total: np.ndarray
    noise: np.ndarray
    noise_of_average: np.ndarray
    mean_inverse_count: np.ndarray

    @property
    def reliability(self) -> np.ndarray:
        """rho = 1 - (S - 3) / (S - 1) * (v / n) / V; NaN for fewer than `LEAST_STIMULI` stimuli.

        The factor takes away the bias of the ratio: for normal responses 1 / V is on average (S - 1) / (S - 3) times
        one over its expectation (the mean of an inverse chi-squared variable), so that this estimate is exactly right
        on average. It can be negative where the reliability is near 0.
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            rho = 1 - (self.stimuli - 3) / (self.stimuli - 1) * self.noise_of_average / self.total
        return np.where(self.stimuli >= LEAST_STIMULI, rho, np.nan)

    @property
    def signal(self) -> np.ndarray:
        """s^2 = V - v / n, unbiased; negative where there is little."""
        return self.total - self.noise_of_average

    @property
    def ncsnr(self) -> np.ndarray:
        """NSD's noise ceiling signal-to-noise ratio (Allen et al. 2022): s / sqrt(v), with s^2 at least 0."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.sqrt(np.maximum(self.signal, 0) / self.noise)

    @property
    def noise_ceiling(self) -> np.ndarray:
        """NSD's noise ceiling (Allen et al. 2022) as a share, 0..1: ncsnr^2 / (ncsnr^2 + mean of 1 / n)."""
        signal = np.maximum(self.signal, 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return signal / (signal + self.noise * self.mean_inverse_count)

    @property
    def explainable_share(self) -> np.ndarray:
        """The share of the single trials' variance that images can explain, s^2 / (s^2 + v) (Cadena et al. 2019)."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.signal / (self.signal + self.noise)


def variance_components(statistics: TrialStatistics) -> VarianceComponents:
    """Signal and noise of each site; attributes are float64 (sites,)."""
    columns, centre = _columns(statistics)
    return _components(columns.sum(axis=1), centre, resampled_from=None)


def bootstrap_reliability(
    statistics: TrialStatistics, resamples: int = RESAMPLES, seed: int = BOOTSTRAP_SEED
) -> np.ndarray:
    """The reliability on bootstrap resamples of the stimuli (Efron 1979), the same ones for all sites.

    The variance of a resample's averages is on average (S - 1) / S of that of all stimuli; this is corrected.

    Returns:
        float64 (resamples, sites); NaN for sites without an estimate.
    """
    columns, centre = _columns(statistics)
    rows, stimuli, sites = columns.shape
    flat = columns.transpose(1, 0, 2).reshape(stimuli, rows * sites)
    whole = columns[0].sum(axis=0)
    generator, found = np.random.default_rng(seed), []
    for _ in range(-(-resamples // _RESAMPLES_AT_ONCE)):
        times = generator.multinomial(stimuli, np.full(stimuli, 1 / stimuli), size=_RESAMPLES_AT_ONCE)
        sums = (times.astype(np.float64) @ flat).reshape(-1, rows, sites).transpose(1, 0, 2)
        found.append(_components(sums, centre, resampled_from=whole).reliability)
    undefined = np.isnan(_components(columns.sum(axis=1), centre, resampled_from=None).reliability)
    return np.where(undefined, np.nan, np.concatenate(found)[:resamples])


def _columns(statistics: TrialStatistics) -> tuple[np.ndarray, np.ndarray]:
    """Of each stimulus with two repetitions or more 1, m - c, (m - c)^2, v, v / n and 1 / n; and the centre c.

    Centred on the averages' mean over stimuli, so that the sums lose nothing to cancellation.

    Returns:
        float64 (6, stimuli, sites), zeros for the others; and c, (sites,).
    """
    usable = statistics.count >= 2
    n = np.where(usable, statistics.count, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        centre = np.where(usable, statistics.average, 0).sum(axis=0) / usable.sum(axis=0)
        deviation = statistics.average - centre
    parts = (np.ones_like(n), deviation, deviation**2, statistics.variance, statistics.variance / n, 1 / n)
    return np.stack([np.where(usable, part, 0) for part in parts]), centre


def _components(sums: np.ndarray, centre: np.ndarray, resampled_from: np.ndarray | None) -> VarianceComponents:
    stimuli, deviation, squares, noise, noise_of_average, inverse = sums
    with np.errstate(invalid="ignore", divide="ignore"):
        total = (squares - deviation**2 / stimuli) / (stimuli - 1)
        if resampled_from is not None:
            total = total * resampled_from / (resampled_from - 1)
        varies = total > CONSTANT * centre**2 * stimuli
        means = (part / stimuli for part in (noise, noise_of_average, inverse))
        return VarianceComponents(stimuli, np.where(varies, total, np.nan), *means)


# ---------------------------------------------------------------------------------------------------- split halves


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
    r = split_half_correlations(trials, random_splits, seed)
    defined = ~np.isnan(r)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(defined, 2 * r / (1 + r), 0).sum(axis=0) / defined.sum(axis=0)


def split_half_correlations(trials: np.ndarray, random_splits: int = 100, seed: int = 0) -> np.ndarray:
    """The uncorrected correlations r of `split_half_reliability`: float64 (random_splits, sites)."""
    there = ~np.isnan(trials)
    with np.errstate(invalid="ignore", divide="ignore"):
        centre = np.where(there, trials, 0).sum(axis=(0, 1), dtype=np.float64) / there.sum(axis=(0, 1))
    sums = np.zeros((6, random_splits, trials.shape[2]))
    for position, stimulus in enumerate(trials):
        # A generator for each stimulus: neither the other stimuli nor the sites have a say in how it is split.
        generator = np.random.default_rng([seed, position])
        keys, odd_one = generator.random((random_splits, len(stimulus))), generator.integers(0, 2, random_splits)
        for repetitions, sites in _alike(there[position]):
            values = stimulus[np.ix_(repetitions, sites)] - centre[sites]
            first, second = _half_averages(values, keys[:, repetitions], odd_one)
            parts = (np.ones_like(first), first, second, first**2, second**2, first * second)
            for total, part in zip(sums, parts, strict=True):
                total[:, sites] += part
    return _correlation(sums, centre)


def _alike(there: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The sites of one stimulus that have the same repetitions: which these are, and the sites; both positions.

    Args:
        there: bool (repetitions, sites). Where a site has fewer than two repetitions it is left out.
    """
    if (there == there[:, :1]).all():
        patterns, pattern_of = there[:, :1], np.zeros(there.shape[1], int)
    else:
        patterns, pattern_of = np.unique(there, axis=1, return_inverse=True)
    for number, pattern in enumerate(patterns.T):
        if pattern.sum() >= 2:
            yield np.flatnonzero(pattern), np.flatnonzero(pattern_of.ravel() == number)


def _half_averages(values: np.ndarray, keys: np.ndarray, odd_one: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The averages over both halves of the repetitions, in every split: float64 (splits, sites) each.

    Args:
        values: (repetitions, sites).
        keys: (splits, repetitions), random; the smaller ones are the first half.
        odd_one: 0 or 1 (splits,), whether the first half gets one more where their number is odd.
    """
    values, number = values.astype(np.float64), len(values)
    size = ((number + odd_one) // 2)[:, None]
    in_first = keys.argsort(axis=1).argsort(axis=1) < size
    first = in_first.astype(np.float64) @ values
    return first / size, (values.sum(axis=0) - first) / (number - size)


def _correlation(sums: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Pearson's r from sums over stimuli of 1, a, b, a^2, b^2 and a b: (..., sites).

    NaN where fewer than three stimuli are counted or one of the two is constant.

    Args:
        sums: float64 (6, ..., sites), of averages about the centre, so that they lose nothing to cancellation.
        centre: (sites,).
    """
    n, a, b, aa, bb, ab = sums
    with np.errstate(invalid="ignore", divide="ignore"):
        aa, bb, ab = aa - a**2 / n, bb - b**2 / n, ab - a * b / n
        varies = (aa > CONSTANT * n * centre**2) & (bb > CONSTANT * n * centre**2)
        return np.where((n >= 3) & varies, ab / np.sqrt(aa * bb), np.nan)
