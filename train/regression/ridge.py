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
SITES_BYTES = 2**25
ROWS_AT_A_TIME = 4096  # of the eigenvectors that are squared
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
    search = _Search(spectrum, predictors.trace / len(rates) or 1.0, predictors.copies, ranks.device)
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
class _Responses:
    """Responses of some sites.

    Attributes:
        mean: float64 (sites,).
        centred: float64 (sites, n), on the device of the search.
        rotated: these times the eigenvectors, float64 (sites, components).
    """

    mean: np.ndarray
    centred: torch.Tensor
    rotated: torch.Tensor


class _Search:
    """What the penalties of sites are chosen by.

    The leave-one-out residual of stimulus i is e_i / (1 - H_ii), with H the hat matrix (PRESS, Allen 1974), so every
    penalty of a wide grid costs one product. m stimuli with the same image are left out together; if only one was, its
    copies would tell its response. They have the same features, so their block of the hat matrix is h 1 1', and leaving
    out all of them gives (I - h 1 1')^-1 e = e + h / (1 - m h) 1 1' e.

    Args:
        spectrum: of the Gram matrix.
        mean_eigenvalue: the unit of penalties.
        copies: see `GramMatrix`.
        device: that computes.
    """

    def __init__(self, spectrum: Spectrum, mean_eigenvalue: float, copies: np.ndarray | None, device: torch.device):
        self._vectors = torch.from_numpy(np.ascontiguousarray(spectrum.vectors)).to(device)
        eigenvalues = torch.from_numpy(np.ascontiguousarray(spectrum.values)).to(device)
        self._shifted = eigenvalues + torch.from_numpy(PENALTIES).to(device)[:, None] * mean_eigenvalue
        self._shrinkage = eigenvalues / self._shifted
        self._images = _Images.of(copies, device)
        hat_diagonal = self._hat_diagonal()
        counts = 1 if self._images is None else self._images.counts
        freedom = (1 - counts * hat_diagonal).clamp_(min=LEAST_FREEDOM)
        self._factor = (1 if self._images is None else hat_diagonal) / freedom  # float64 (penalties, n)

    def squares(self, rates: np.ndarray) -> np.ndarray:
        """The sum of squared errors with each penalty, float64 (penalties, sites), of responses float64 (n, sites)."""
        responses = self._responses(rates)
        memory = torch.empty_like(responses.centred)  # fresh memory for each penalty would cost as much as its product
        squares = memory.new_empty(len(PENALTIES), len(memory))
        for penalty in range(len(PENALTIES)):
            errors = self._left_out_errors(responses, slice(penalty, penalty + 1), memory)
            squares[penalty] = torch.linalg.vector_norm(errors, dim=1).square_()
        return squares.cpu().numpy()

    def choice(self, rates: np.ndarray, squares: np.ndarray, chosen: np.ndarray) -> _Choice:
        """What follows from the penalties that were chosen.

        Args:
            rates: float64 (n, sites).
            squares: of these sites.
            chosen: (sites,), positions of the penalties.
        """
        responses = self._responses(rates)
        penalties = torch.from_numpy(chosen).to(self._vectors.device)
        errors = self._left_out_errors(responses, penalties, torch.empty_like(responses.centred))
        variance = responses.centred.square().sum(1).cpu().numpy()
        press = np.take_along_axis(squares, chosen[None], axis=0)[0]
        with np.errstate(invalid="ignore", divide="ignore"):
            inner_r2 = np.where(varies(np.array(len(rates)), variance, responses.mean), 1 - press / variance, np.nan)
        dual = (responses.rotated / self._shifted[penalties]) @ self._vectors.T
        return _Choice(
            penalty=PENALTIES[chosen],
            mean=responses.mean,
            inner_r2=inner_r2,
            dual=dual.cpu().numpy().T,
            left_out=(rates - errors.cpu().numpy().T).astype(np.float32),
        )

    def _responses(self, rates: np.ndarray) -> _Responses:
        mean = rates.mean(axis=0)
        centred = torch.from_numpy(np.ascontiguousarray((rates - mean).T)).to(self._vectors.device)
        return _Responses(mean, centred, centred @ self._vectors)

    def _hat_diagonal(self) -> torch.Tensor:
        """Of each penalty, float64 (penalties, n)."""
        parts = [self._shrinkage @ rows.square().T for rows in self._vectors.split(ROWS_AT_A_TIME)]
        return torch.cat(parts, dim=1) + 1 / len(self._vectors)

    def _left_out_errors(
        self, responses: _Responses, penalties: slice | torch.Tensor, out: torch.Tensor
    ) -> torch.Tensor:
        """The errors for stimuli that are left out, float64 (sites, n), in `out`.

        Args:
            responses: of the sites.
            penalties: positions in the grid, one for all sites or one for each.
            out: (sites, n).
        """
        weights = self._shrinkage[penalties] * responses.rotated
        errors = torch.addmm(responses.centred, weights, self._vectors.T, alpha=-1, out=out)
        if self._images is None:
            return errors.mul_(self._factor[penalties])
        return errors.add_(self._factor[penalties] * self._images.sums(errors))


@dataclass(frozen=True)
class _Images:
    """Which stimuli show the same image.

    Attributes:
        image: int64 (n,), of each stimulus.
        counts: int64 (n,), stimuli with that image.
        number: of different images.
    """

    image: torch.Tensor
    counts: torch.Tensor
    number: int

    @classmethod
    def of(cls, copies: np.ndarray | None, device: torch.device) -> "_Images | None":
        """From `copies` of `GramMatrix`."""
        if copies is None:
            return None
        _, image, counts = np.unique(copies, return_inverse=True, return_counts=True)
        on_device = torch.from_numpy(image).to(device)
        return cls(on_device, torch.from_numpy(counts).to(device)[on_device], len(counts))

    def sums(self, errors: torch.Tensor) -> torch.Tensor:
        """Over the stimuli with the image of each, (sites, n)."""
        of_images = errors.new_zeros(len(errors), self.number).index_add_(1, self.image, errors)
        return of_images[:, self.image]
