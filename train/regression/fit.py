"""The result of a regression from features to sites, put together from groups of sites recorded alike."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self, TypeVar

import numpy as np

from train.regression.gram import Predictors
from train.regression.spectrum import SpectrumFacts

MIN_STIMULI = 3  # to fit a site


@dataclass
class Fit:
    """A regression of every site; NaN for a site with fewer than `MIN_STIMULI` responses.

    Attributes:
        prediction: float32 (held out, sites), in the units of the responses.
        dual: float64 (n, sites), the weights of the stimuli; those of the features are X' dual. 0 for stimuli that a
            site has no response to.
        mean: float64 (sites,), of the responses; the prediction at the mean features of a site's stimuli.
        spectra: how the components were found, for each group of sites that were recorded for the same stimuli; none
            where the regression needs no components.
    """

    prediction: np.ndarray
    dual: np.ndarray
    mean: np.ndarray
    spectra: list[SpectrumFacts] = field(default_factory=list, kw_only=True)

    @classmethod
    def empty(cls, held_out: int, stimuli: int, sites: int) -> Self:
        """No site is fitted yet."""
        return cls(
            prediction=np.full((held_out, sites), np.nan, np.float32),
            dual=np.zeros((stimuli, sites)),
            mean=np.full(sites, np.nan),
        )

    def insert(self, group: Self, recorded: np.ndarray, sites: np.ndarray) -> None:
        """Take over the fit of a group of sites.

        Args:
            group: the fit.
            recorded: (n,) bool, its stimuli.
            sites: positions of its sites.
        """
        self.prediction[:, sites] = group.prediction
        self.mean[sites] = group.mean
        self.dual[np.ix_(recorded, sites)] = group.dual
        self.spectra += group.spectra


@dataclass(frozen=True)
class SiteGroups:
    """Sites that were recorded for the same stimuli, together.

    Attributes:
        recorded: bool (n, groups), whether the sites of a group have responses to a stimulus.
        group: int64 (sites,), the group of each site.
    """

    recorded: np.ndarray
    group: np.ndarray

    @classmethod
    def of(cls, rates: np.ndarray) -> Self:
        """Of responses (n, sites); NaN = not recorded."""
        is_recorded = ~np.isnan(rates)
        # Packed, as there are eight times fewer numbers to compare.
        _, first, group = np.unique(np.packbits(is_recorded, axis=0), axis=1, return_index=True, return_inverse=True)
        return cls(is_recorded[:, first], group.reshape(-1))


FitType = TypeVar("FitType", bound=Fit)


def fit_site_groups(
    predictors: Predictors,
    rates: np.ndarray,
    components: int | None,
    fit_group: Callable[[Predictors, np.ndarray, int | None], FitType],
    fit_type: type[FitType],
) -> FitType:
    """Fit together the sites that were recorded for the same stimuli: they share one decomposition.

    The features are centred on the stimuli of each such group.

    Args:
        predictors: of all stimuli.
        rates: float32 or float64 (n, sites); NaN = not recorded.
        components: number of components to use; all where None.
        fit_group: fits float64 responses (stimuli, sites) without NaN.
        fit_type: of the result.
    """
    fit = fit_type.empty(predictors.held_out_count, len(rates), rates.shape[1])
    groups = SiteGroups.of(rates)
    for index, recorded in enumerate(groups.recorded.T):
        if recorded.sum() < MIN_STIMULI:
            continue
        sites = np.flatnonzero(groups.group == index)
        of_group = predictors if recorded.all() else predictors.subset(recorded)
        group = fit_group(of_group, rates[recorded][:, sites].astype(np.float64), components)
        fit.insert(group, recorded, sites)
    return fit
