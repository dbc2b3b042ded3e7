"""Noise ceilings: how much of the variance of trial-averaged responses is signal, and so how well any model could do.

With n repetitions of each of S stimuli, s^2 the variance of a site's mean rates over stimuli and v that of its single
trials about them, the reliability of the trial average is rho = s^2 / (s^2 + v / n). It is estimated in two ways:

- variance components (analysis of variance): V, the variance of the trial averages, estimates s^2 + v / n, and the
  variance of the repetitions about their average estimates v. `VarianceComponents` has everything that follows.
- split halves: the repetitions are split at random, the half averages are correlated over stimuli, and the correlation
  is corrected to the full number of repetitions (Spearman 1910; Brown 1910).

rho bounds R2 and explained variance; its square root bounds Pearson's r. docs/metrics.md compares their biases.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from data_prep.confidence_interval import PossibleValues, confidence_interval

CONSTANT = 1e-24  # a variance below this fraction of the squared mean is float64 rounding of a constant
MIN_STIMULI = 4  # with at least two repetitions; the unbiased estimate needs more than three
RESAMPLES, BOOTSTRAP_SEED = 1000, 0
RANDOM_SPLITS, SPLIT_SEED = 100, 0
_RESAMPLES_AT_ONCE = 100


@dataclass(frozen=True)
class CeilingEstimate:
    """Noise ceilings of a recording; all float64, the last axis is sites, NaN where a site has no estimate.

    Attributes:
        repetitions: (stimuli,), number of repetitions of each stimulus that has at least two.
        reliability: of the trial average, from variance components.
        resampled: (RESAMPLES, sites), the reliability on bootstrap resamples of the stimuli.
        split_half: the split-half estimate of the reliability, over RANDOM_SPLITS.
        ncsnr, noise_ceiling, explainable_share: see `VarianceComponents`.
    """

    repetitions: np.ndarray
    reliability: np.ndarray
    resampled: np.ndarray
    split_half: np.ndarray
    ncsnr: np.ndarray
    noise_ceiling: np.ndarray
    explainable_share: np.ndarray

    @property
    def ci95(self) -> list[tuple[float, float] | None]:
        """95 % confidence interval of each site's reliability."""
        stimuli = len(self.repetitions)
        sites = zip(self.reliability, self.resampled.T, strict=True)
        return [_interval(float(reliability), values, stimuli) for reliability, values in sites]

    @property
    def mean_ci95(self) -> tuple[float, float] | None:
        """95 % confidence interval of the mean reliability over sites."""
        if np.isnan(self.reliability).all():
            return None
        known = ~np.isnan(self.resampled)
        with np.errstate(invalid="ignore"):
            means = np.where(known, self.resampled, 0).sum(axis=1) / known.sum(axis=1)
        return _interval(float(np.nanmean(self.reliability)), means, len(self.repetitions))


def _interval(reliability: float, resampled: np.ndarray, stimuli: int) -> tuple[float, float] | None:
    """The confidence interval of a reliability, which is 1 at most.

    Of about ten stimuli or fewer, a resample can hold two or three only. Their averages may hardly vary, and the
    reliability on them is anything: where that has moved the interval off the estimate, it says nothing and is None.
    """
    interval = confidence_interval(reliability, resampled, stimuli, PossibleValues(most=1.0))
    return interval if interval is not None and interval[0] <= reliability <= interval[1] else None


def estimate_ceiling(blocks: Iterable[np.ndarray]) -> CeilingEstimate | None:
    """Estimate the noise ceiling of every site; None if no stimulus has two repetitions.

    Args:
        blocks: the trials, a block of sites at a time: float (stimuli, repetitions, sites), NaN = missing. A site's
            estimates do not depend on how the sites are cut into blocks.
    """
    estimates = [_estimate_block(trials) for trials in blocks]
    repetitions = np.max([block.repetitions for block in estimates], axis=0)
    if not (repetitions >= 2).any():
        return None

    def of_all_sites(name: str) -> np.ndarray:
        return np.concatenate([getattr(block, name) for block in estimates], axis=-1)

    return CeilingEstimate(
        repetitions=repetitions[repetitions >= 2],
        reliability=of_all_sites("reliability"),
        resampled=of_all_sites("resampled"),
        split_half=of_all_sites("split_half"),
        ncsnr=of_all_sites("ncsnr"),
        noise_ceiling=of_all_sites("noise_ceiling"),
        explainable_share=of_all_sites("explainable_share"),
    )


def _estimate_block(trials: np.ndarray) -> CeilingEstimate:
    """The estimates of a block of sites; `repetitions` still counts every stimulus."""
    statistics = TrialStatistics.from_trials(trials)
    components = variance_components(statistics)
    return CeilingEstimate(
        repetitions=statistics.count.max(axis=1),
        reliability=components.reliability,
        resampled=bootstrap_reliability(statistics),
        split_half=split_half_reliability(trials),
        ncsnr=components.ncsnr,
        noise_ceiling=components.noise_ceiling,
        explainable_share=components.explainable_share,
    )


# ------------------------------------------------------------------------------------------- variance components


@dataclass(frozen=True)
class TrialStatistics:
    """Average, variance and number of the repetitions; all float64 (stimuli, sites).

    Attributes:
        average: over the repetitions; NaN where there are none.
        variance: of the repetitions about their average, unbiased (divided by n - 1); NaN for fewer than two.
        count: n, the number of repetitions.
    """

    average: np.ndarray
    variance: np.ndarray
    count: np.ndarray

    @classmethod
    def from_trials(cls, trials: Iterable[np.ndarray]) -> "TrialStatistics":
        """Statistics of the trials of each stimulus, float (repetitions, sites), NaN = missing."""
        stimuli = [_statistics_of_one_stimulus(repetitions) for repetitions in trials]
        return cls(
            average=np.stack([stimulus.average for stimulus in stimuli]),
            variance=np.stack([stimulus.variance for stimulus in stimuli]),
            count=np.stack([stimulus.count for stimulus in stimuli]),
        )

    def noise_of_average(self) -> np.ndarray:
        """The noise variance in each trial average, v / n: float64 (stimuli, sites).

        A stimulus with one repetition gets the site's mean v over the others. NaN where there is no repetition, and for
        sites where no stimulus has two.
        """
        known = ~np.isnan(self.variance)
        with np.errstate(invalid="ignore", divide="ignore"):
            site_mean = np.where(known, self.variance, 0).sum(axis=0) / known.sum(axis=0)
            return np.where(known, self.variance, site_mean) / np.where(self.count > 0, self.count, np.nan)


def _statistics_of_one_stimulus(trials: np.ndarray) -> TrialStatistics:
    """As `TrialStatistics.from_trials`, for one stimulus: the arrays are (sites,)."""
    trials = trials.astype(np.float64)
    recorded = ~np.isnan(trials)
    count = recorded.sum(axis=0).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        average = np.where(recorded, trials, 0).sum(axis=0) / count
        squares = (np.where(recorded, trials - average, 0) ** 2).sum(axis=0)
        variance = np.where(count >= 2, squares / (count - 1), np.nan)
    return TrialStatistics(average, variance, count)


@dataclass(frozen=True)
class VarianceComponents:
    """Signal and noise, over the stimuli with at least two repetitions; all float64 (..., sites).

    Attributes:
        stimuli: S, their number.
        total: V, the unbiased variance of the trial averages over stimuli; NaN where they do not vary.
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
        """rho = 1 - (S - 3) / (S - 1) * (v / n) / V; NaN for fewer than `MIN_STIMULI` stimuli.

        The factor (S - 3) / (S - 1) removes the bias of the ratio: for normal responses the mean of 1 / V is
        (S - 1) / (S - 3) times one over the mean of V (the mean of an inverse chi-squared variable). The estimate is
        therefore unbiased; it can be negative where the reliability is near 0.
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            rho = 1 - (self.stimuli - 3) / (self.stimuli - 1) * self.noise_of_average / self.total
        return np.where(self.stimuli >= MIN_STIMULI, rho, np.nan)

    @property
    def signal(self) -> np.ndarray:
        """s^2 = V - v / n, unbiased; can be negative where there is little signal."""
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
    summands, centre = _summands(statistics)
    return _components(summands.sum(axis=1), centre, resampled_from=None)


def bootstrap_reliability(
    statistics: TrialStatistics, resamples: int = RESAMPLES, seed: int = BOOTSTRAP_SEED
) -> np.ndarray:
    """The reliability on bootstrap resamples of the stimuli (Efron 1979), the same resamples for all sites.

    The variance of a resample's averages is on average (S - 1) / S times that of all stimuli; this is corrected.

    Returns:
        float64 (resamples, sites); NaN for sites without an estimate.
    """
    summands, centre = _summands(statistics)
    rows, stimuli, sites = summands.shape
    by_stimulus = summands.transpose(1, 0, 2).reshape(stimuli, rows * sites)
    usable = summands[0].sum(axis=0)
    generator = np.random.default_rng(seed)
    reliability = []
    for _ in range(-(-resamples // _RESAMPLES_AT_ONCE)):
        times = generator.multinomial(stimuli, np.full(stimuli, 1 / stimuli), size=_RESAMPLES_AT_ONCE)
        sums = (times.astype(np.float64) @ by_stimulus).reshape(-1, rows, sites).transpose(1, 0, 2)
        reliability.append(_components(sums, centre, resampled_from=usable).reliability)
    undefined = np.isnan(_components(summands.sum(axis=1), centre, resampled_from=None).reliability)
    return np.where(undefined, np.nan, np.concatenate(reliability)[:resamples])


def _summands(statistics: TrialStatistics) -> tuple[np.ndarray, np.ndarray]:
    """The terms to sum over stimuli, 1, m - c, (m - c)^2, v, v / n and 1 / n, and the centre c.

    c is the mean over stimuli of the averages m, so that the sums lose nothing to cancellation.

    Returns:
        float64 (6, stimuli, sites), zero for stimuli with fewer than two repetitions; and c, (sites,).
    """
    usable = statistics.count >= 2
    n = np.where(usable, statistics.count, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        centre = np.where(usable, statistics.average, 0).sum(axis=0) / usable.sum(axis=0)
        deviation = statistics.average - centre
    summands = (np.ones_like(n), deviation, deviation**2, statistics.variance, statistics.variance / n, 1 / n)
    return np.stack([np.where(usable, summand, 0) for summand in summands]), centre


def _components(sums: np.ndarray, centre: np.ndarray, resampled_from: np.ndarray | None) -> VarianceComponents:
    """Signal and noise from the sums over stimuli of `_summands`.

    Args:
        sums: float64 (6, ..., sites).
        centre: c of `_summands`, (sites,).
        resampled_from: the number of stimuli that a bootstrap resample was drawn from, (sites,); None for no resample.
    """
    stimuli, deviation, squares, noise, noise_of_average, inverse_count = sums
    with np.errstate(invalid="ignore", divide="ignore"):
        total = (squares - deviation**2 / stimuli) / (stimuli - 1)
        if resampled_from is not None:
            total = total * resampled_from / (resampled_from - 1)
        varies = total > CONSTANT * centre**2 * stimuli
        return VarianceComponents(
            stimuli=stimuli,
            total=np.where(varies, total, np.nan),
            noise=noise / stimuli,
            noise_of_average=noise_of_average / stimuli,
            mean_inverse_count=inverse_count / stimuli,
        )


# ---------------------------------------------------------------------------------------------------- split halves


def split_half_reliability(
    trials: np.ndarray, random_splits: int = RANDOM_SPLITS, seed: int = SPLIT_SEED
) -> np.ndarray:
    """Spearman-Brown corrected split-half reliability of the trial average, per site.

    The repetitions of every stimulus are split at random into halves (of an odd number, the extra one goes to either
    half with equal probability). The half averages are correlated over stimuli, r, and corrected to the full number of
    repetitions, rho = 2 r / (1 + r) (Spearman 1910; Brown 1910). rho is averaged over the random splits.

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


def split_half_correlations(
    trials: np.ndarray, random_splits: int = RANDOM_SPLITS, seed: int = SPLIT_SEED
) -> np.ndarray:
    """The uncorrected correlations r of `split_half_reliability`: float64 (random_splits, sites)."""
    recorded = ~np.isnan(trials)
    with np.errstate(invalid="ignore", divide="ignore"):
        centre = np.where(recorded, trials, 0).sum(axis=(0, 1), dtype=np.float64) / recorded.sum(axis=(0, 1))
    sums = np.zeros((6, random_splits, trials.shape[2]))
    for position, stimulus in enumerate(trials):
        # A generator for each stimulus, so that its halves depend neither on the other stimuli nor on the sites.
        generator = np.random.default_rng([seed, position])
        keys, extra = generator.random((random_splits, len(stimulus))), generator.integers(0, 2, random_splits)
        for repetitions, sites in _group_sites(recorded[position]):
            values = stimulus[np.ix_(repetitions, sites)] - centre[sites]
            first, second = _half_averages(values, keys[:, repetitions], extra)
            summands = (np.ones_like(first), first, second, first**2, second**2, first * second)
            for total, summand in zip(sums, summands, strict=True):
                total[:, sites] += summand
    return _correlation(sums, centre)


def _group_sites(recorded: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Group the sites of one stimulus by their recorded repetitions; yields positions of repetitions and of sites.

    Args:
        recorded: bool (repetitions, sites). Sites with fewer than two repetitions are left out.
    """
    if (recorded == recorded[:, :1]).all():
        patterns, pattern_of_site = recorded[:, :1], np.zeros(recorded.shape[1], int)
    else:
        patterns, pattern_of_site = np.unique(recorded, axis=1, return_inverse=True)
    for number, pattern in enumerate(patterns.T):
        if pattern.sum() >= 2:
            yield np.flatnonzero(pattern), np.flatnonzero(pattern_of_site.ravel() == number)


def _half_averages(values: np.ndarray, keys: np.ndarray, extra: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The averages over both halves of the repetitions, in every split: float64 (splits, sites) each.

    Args:
        values: (repetitions, sites).
        keys: (splits, repetitions), random; the repetitions with the smallest keys form the first half.
        extra: 0 or 1 (splits,), whether the first half gets the extra one of an odd number of repetitions.
    """
    values, count = values.astype(np.float64), len(values)
    first_size = ((count + extra) // 2)[:, None]
    in_first = keys.argsort(axis=1).argsort(axis=1) < first_size
    first = in_first.astype(np.float64) @ values
    return first / first_size, (values.sum(axis=0) - first) / (count - first_size)


def _correlation(sums: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Pearson's r from sums over stimuli of 1, a, b, a^2, b^2 and a b: (..., sites).

    NaN for fewer than three stimuli, or where a or b is constant.

    Args:
        sums: float64 (6, ..., sites), of averages about the centre, so that they lose nothing to cancellation.
        centre: (sites,).
    """
    n, a, b, aa, bb, ab = sums
    with np.errstate(invalid="ignore", divide="ignore"):
        aa, bb, ab = aa - a**2 / n, bb - b**2 / n, ab - a * b / n
        varies = (aa > CONSTANT * n * centre**2) & (bb > CONSTANT * n * centre**2)
        return np.where((n >= 3) & varies, ab / np.sqrt(aa * bb), np.nan)
