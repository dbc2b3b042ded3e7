"""Bias of r² and of r²_ER on simulated sites whose true value is known; a table of docs/metrics.md.

A site's noise-free rates have exactly the given squared correlation with the prediction, and a variance of 1. All sites
are draws of the same experiment, so the spread over them gives the standard error of the mean.

    python benchmarks/noise_corrected_r2.py [--sites 2000]
"""

import sys
from dataclasses import dataclass

import numpy as np
import torch
from harness import ROOT, options_of, table, write_json

sys.path.insert(0, str(ROOT))

from data_prep.ceiling import TrialStatistics
from train.evaluation.metrics import all_scores
from train.evaluation.moments import SiteMoments

TRUE_VALUES = (0.0, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Experiment:
    """A simulated recording.

    Attributes:
        stimuli, repetitions: numbers.
        noise: variance of a trial; the signal's is 1.
        counts: Poisson counts instead of normal noise, so that stimuli of high rates are noisier.
        unequal: every other stimulus has two repetitions only.
    """

    stimuli: int
    repetitions: int
    noise: float
    counts: bool = False
    unequal: bool = False

    @property
    def title(self) -> str:
        """A row's name."""
        kind = "counts" if self.counts else "normal"
        repetitions = f"2 or {self.repetitions}" if self.unequal else f"{self.repetitions}"
        return f"{self.stimuli}, {repetitions}, {kind}, {self.noise:g}"

    def scores(self, share: float, sites: int) -> dict[str, np.ndarray]:
        """The scores of sites of which the prediction explains `share`."""
        rng = np.random.default_rng(0)
        x = rng.normal(size=self.stimuli)
        x = (x - x.mean()) / x.std()
        other = rng.normal(size=(self.stimuli, sites))
        other -= other.mean(axis=0) + np.outer(x, x @ other) / self.stimuli
        rate = np.sqrt(share) * x[:, None] + np.sqrt(1 - share) * other / other.std(axis=0)
        shape = (self.stimuli, self.repetitions, sites)
        if self.counts:  # 25 on average, and so is their variance, which is to be `noise` times the signal's
            means = 25 + np.sqrt(25 / self.noise) * rate
            trials = rng.poisson(np.broadcast_to(means[:, None], shape))
        else:
            trials = rate[:, None] + rng.normal(0, np.sqrt(self.noise), shape)
        trials = trials.astype(np.float64)
        if self.unequal:
            trials[::2, 2:] = np.nan
        statistics = TrialStatistics.from_trials(trials)
        prediction = np.repeat(x[:, None], sites, 1)
        moments = SiteMoments.of(torch.from_numpy(prediction), torch.from_numpy(statistics.average))
        return all_scores(moments, None, statistics.noise_of_average().mean(axis=0))


EXPERIMENTS = (
    Experiment(60, 4, 2),
    Experiment(300, 4, 2),
    Experiment(300, 10, 10),
    Experiment(300, 4, 2, counts=True),
    Experiment(300, 6, 2, unequal=True),
)


def main() -> None:
    parser = options_of(__doc__ or "")
    parser.add_argument("--sites", type=int, default=2000)
    options = parser.parse_args()
    rows = [["stimuli, repetitions, noise", "true", "r²", "r²_ER"]]
    results = []
    for experiment in EXPERIMENTS:
        for share in TRUE_VALUES:
            scores = experiment.scores(share, options.sites)
            cells = []
            for name in ("squared_pearson_r", "r2_er"):
                bias, error = scores[name].mean() - share, scores[name].std() / np.sqrt(options.sites)
                results.append({"experiment": experiment.title, "true": share, "metric": name, "bias": bias})
                cells.append(f"{bias:+.4f} ± {error:.4f}")
            rows.append([experiment.title, f"{share:g}", *cells])
    print(table(rows))
    write_json(options, results)


if __name__ == "__main__":
    main()
