"""Exact regression on more features than fit anywhere, through Gram matrices, over all ranks.

With centred features X (n x p) and n << p, everything that ridge regression needs is K = X X' (n x n). Each rank has
computed the features of its own stimuli; the ranks exchange them so that each gets all stimuli of a p / ranks slice,
multiplies those, and the products are summed. That sends every feature at most once, n p (1 - 1/ranks) numbers in all;
no rank ever holds all features of all stimuli.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from train.order import share
from train.runtime import Runtime

CHUNK = 8192  # features in one product, summed up in float64
PENALTIES = np.logspace(-6, 6, 49)  # of ridge, in units of the Gram matrix's mean eigenvalue


def feature_slice(own: torch.Tensor, runtime: Runtime, stimuli: int) -> torch.Tensor:
    """All stimuli of this rank's slice of the features, float32 (stimuli, about features / ranks).

    Args:
        own: float32 (own stimuli, features) of this rank's contiguous share of the stimuli.
        runtime: this process.
        stimuli: of all ranks together.
    """
    ranks, features = runtime.ranks, own.shape[1]
    if ranks == 1:
        return own
    bounds = [rank * features // ranks for rank in range(ranks + 1)]
    rows = [len(share(np.arange(stimuli), rank, ranks)) for rank in range(ranks)]
    width = bounds[runtime.rank + 1] - bounds[runtime.rank]
    sent = torch.cat([own[:, bounds[k] : bounds[k + 1]].flatten() for k in range(ranks)]).to(runtime.device)
    received = torch.empty(stimuli * width, device=runtime.device)
    dist.all_to_all_single(
        received,
        sent,
        output_split_sizes=[count * width for count in rows],
        input_split_sizes=[len(own) * (bounds[k + 1] - bounds[k]) for k in range(ranks)],
    )
    return received.view(stimuli, width)


@dataclass
class Gram:
    """Inner products of features centred on the train stimuli's mean, float64.

    Attributes:
        train: (train, train).
        cross: (held out, train).
    """

    train: np.ndarray
    cross: np.ndarray


def gram(train: torch.Tensor, held_out: torch.Tensor, runtime: Runtime, owner: int) -> Gram | None:
    """Centred Gram matrices over all features, on the rank that is to use them; None on the others.

    Args:
        train, held_out: float32 (stimuli, slice) as `feature_slice` gives them.
        runtime: this process.
        owner: the rank that gets them.
    """
    n = len(train)
    total = torch.zeros(n + len(held_out), n, dtype=torch.float64, device=train.device)
    for start in range(0, train.shape[1], CHUNK):
        chunk = train[:, start : start + CHUNK]
        mean = chunk.double().mean(0)
        centred = (chunk.double() - mean).float()
        other = (held_out[:, start : start + CHUNK].double() - mean).float()
        total += (torch.cat((centred, other)) @ centred.T).double()
    summed = runtime.sum_to(total, owner)
    if summed is None:
        return None
    total = summed.cpu().numpy()
    return Gram(train=(total[:n] + total[:n].T) / 2, cross=total[n:])


@dataclass
class Ridge:
    """What ridge regression found, per site.

    Attributes:
        prediction: float32 (held out, sites), in the units of the responses.
        penalty: float64 (sites,), chosen by leave-one-out, in units of the mean eigenvalue.
        inner_r2: float64 (sites,), R2 of the leave-one-out predictions of the train stimuli at that penalty.
        dual: float64 (train, sites), the weights of the train stimuli; those of the features are X' dual, with X the
            centred features. 0 for stimuli that a site has no response to.
        mean: float64 (sites,), of the responses; the prediction at the mean features of a site's stimuli.
        left_out: float32 (train, sites), the prediction for each train stimulus from the others; NaN where a site has
            no response to it.
    """

    prediction: np.ndarray
    penalty: np.ndarray
    inner_r2: np.ndarray
    dual: np.ndarray
    mean: np.ndarray
    left_out: np.ndarray


def ridge(kernel: Gram, rates: np.ndarray) -> Ridge:
    """Ridge regression with an intercept and a penalty per site, through the kernel.

    With the eigendecomposition K = U S U', the leave-one-out residual of stimulus i is e_i / (1 - H_ii), H the hat
    matrix (PRESS, Allen 1974), so every penalty on a wide grid costs one product. Sites that were recorded for the
    same stimuli share the decomposition; the kernel is centred anew on the stimuli of each such group.

    Args:
        kernel: of the features.
        rates: float32 (train, sites); NaN = not recorded.
    """
    sites = rates.shape[1]
    nothing = np.full(sites, np.nan)
    result = Ridge(
        prediction=np.full((len(kernel.cross), sites), np.nan, np.float32),
        penalty=nothing,
        inner_r2=nothing.copy(),
        dual=np.zeros((len(rates), sites)),
        mean=nothing.copy(),
        left_out=np.full(rates.shape, np.nan, np.float32),
    )
    patterns, group_of = np.unique(~np.isnan(rates), axis=1, return_inverse=True)
    for index, there in enumerate(patterns.T):
        if there.sum() < 3:
            continue
        group = np.flatnonzero(group_of == index)
        found = _ridge_of_group(_subset(kernel, there), rates[there][:, group].astype(np.float64))
        result.prediction[:, group], result.penalty[group], result.inner_r2[group] = (
            found.prediction,
            found.penalty,
            found.inner_r2,
        )
        result.dual[np.ix_(there, group)], result.mean[group] = found.dual, found.mean
        result.left_out[np.ix_(there, group)] = found.left_out
    return result


def _subset(kernel: Gram, there: np.ndarray) -> Gram:
    """The kernel of some of the train stimuli, centred on their mean."""
    if there.all():
        return kernel
    train, cross = kernel.train[np.ix_(there, there)], kernel.cross[:, there]
    column = train.mean(axis=0)
    overall = column.mean()
    return Gram(
        train=train - column - column[:, None] + overall,
        cross=cross - cross.mean(axis=1, keepdims=True) - column + overall,
    )


def _ridge_of_group(kernel: Gram, rates: np.ndarray) -> Ridge:
    mean = rates.mean(axis=0)
    centred = rates - mean
    values, vectors = np.linalg.eigh(kernel.train)
    values = np.clip(values, 0, None)
    unit = values.mean() or 1.0
    rotated, squared = vectors.T @ centred, vectors**2

    def left_out_errors(penalties: np.ndarray) -> np.ndarray:
        shrink = values[:, None] / (values[:, None] + penalties * unit)
        hat = 1 / len(rates) + squared @ shrink
        return (centred - vectors @ (shrink * rotated)) / np.clip(1 - hat, 1e-9, None)

    variance = np.square(centred).sum(axis=0)
    best = np.full(rates.shape[1], np.inf)
    penalty = np.full(rates.shape[1], PENALTIES[-1])
    for candidate in PENALTIES:
        press = np.square(left_out_errors(np.array([candidate]))).sum(axis=0)
        better = press < best
        best, penalty = np.where(better, press, best), np.where(better, candidate, penalty)
    dual = vectors @ (rotated / (values[:, None] + penalty * unit))
    with np.errstate(invalid="ignore", divide="ignore"):
        inner_r2 = np.where(variance > 0, 1 - best / variance, np.nan)
    return Ridge(
        prediction=(kernel.cross @ dual + mean).astype(np.float32),
        penalty=penalty,
        inner_r2=inner_r2,
        dual=dual,
        mean=mean,
        left_out=(rates - left_out_errors(penalty)).astype(np.float32),
    )
