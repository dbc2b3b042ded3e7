"""Principal components and regression, ours against the scikit-learn recipe, side by side on the same features.

    python benchmarks/probe.py [--stimuli 2592] [--held-out 288] [--features 50176] [--sites 168] [--components 1000]
                               [--repeats 3] [--exact]

Every side runs in a process of its own (its peak memory is its own) from features that lie on disk, in turns; medians
over the repeats, and how far the predictions are from those of the full singular value decomposition (where that fits,
`--exact`).
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SIDES = ("ours", "scikit-learn")


def make_problem(folder: Path, stimuli: int, features: int, sites: int) -> None:
    """Features whose variances fall off as in a network's layer, and responses that depend on the leading ones."""
    draw = np.random.default_rng(0)
    rank = min(stimuli, features)
    left = draw.normal(size=(stimuli, rank)).astype(np.float32) * np.arange(1, rank + 1, dtype=np.float32) ** -0.5
    whole = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float32, (stimuli, features))
    for start in range(0, features, 8192):
        stop = min(start + 8192, features)
        whole[:, start:stop] = left @ draw.normal(size=(rank, stop - start)).astype(np.float32)
        whole[:, start:stop] += draw.normal(size=(stimuli, stop - start)).astype(np.float32)
    whole.flush()
    rates = left[:, :50] @ draw.normal(size=(50, sites)) + draw.normal(size=(stimuli, sites))
    np.save(folder / "rates.npy", rates.astype(np.float32))


def ours(folder: Path, fit: int, components: int) -> dict[str, np.ndarray]:
    """Gram matrix in blocks, one eigendecomposition for both regressions."""
    import torch

    from train.gram import COLUMNS, ROUNDING, multiplied
    from train.kernel_regression import Method, centred, regress

    features, rates = np.load(folder / "features.npy", mmap_mode="r"), np.load(folder / "rates.npy")
    total = torch.zeros(len(features), len(features), dtype=torch.float64)
    for start in range(0, features.shape[1], COLUMNS):
        chunk = torch.from_numpy(np.array(features[:, start : start + COLUMNS]))
        chunk -= chunk.mean(0, dtype=torch.float64).float()
        total += multiplied(chunk, "float32")
    everyone = np.arange(len(features))
    gram = centred(total.numpy(), everyone[:fit], everyone[fit:], ROUNDING["float32"])
    return {kind: regress(gram, rates[:fit], Method(kind, components)).prediction for kind in ("ols", "ridge")}


def scikit_learn(folder: Path, fit: int, components: int, solver: str = "auto") -> dict[str, np.ndarray]:
    """PCA as everyone calls it, then LinearRegression and RidgeCV."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LinearRegression, RidgeCV

    features, rates = np.load(folder / "features.npy"), np.load(folder / "rates.npy")
    pca = PCA(components, svd_solver=solver, random_state=0)
    scores, new = pca.fit_transform(features[:fit]), pca.transform(features[fit:])
    found = {"ols": LinearRegression().fit(scores, rates[:fit]).predict(new)}
    if solver == "auto":
        penalties = np.logspace(-6, 6, 49) * np.square(scores).sum() / fit
        ridge = RidgeCV(alphas=penalties, alpha_per_target=True, gcv_mode="eigen")
        found["ridge"] = ridge.fit(scores, rates[:fit]).predict(new)
    return found


def one(side: str, folder: Path, fit: int, components: int) -> None:
    """Run a side and print its seconds and peak memory."""
    started = time.monotonic()
    match side:
        case "ours":
            found = ours(folder, fit, components)
        case "exact":
            found = scikit_learn(folder, fit, components, solver="full")
        case _:
            found = scikit_learn(folder, fit, components)
    seconds = time.monotonic() - started
    np.savez(folder / f"{side}.npz", **found)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": seconds, "gib": peak}))


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Run the sides in turns and print the comparison."""
    sides = (*SIDES, "exact") if options.exact else SIDES
    found: dict[str, list[dict]] = {side: [] for side in sides}
    for repeat in range(options.repeats):
        for side in sides if repeat == 0 else SIDES:
            words = [sys.executable, __file__, "--one", side, "--folder", str(folder)]
            words += ["--stimuli", str(options.stimuli), "--components", str(options.components)]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {side: statistics.median(run["seconds"] for run in runs) for side, runs in found.items()}
    for side, runs in found.items():
        seconds = [run["seconds"] for run in runs]
        print(
            f"{side:<14} {medians[side]:7.1f} s ({min(seconds):.1f} to {max(seconds):.1f})  "
            f"{max(run['gib'] for run in runs):5.1f} GiB  {medians['scikit-learn'] / medians[side]:5.1f}x"
        )
    if options.exact:
        exact = np.load(folder / "exact.npz")["ols"]
        for side in SIDES:
            error = np.abs(np.load(folder / f"{side}.npz")["ols"] - exact).max() / np.abs(exact).max()
            print(f"{side}: largest difference from the full decomposition {error:.1e} of the largest prediction")


def main() -> None:
    """Make the features and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("stimuli", 2592), ("held-out", 288), ("features", 50176), ("sites", 168)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--components", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options.one, options.folder, options.stimuli, options.components)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_problem(Path(folder), options.stimuli + options.held_out, options.features, options.sites)
        measure(Path(folder), options)


if __name__ == "__main__":
    main()
