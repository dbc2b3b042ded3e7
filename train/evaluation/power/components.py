"""Variance components of a score, with stimuli and sites as crossed random effects, and what a design would show.

Z_ij is the score of site j plus the influence of stimulus i on it; with mean M over endless stimuli and sites,

    Z_ij = M + stimulus_i + site_j + rest_ij

(Clark 1973; Brennan 2001, Generalizability Theory). The mean score over S stimuli and J sites varies with

    stimuli          stimulus / S              + rest / (S J)     over other stimuli, these sites kept
    sites                           site / J   + rest / (S J)     over other sites, these stimuli kept
    both             stimulus / S + site / J   + rest / (S J)     over other stimuli and other sites

The components follow from mean squares (Searle, Casella and McCulloch 1992, chapter 4), and are 0 where these would
give less. Other stimuli come with other trials, so their noise is part of `stimulus` (as far as sites share it) and
`rest`.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

Population = Literal["stimuli", "sites", "both"]
POPULATIONS: dict[Population, str] = {
    "stimuli": "other stimuli of this kind, at these sites",
    "sites": "other sites of this kind, with these stimuli",
    "both": "other stimuli and other sites of this kind",
}


@dataclass(frozen=True)
class Design:
    """Numbers of an experiment.

    Attributes:
        stimuli: that are scored.
        sites: that are scored.
        repetitions: of each stimulus; None: as many as were recorded.
    """

    stimuli: int
    sites: int
    repetitions: float | None = None


@dataclass(frozen=True)
class Components:
    """The variance components of a score, or of a difference between two, at a number of repetitions.

    Attributes:
        value: the score or difference.
        stimulus, site, rest: see above; `site` is NaN where a single site was measured.
        bias: of the value, as measured; it is taken off where an interval is centred.
    """

    value: float
    stimulus: float
    site: float
    rest: float
    bias: float = 0.0

    @classmethod
    def of(cls, per_site: np.ndarray, mean_influence: float, site_influence: float, stimuli: int) -> "Components":
        """From the variances over stimuli.

        Args:
            per_site: the score of each site, or the difference of two, (sites,).
            mean_influence: the variance over stimuli of the influence on the mean over sites.
            site_influence: the mean over sites of the variance over stimuli of the influence on one of them.
            stimuli: their number.
        """
        sites = len(per_site)
        value = float(np.mean(per_site))
        if sites == 1:
            return cls(value, mean_influence, math.nan, 0.0)
        rest = (site_influence - mean_influence) * sites / (sites - 1)
        rest = min(max(rest, 0.0), sites * mean_influence)
        site = float(np.var(per_site, ddof=1)) - rest / stimuli
        return cls(value, max(mean_influence - rest / sites, 0.0), max(site, 0.0), rest)

    def variance(self, design: Design, population: Population) -> float:
        """The variance of the mean over a design's stimuli and sites."""
        variance = self.rest / (design.stimuli * design.sites)
        if population != "sites":
            variance += self.stimulus / design.stimuli
        if population != "stimuli":
            variance += self.site / design.sites
        return variance

    def freedom(self, design: Design, population: Population) -> float:
        """Degrees of freedom of a variance estimate, by Satterthwaite (1946) where mean squares are added."""
        stimuli, sites = design.stimuli - 1, design.sites - 1
        if population == "stimuli":
            return float(stimuli)
        if population == "sites":
            return 0.0 if math.isnan(self.site) else float(sites)
        if stimuli < 1 or sites < 1 or math.isnan(self.site):
            return 0.0
        of_stimuli = design.sites * self.stimulus + self.rest
        of_sites = design.stimuli * self.site + self.rest
        parts = (of_stimuli**2 / stimuli, of_sites**2 / sites, self.rest**2 / (stimuli * sites))
        total = of_stimuli + of_sites - self.rest
        return total**2 / sum(parts) if sum(parts) > 0 else float(min(stimuli, sites))

    def standard_error(self, design: Design, population: Population) -> float:
        """Of the mean over a design's stimuli and sites."""
        return math.sqrt(self.variance(design, population))

    def half_width(self, design: Design, population: Population, level: float = 0.95) -> float:
        """Half the width of the interval that a design would give, by Student's t; infinite without spread to see."""
        from scipy.special import stdtrit  # here, because command lines are parsed without scipy

        freedom = self.freedom(design, population)
        if freedom < 1:
            return math.inf
        return float(stdtrit(freedom, (1 + level) / 2)) * self.standard_error(design, population)

    def interval(self, design: Design, population: Population, level: float = 0.95) -> tuple[float, float]:
        """The interval of the value that was measured with this design.

        Its centre is the value less the bias, unless it is about these very stimuli.
        """
        half = self.half_width(design, population, level)
        centre = self.value if population == "sites" else self.value - self.bias
        return centre - half, centre + half


def joined(parts: "list[Components]", shared: float) -> Components:
    """The components of a mean over recordings, each with a design's stimuli and sites.

    Args:
        parts: of the recordings.
        shared: covariance, over the stimuli that recordings share, of their influences on the means over sites, summed
            over ordered pairs of recordings and multiplied by the share of the stimuli that they share.
    """
    count = len(parts)
    return Components(
        value=float(np.mean([part.value for part in parts])),
        stimulus=max(sum(part.stimulus for part in parts) + shared, 0.0) / count**2,
        site=sum(part.site for part in parts) / count**2,
        rest=sum(part.rest for part in parts) / count**2,
        bias=float(np.mean([part.bias for part in parts])),
    )
