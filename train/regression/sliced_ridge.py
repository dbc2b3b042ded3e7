"""Ridge on features that are sliced over ranks: each rank has all stimuli of a slice (`feature_slices.py`)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from train.distributed.runtime import Runtime
from train.regression.decomposition import eigh_on
from train.regression.gram import FeatureMatrix, Predictors, centred_gram
from train.regression.krylov import LEAST_STIMULI
from train.regression.precision import COLUMNS_PER_PRODUCT, ROUNDING, SymmetricSum
from train.regression.ridge import RidgeFit, ridge
from train.regression.rows import Alone
from train.regression.striped_features import StripedFeatures


@dataclass(frozen=True)
class LinearMap:
    """From features to outputs: `weight`, float32 (outputs, features), and `bias`, float32 (outputs,)."""

    weight: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def stacked(cls, maps: "Sequence[LinearMap]") -> "LinearMap":
        """The outputs of one map after the other."""
        return cls(torch.cat([part.weight for part in maps]), torch.cat([part.bias for part in maps]))


def fit_ridge(
    features: torch.Tensor, targets: np.ndarray, runtime: Runtime, copies: np.ndarray | None = None
) -> RidgeFit:
    """A ridge on all features, the same on every rank; it predicts only the stimuli left out.

    Args:
        features: this rank's slice, float32 (stimuli, features).
        targets: float32 (stimuli, outputs); NaN where unknown.
        runtime: this process.
        copies: (stimuli,), equal for stimuli that show the same image, which are left out together; None if all differ.
    """
    width = int(runtime.sum(torch.tensor(features.shape[1], device=features.device)))
    fit: RidgeFit | None = None
    if width < len(features):
        whole = runtime.gather_rows(features.T.contiguous()).T
        if runtime.is_main:
            fit = ridge(_few_features(whole, copies, runtime), targets)
    else:
        products = _inner_products(features, runtime)
        if products is not None:
            everyone = np.arange(len(features))
            decompose = eigh_on(runtime.device)
            gram = centred_gram(products.cpu().numpy(), everyone, everyone[:0], ROUNDING["float32"], decompose)
            fit = ridge(replace(gram, copies=copies), targets)
    return runtime.gather_objects(fit)[0]


def _few_features(features: np.ndarray, copies: np.ndarray | None, runtime: Runtime) -> Predictors:
    """Features (stimuli, features), fewer than stimuli, on one rank; of many stimuli through their covariance."""
    if len(features) < LEAST_STIMULI:
        return replace(FeatureMatrix.centred(features, features[:0]), copies=copies)
    everyone = np.arange(len(features))
    return StripedFeatures(features, everyone, everyone, everyone[:0], Alone(runtime.device), copies=copies)


def _inner_products(features: torch.Tensor, runtime: Runtime) -> torch.Tensor | None:
    """Of the stimuli's features, float64 (stimuli, stimuli), on the main rank; None on the others."""
    products = SymmetricSum(len(features), "float32", features.device)
    for start in range(0, features.shape[1], COLUMNS_PER_PRODUCT):
        columns = features[:, start : start + COLUMNS_PER_PRODUCT]
        products.add(columns - columns.mean(0, dtype=torch.float64).float())
    return runtime.reduce_to(products.total(), 0)


def as_linear_map(features: torch.Tensor, fit: RidgeFit, runtime: Runtime) -> LinearMap:
    """A ridge as a map of all features, from its dual weights of the stimuli.

    An output that lacks responses to some stimuli has a dual weight of 0 there, and its features are centred on the
    others. One that has no responses predicts 0.
    """
    device = features.device
    dual = torch.from_numpy(fit.dual).to(device)
    mean_over_recorded = (dual != 0).double()
    mean_over_recorded /= mean_over_recorded.sum(0).clamp(min=1)
    weights, shift = [], torch.zeros(dual.shape[1], dtype=torch.float64, device=device)
    for start in range(0, features.shape[1], COLUMNS_PER_PRODUCT):
        columns = features[:, start : start + COLUMNS_PER_PRODUCT].double()
        weights.append((columns - columns.mean(0)).T @ dual)
        shift += ((mean_over_recorded.T @ columns) * weights[-1].T).sum(1)
    slice_weight = torch.cat(weights).float() if weights else torch.zeros(0, dual.shape[1], device=device)
    weight = torch.from_numpy(runtime.gather_rows(slice_weight)).to(device).T
    bias = torch.from_numpy(np.nan_to_num(fit.mean)).to(device) - runtime.sum(shift)
    return LinearMap(weight, bias.float())


def linear_outputs(features: torch.Tensor, linear_map: LinearMap, runtime: Runtime) -> torch.Tensor:
    """The outputs of a map for all stimuli, float32 (stimuli, outputs), from each rank's slice of the features."""
    weight = linear_map.weight
    first = runtime.rank * weight.shape[1] // runtime.ranks
    slice_weight = weight[:, first : first + features.shape[1]].double()
    total = torch.zeros(len(features), len(weight), dtype=torch.float64, device=features.device)
    for start in range(0, features.shape[1], COLUMNS_PER_PRODUCT):
        columns = slice(start, start + COLUMNS_PER_PRODUCT)
        total += features[:, columns].double() @ slice_weight[:, columns].T
    return (runtime.sum(total) + linear_map.bias).float()
