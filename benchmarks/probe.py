"""Principal components and regression: ours against scikit-learn, on the same features.

    python benchmarks/probe.py [--stimuli 2592] [--held-out 288] [--features 50176] [--sites 168] [--components 1000]
                               [--repeats 3] [--processes 1 2] [--exact] [--json FILE]

Every side runs in processes of its own (its peak memory is its own, the largest of its processes'), each with one
thread, from features that lie on disk, in turns; medians over the repeats without the time of the imports, and how far
the predictions are from those of the full singular value decomposition (where that fits, `--exact`).
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from harness import measure_in_turns, options_of, run_checked, write_json


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


def rank_stores(folder: Path, counts: tuple[int, int], runtime) -> list:
    """This process's share of the stimuli to fit and of those held out, as a probe has them on disk."""
    import torch

    from train.data.order import share
    from train.regression.feature_store import FeatureStore

    stores, start = [], 0
    for name, count in zip(("fit", "held_out"), counts, strict=True):
        whole = np.load(folder / "features.npy", mmap_mode="r")
        width = whole.shape[1]
        store = FeatureStore(folder / f"{name}_{runtime.rank}_of_{runtime.ranks}", {"layer": width})
        store.truncate(0)
        for position in share(np.arange(start, start + count), runtime.rank, runtime.ranks):
            # Not through the map: its pages would count as this process's memory.
            row = np.fromfile(whole.filename, np.float32, width, offset=whole.offset + int(position) * width * 4)
            store.append({"layer": torch.from_numpy(row[None])})
        stores.append(store)
        start += count
    return stores


def ours(folder: Path, counts: tuple[int, int], components: int) -> None:
    """The Gram matrix over all processes, one eigendecomposition for both regressions."""
    from train.distributed.runtime import start_runtime
    from train.regression.feature_slices import StoredActivations
    from train.regression.gram import centred_gram
    from train.regression.inner_products import inner_products
    from train.regression.methods import Method, regress
    from train.regression.precision import ROUNDING

    with start_runtime(None, "fp32") as runtime:
        stores, rates = rank_stores(folder, counts, runtime), np.load(folder / "rates.npy")
        runtime.barrier()
        started_at = time.monotonic()
        products = inner_products(StoredActivations(stores, counts, runtime, 0.5, "float32"), "layer", 0)
        if runtime.is_main:
            everyone = np.arange(sum(counts))
            gram = centred_gram(products, everyone[: counts[0]], everyone[counts[0] :], ROUNDING["float32"])
            fits = {kind: regress(gram, rates[: counts[0]], Method(kind, components)) for kind in ("ols", "ridge")}
            seconds = time.monotonic() - started_at
            np.savez(folder / f"ours_{runtime.ranks}.npz", **{kind: fit.prediction for kind, fit in fits.items()})
        peaks = runtime.gather_objects(peak_memory())
        if runtime.is_main:
            print(json.dumps({"seconds": seconds, "gib": max(peaks)}))


def scikit_learn(folder: Path, counts: tuple[int, int], components: int, solver: str = "auto") -> None:
    """PCA as everyone calls it, then LinearRegression and RidgeCV."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LinearRegression, RidgeCV

    started_at, fit = time.monotonic(), counts[0]
    features, rates = np.load(folder / "features.npy"), np.load(folder / "rates.npy")
    pca = PCA(components, svd_solver=solver, random_state=0)
    scores, new = pca.fit_transform(features[:fit]), pca.transform(features[fit:])
    predictions = {"ols": LinearRegression().fit(scores, rates[:fit]).predict(new)}
    if solver == "auto":
        penalties = np.logspace(-6, 6, 49) * np.square(scores).sum() / fit
        ridge = RidgeCV(alphas=penalties, alpha_per_target=True, gcv_mode="eigen")
        predictions["ridge"] = ridge.fit(scores, rates[:fit]).predict(new)
    ended_at = time.monotonic()
    np.savez(folder / f"{'exact' if solver == 'full' else 'scikit-learn'}.npz", **predictions)
    print(json.dumps({"seconds": ended_at - started_at, "gib": peak_memory()}))


def peak_memory() -> float:
    """Peak resident memory of this process, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def run_side(side: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """A side in processes of its own: its seconds and GiB."""
    processes = int(side.removeprefix("ours_")) if side.startswith("ours") else 1
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    words += [__file__, "--one", side, "--folder", str(folder), "--components", str(options.components)]
    words += ["--stimuli", str(options.stimuli), "--held-out", str(options.held_out)]
    output = run_checked(words, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    return json.loads(output.splitlines()[-1])


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Run the sides in turns and print the comparison."""
    sides = {name: partial(run_side, name, folder, options) for name in sides_of(options)}
    measured = measure_in_turns(sides, options.repeats, warm_up=0)
    print(measured["seconds"].table("seconds", {"of scikit-learn": "scikit-learn"}))
    print(measured["gib"].table("GiB", {"of scikit-learn": "scikit-learn"}))
    write_json(options, {name: turns.values for name, turns in measured.items()})
    if options.exact:
        run_side("exact", folder, options)
        exact = np.load(folder / "exact.npz")["ols"]
        for side in sides:
            error = np.abs(np.load(folder / f"{side}.npz")["ols"] - exact).max() / np.abs(exact).max()
            print(f"{side}: largest difference from the full decomposition {error:.1e} of the largest prediction")


def sides_of(options: argparse.Namespace) -> list[str]:
    """Ours on each number of processes, and scikit-learn."""
    return [*(f"ours_{processes}" for processes in options.processes), "scikit-learn"]


def main() -> None:
    """Make the features and measure."""
    parser = options_of(__doc__, repeats=3)
    for name, value in (("stimuli", 2592), ("held-out", 288), ("features", 50176), ("sites", 168)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--components", type=int, default=1000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        sides = {"scikit-learn": scikit_learn, "exact": partial(scikit_learn, solver="full")}
        sides.get(options.one, ours)(options.folder, (options.stimuli, options.held_out), options.components)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_problem(Path(folder), options.stimuli + options.held_out, options.features, options.sites)
        measure(Path(folder), options)


if __name__ == "__main__":
    main()
