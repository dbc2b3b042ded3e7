"""Ridge regression with a penalty per site, chosen by exact leave-one-out."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Self

import numpy as np
import torch

from data_prep.recording import varies
from train.regression.fit import Fit, fit_site_groups
from train.regression.gram import Predictors
from train.regression.krylov import LEAST_STIMULI
from train.regression.rows import Ranks, stripe
from train.regression.shared_prior import shared_prior
from train.regression.spectrum import Spectrum

LEAST_FREEDOM = 1e-9  # of a stimulus that alone decides its prediction
SITES_BYTES = 2**24
PENALTIES = np.logspace(-6, 6, 49)  # in units of the Gram matrix's mean eigenvalue


@dataclass
class RidgeFit(Fit):
    """A ridge regression of every site; NaN for a site with too few responses.

    Attributes:
        penalty: float64 (sites,), in units of the mean eigenvalue.
        inner_r2: float64 (sites,), R2 of `left_out`.
        left_out: float32 (n, sites), the prediction for each stimulus from the others, on the principal components of
            all; NaN where a site has no response to it.
    """

    penalty: np.ndarray
    inner_r2: np.ndarray
    left_out: np.ndarray

    @classmethod
    def empty(cls, held_out: int, stimuli: int, sites: int) -> Self:
        """See `Fit.empty`."""
        fit = Fit.empty(held_out, stimuli, sites)
        return cls(
            prediction=fit.prediction,
            dual=fit.dual,
            mean=fit.mean,
            penalty=np.full(sites, np.nan),
            inner_r2=np.full(sites, np.nan),
            left_out=np.full((stimuli, sites), np.nan, np.float32),
        )

    def insert(self, group: Self, recorded: np.ndarray, sites: np.ndarray) -> None:
        """See `Fit.insert`."""
        super().insert(group, recorded, sites)
        self.penalty[sites] = group.penalty
        self.inner_r2[sites] = group.inner_r2
        self.left_out[np.ix_(recorded, sites)] = group.left_out


def ridge(
    predictors: Predictors, rates: np.ndarray, components: int | None = None, sites_together: bool = False
) -> RidgeFit:
    """Ridge regression on principal component scores: a = U (S^2 + penalty)^-1 U' y.

    Args:
        predictors: of the stimuli to fit and those held out.
        rates: float32 or float64 (n, sites); NaN = not recorded.
        components: number of principal components; all where None.
        sites_together: whether the penalties of the other sites that were recorded for the same stimuli are the prior
            of a site's (`train/regression/shared_prior.py`).
    """
    return fit_site_groups(predictors, rates, components, partial(_fit_group, sites_together=sites_together), RidgeFit)


def _fit_group(predictors: Predictors, rates: np.ndarray, components: int | None, sites_together: bool) -> RidgeFit:
    """Several ranks share out the sites."""
    spectrum, ranks = predictors.leading(components), predictors.ranks
    search = _Search(spectrum, predictors.trace / len(rates) or 1.0, predictors.copies)
    own = stripe(rates.shape[1], ranks.rank, ranks.ranks)
    blocks = _site_blocks(rates[:, own])
    squares = [search.squares(block) for block in blocks]
    chosen_by_block = [block_squares.argmin(axis=0) for block_squares in squares]
    if sites_together:
        chosen = _most_probable(np.concatenate(squares, axis=1), _images(predictors.copies, len(rates)), ranks)[own]
        chosen_by_block = np.split(chosen, np.cumsum([block.shape[1] for block in blocks])[:-1])
    parts = [search.choice(*of_block) for of_block in zip(blocks, squares, chosen_by_block, strict=True)]
    choice = _gathered(_Choice.side_by_side(parts), ranks)
    return RidgeFit(
        prediction=(predictors.predict(choice.dual) + choice.mean).astype(np.float32),
        dual=choice.dual,
        mean=choice.mean,
        penalty=choice.penalty,
        inner_r2=choice.inner_r2,
        left_out=choice.left_out,
        spectra=[spectrum.facts],
    )


def _site_blocks(rates: np.ndarray) -> list[np.ndarray]:
    """The sites, of many stimuli at most so many together that a matrix of stimuli x sites takes `SITES_BYTES`."""
    sites = max(SITES_BYTES // (8 * len(rates)), 1) if len(rates) >= LEAST_STIMULI else max(rates.shape[1], 1)
    return [rates[:, start : start + sites] for start in range(0, max(rates.shape[1], 1), sites)]


@dataclass(frozen=True)
class _Choice:
    """The penalties of some sites, and what follows from them; attributes as of `RidgeFit`."""

    penalty: np.ndarray
    mean: np.ndarray
    inner_r2: np.ndarray
    dual: np.ndarray
    left_out: np.ndarray

    @classmethod
    def side_by_side(cls, parts: "Sequence[_Choice]") -> "_Choice":
        """Those of one block of sites after the other."""
        if len(parts) == 1:
            return parts[0]
        names = [field.name for field in fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts], axis=-1) for name in names))


def _gathered(choice: _Choice, ranks: Ranks) -> _Choice:
    """Those of all ranks, the sites of one after the other."""
    if ranks.ranks == 1:
        return choice
    arrays = [getattr(choice, field.name) for field in fields(choice)]
    by_site = [torch.from_numpy(np.ascontiguousarray(array.T)).to(ranks.device) for array in arrays]
    return _Choice(*(ranks.gather_rows(rows).T for rows in by_site))


def _images(copies: np.ndarray | None, stimuli: int) -> int:
    """How many different images the stimuli show."""
    return stimuli if copies is None else len(np.unique(copies))


def _most_probable(squares: np.ndarray, stimuli: int, ranks: Ranks) -> np.ndarray:
    """Positions of the most probable penalties of the sites of all ranks, given those of the others, int64 (sites,).

    Args:
        squares: float64 (penalties, sites of this rank), sums of squared errors for stimuli that were left out.
        stimuli: number of these.
        ranks: that share out the sites.
    """
    of_all = ranks.gather_rows(torch.from_numpy(np.ascontiguousarray(squares.T)).to(ranks.device)).T
    return shared_prior(of_all, np.full(of_all.shape[1], stimuli)).posterior.argmax(axis=0)


@dataclass(frozen=True)
class _Search:
    """What the penalties of some sites are chosen by, from float64 responses (n, sites).

    The leave-one-out residual of stimulus i is e_i / (1 - H_ii), with H the hat matrix (PRESS, Allen 1974), so every
    penalty of a wide grid costs one product. Stimuli with the same image are left out together (`_left_out_errors`).

    Attributes:
        spectrum: of the Gram matrix.
        mean_eigenvalue: the unit of penalties.
        copies: see `GramMatrix`.
    """

    spectrum: Spectrum
    mean_eigenvalue: float
    copies: np.ndarray | None

    def squares(self, rates: np.ndarray) -> np.ndarray:
        """The sum of squared errors with each penalty, float64 (penalties, sites)."""
        centred_rates = rates - rates.mean(axis=0)
        rotated, squared = self.spectrum.vectors.T @ centred_rates, self.spectrum.vectors**2
        errors = partial(self._left_out_errors, centred_rates, rotated, squared)
        return np.stack([np.square(errors(np.array([penalty]))).sum(axis=0) for penalty in PENALTIES])

    def choice(self, rates: np.ndarray, squares: np.ndarray, chosen: np.ndarray) -> _Choice:
        """What follows from the penalties that were chosen.

        Args:
            rates: (n, sites).
            squares: of these sites.
            chosen: (sites,), positions of the penalties.
        """
        eigenvalues, vectors = self.spectrum.values[:, None], self.spectrum.vectors
        mean, penalty = rates.mean(axis=0), PENALTIES[chosen]
        centred_rates = rates - mean
        rotated = vectors.T @ centred_rates
        errors = self._left_out_errors(centred_rates, rotated, vectors**2, penalty)
        variance = np.square(centred_rates).sum(axis=0)
        press = np.take_along_axis(squares, chosen[None], axis=0)[0]
        with np.errstate(invalid="ignore", divide="ignore"):
            inner_r2 = np.where(varies(np.array(len(rates)), variance, mean), 1 - press / variance, np.nan)
        return _Choice(
            penalty=penalty,
            mean=mean,
            inner_r2=inner_r2,
            dual=vectors @ (rotated / (eigenvalues + penalty * self.mean_eigenvalue)),
            left_out=(rates - errors).astype(np.float32),
        )

    def _left_out_errors(
        self, centred_rates: np.ndarray, rotated: np.ndarray, squared: np.ndarray, penalties: np.ndarray
    ) -> np.ndarray:
        """The errors for stimuli that are left out, float64 (n, sites), with one penalty or one for each site."""
        eigenvalues, vectors = self.spectrum.values[:, None], self.spectrum.vectors
        shrinkage = eigenvalues / (eigenvalues + penalties * self.mean_eigenvalue)
        hat_diagonal = 1 / len(centred_rates) + squared @ shrinkage
        return _left_out_errors(centred_rates - vectors @ (shrinkage * rotated), hat_diagonal, self.copies)


def _left_out_errors(errors: np.ndarray, hat_diagonal: np.ndarray, copies: np.ndarray | None) -> np.ndarray:
    """The errors for stimuli that are left out, from those of the fit to all of them.

    m stimuli with the same image have the same features, so their block of the hat matrix is h 1 1', and leaving out
    all of them gives (I - h 1 1')^-1 e = e + h / (1 - m h) 1 1' e; with m = 1, e / (1 - h). If only one was left out,
    its copies would tell its response.

    Args:
        errors: (n, sites).
        hat_diagonal: (n, sites) or (n, 1).
        copies: see `GramMatrix`.
    """
    if copies is None:
        return errors / np.clip(1 - hat_diagonal, LEAST_FREEDOM, None)
    _, image, counts = np.unique(copies, return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), errors.shape[1]))
    np.add.at(sums, image, errors)
    freedom = np.clip(1 - counts[image][:, None] * hat_diagonal, LEAST_FREEDOM, None)
    return errors + hat_diagonal / freedom * sums[image]
