"""What the sites of a recording have in common, as the prior of each: empirical Bayes over the options of a regression.

A site chooses among options (penalties, windows) by its errors for stimuli that were left out. With few stimuli these
hardly tell one option from another, but the sites together do: arrays see one part of the visual field, through
features of one network. With independent normal errors of n stimuli, an option with the sum of squares e has the
likelihood e^(-n/2), their size being unknown. The prior of the options is the mixture of them that makes the sites most
likely together (Laird 1978), found by expectation maximisation; each site's posterior follows.
"""

from dataclasses import dataclass

import numpy as np

TEMPER = 0.3  # power of the likelihood: errors are not independent, as each left-out fit shares the other stimuli
ITERATIONS = 10  # of expectation maximisation; a prior that has converged is as narrow as the sample of sites
EVEN = 1e-4  # of the prior is spread over all options, so that none becomes impossible


@dataclass(frozen=True)
class SharedPrior:
    """The prior of some options, and what each site makes of it.

    Attributes:
        prior: float64 (options,), sums to 1.
        posterior: float64 (options, sites), likewise for each site; the prior for a site without usable errors.
    """

    prior: np.ndarray
    posterior: np.ndarray


def shared_prior(squares: np.ndarray, counts: np.ndarray) -> SharedPrior:
    """Learn the prior and the posteriors.

    Args:
        squares: float64 (options, sites), sums of squared errors for stimuli that were left out; NaN where there are
            none.
        counts: (sites,), number of stimuli that these are of.
    """
    usable = np.isfinite(squares).all(axis=0) & (squares > 0).all(axis=0) & (counts > 0)
    likelihood = np.ones_like(squares)
    relative = squares[:, usable] / squares[:, usable].min(axis=0)
    likelihood[:, usable] = np.exp(-TEMPER / 2 * counts[usable] * np.log(relative))
    options, sites = len(squares), int(usable.sum())
    prior = np.full(options, 1 / options)
    posterior = _posterior(prior, likelihood)
    if sites:
        for _ in range(ITERATIONS):
            shares = posterior[:, usable].sum(axis=1)
            prior = (shares / sites + EVEN / options) / (1 + EVEN)
            posterior = _posterior(prior, likelihood)
    return SharedPrior(prior, posterior)


def _posterior(prior: np.ndarray, likelihood: np.ndarray) -> np.ndarray:
    posterior = prior[:, None] * likelihood
    return posterior / posterior.sum(axis=0)
