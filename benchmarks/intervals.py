"""How often a 95 % interval holds the score over endless stimuli; the table of docs/metrics.md.

Without arguments on simulated recordings, whose scores are known. A real one, given as the predictions.npz of a run or
probe, is taken as all stimuli there are: samples are drawn from it with replacement, and the score to hold is that over
all of its stimuli. Each cell has the plain percentile interval, then ours.

    python benchmarks/intervals.py [RUN/eval/val/predictions.npz ...] [--trials 1000]
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from harness import ROOT, options_of, table, write_json

sys.path.insert(0, str(ROOT))

from data_prep.confidence_interval import confidence_interval
from train.evaluation.confidence_intervals import bootstrap_means
from train.evaluation.metrics import mean_score, site_scores
from train.evaluation.moments import SiteMoments

METRICS = ("r2", "explained_variance", "mse", "pearson_r")
STIMULI = (20, 50, 100, 200)
LATENT, ENDLESS = 6, 100_000


@dataclass(frozen=True)
class Drawn:
    """Predictions and responses of some stimuli, float32 (stimuli, sites)."""

    prediction: np.ndarray
    response: np.ndarray

    def scores(self) -> dict[str, float]:
        """The mean over sites of each metric."""
        moments = SiteMoments.of(torch.from_numpy(self.prediction), torch.from_numpy(self.response))
        return {name: mean_score(per_site) for name, per_site in site_scores(moments).items()}


@dataclass(frozen=True)
class Population:
    """What stimuli are drawn from: a way to draw some, and the scores over all."""

    name: str
    draw: Callable[[np.random.Generator, int], Drawn]
    truth: dict[str, float]


def simulated(sites: int, explained: float, *, skewed: bool) -> Population:
    """Sites that see six latent dimensions of the image, with noise of which a fifth is shared between sites.

    Args:
        sites: number of sites.
        explained: share of each site's variance that the predicted signal has.
        skewed: exponential instead of normal noise.
    """
    rng = np.random.default_rng(sites)
    signal_weights, noise_weights = rng.normal(size=(2, LATENT, sites))
    signal_weights *= np.sqrt(explained / (1 - explained) / np.square(signal_weights).sum(0))
    noise_weights *= np.sqrt(0.2 / np.square(noise_weights).sum(0))

    def draw(rng: np.random.Generator, stimuli: int) -> Drawn:
        signal = rng.normal(size=(stimuli, LATENT)) @ signal_weights
        own = rng.exponential(size=signal.shape) - 1 if skewed else rng.normal(size=signal.shape)
        noise = np.sqrt(0.8) * own + rng.normal(size=(stimuli, LATENT)) @ noise_weights
        return Drawn((0.9 * signal).astype(np.float32), (signal + noise).astype(np.float32))

    noise = "skewed" if skewed else "normal"
    return Population(f"{sites} sites, R2 {explained:g}, {noise} noise", draw, draw(rng, ENDLESS).scores())


def recorded(path: Path) -> Population:
    """The stimuli of a predictions.npz."""
    with np.load(path, allow_pickle=False) as arrays:
        everything = Drawn(arrays["prediction"], arrays["target"])
    count, sites = everything.response.shape

    def draw(rng: np.random.Generator, stimuli: int) -> Drawn:
        rows = rng.integers(0, count, stimuli)
        return Drawn(everything.prediction[rows], everything.response[rows])

    return Population(f"{path}: {count} stimuli, {sites} sites", draw, everything.scores())


def coverage(population: Population, stimuli: int, trials: int, resamples: int) -> dict[str, dict[str, float]]:
    """By metric, the share of trials in which the percentile interval and ours held the truth."""
    held = {metric: {"percentile": 0, "ours": 0} for metric in METRICS}
    rng = np.random.default_rng(stimuli)
    for _ in range(trials):
        drawn = population.draw(rng, stimuli)
        estimates = drawn.scores()
        resampled = bootstrap_means(drawn.prediction, drawn.response, resamples, int(rng.integers(2**31)))
        for metric in METRICS:
            low, high = np.quantile(resampled[metric], [0.025, 0.975])
            held[metric]["percentile"] += low <= population.truth[metric] <= high
            interval = confidence_interval(estimates[metric], resampled[metric], stimuli)
            assert interval is not None
            held[metric]["ours"] += interval[0] <= population.truth[metric] <= interval[1]
    return {metric: {kind: count / trials for kind, count in kinds.items()} for metric, kinds in held.items()}


def main() -> None:
    parser = options_of(__doc__ or "")
    parser.add_argument("predictions", type=Path, nargs="*", help="predictions.npz of runs or probes")
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--resamples", type=int, default=500)
    options = parser.parse_args()
    populations = [recorded(path) for path in options.predictions] or [
        simulated(1, 0.4, skewed=False),
        simulated(50, 0.05, skewed=False),
        simulated(50, 0.4, skewed=True),
        simulated(168, 0.4, skewed=True),
    ]
    rows = [["population", "stimuli", *METRICS]]
    results = []
    for population in populations:
        for stimuli in STIMULI:
            shares = coverage(population, stimuli, options.trials, options.resamples)
            results.append({"population": population.name, "stimuli": stimuli, "coverage": shares})
            cells = [f"{shares[metric]['percentile']:.3f} -> {shares[metric]['ours']:.3f}" for metric in METRICS]
            rows.append([population.name, str(stimuli), *cells])
            print(" | ".join(rows[-1]), flush=True)
    print(table(rows))
    write_json(options, results)


if __name__ == "__main__":
    main()
