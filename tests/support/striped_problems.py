"""Features and responses for regressions that several processes share, and what each process does of them.

`python striped_problems.py FOLDER`, started on several processes, fits features.npy and products.npy in FOLDER to
rates.npy, and the main process writes what it found to fits_<processes>.npz.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from train.regression import krylov
from train.regression.fit import Fit
from train.regression.gram import Predictors
from train.regression.methods import Method, regress
from train.regression.rows import Ranks, RowFile, stripe
from train.regression.striped_features import StripedFeatures
from train.regression.striped_gram import StripedGram

STIMULI, SITES, FEW_FEATURES = 800, 5, 50
HELD_OUT = np.arange(100, 140)  # from among the others
METHODS = {
    "ridge": Method("ridge", 40),
    "ols": Method("ols", 40),
    "pls": Method("pls", 5),
    "ridge on all": Method("ridge"),
    "ridge of sites together": Method("ridge", 40, sites_together=True),
}
LEAST_STIMULI = 100  # for a search, here


def features_of(kind: str, stimuli: int = STIMULI, width: int = 1000) -> np.ndarray:
    """Features with variances as they are in a layer of a network, or that are difficult at the cut."""
    generator = np.random.default_rng(0)
    rank = min(stimuli, width)
    strengths = np.arange(1, rank + 1) ** -0.5
    if kind == "steep":
        strengths = np.arange(1, rank + 1) ** -2.0
    if kind == "degenerate":
        strengths[2:38] = strengths[2]  # more equal ones than vectors in a block
    if kind == "low rank":
        strengths[30:] = 0
    features = (generator.normal(size=(stimuli, rank)) * strengths) @ generator.normal(size=(rank, width)) + 0.1
    if kind == "noisy":
        features += generator.normal(size=(stimuli, width))
    if kind == "degenerate":
        left, _, right = np.linalg.svd(features - features.mean(0), full_matrices=False)
        features = (left * strengths) @ right
    return features


def responses_to(features: np.ndarray) -> np.ndarray:
    """Responses of sites, some of them missing."""
    generator = np.random.default_rng(1)
    signal = features[:, :40] @ generator.normal(size=(40, SITES))
    rates = signal + signal.std() * generator.normal(size=signal.shape)
    rates[11:60, 1] = rates[2:5, 3] = np.nan
    return rates.astype(np.float32)


def copies_of(stimuli: int) -> np.ndarray:
    """Labels of images, three of which are the same."""
    copies = np.arange(stimuli)
    copies[[7, 500]] = 3
    return copies


def predictors_on_disk(folder: Path, ranks: Ranks, rounding: float) -> dict[str, Predictors]:
    """This rank's part of what `write_problem` wrote."""
    products, features = RowFile(folder / "products.npy"), RowFile(folder / "features.npy")
    count = products.shape[0]
    fit, own = np.setdiff1d(np.arange(count), HELD_OUT), stripe(count, ranks.rank, ranks.ranks)
    positions = np.arange(ranks.rank, count, ranks.ranks)  # of the features, as a loader deals out stimuli
    every_other = np.ascontiguousarray(features[:][positions])
    copies = copies_of(len(fit))
    return {
        "gram": StripedGram(products[own], own.start, fit, HELD_OUT, ranks, rounding=rounding, copies=copies),
        "features": StripedFeatures(every_other, positions, fit, HELD_OUT, ranks, copies=copies),
    }


def write_problem(folder: Path, dtype: type) -> None:
    """Write features, their inner products as `dtype`, and responses."""
    features = features_of("noisy", STIMULI + len(HELD_OUT))
    fit = np.setdiff1d(np.arange(len(features)), HELD_OUT)
    np.save(folder / "products.npy", (features @ features.T).astype(dtype))
    np.save(folder / "features.npy", features[:, :FEW_FEATURES].astype(np.float32))
    np.save(folder / "rates.npy", responses_to(features[fit]))


def fits_of(predictors: dict[str, Predictors], rates: np.ndarray) -> Iterator[tuple[str, Fit]]:
    """Fits by predictors and method."""
    for name, of in predictors.items():
        for title, method in METHODS.items():
            yield f"{title} on {name}", regress(of, rates, method)


def main() -> None:
    """Fit on the processes of this run."""
    from train.distributed.runtime import start_runtime

    folder = Path(sys.argv[1])
    krylov.LEAST_STIMULI = LEAST_STIMULI
    with start_runtime(None, "fp32") as runtime:
        predictors = predictors_on_disk(folder, runtime, 2e-7)
        arrays = {}
        for name, fit in fits_of(predictors, np.load(folder / "rates.npy")):
            arrays |= {f"{name}: {key}": np.asarray(value) for key, value in vars(fit).items() if key != "spectra"}
            arrays[f"{name}: used"] = np.array([facts.method for facts in fit.spectra])
        digests = runtime.gather_objects({name: array.tobytes() for name, array in arrays.items()})
        assert all(digest == digests[0] for digest in digests), "the ranks have different results"
        if runtime.is_main:
            np.savez(folder / f"fits_{runtime.ranks}.npz", **arrays)


if __name__ == "__main__":
    main()
