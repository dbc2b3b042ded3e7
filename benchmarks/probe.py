"""Principal components and ridge: ours against scikit-learn, on the same features.

    python benchmarks/probe.py [--stimuli 2592] [--held-out 288] [--features 50176] [--sites 168] [--components 1000]
                               [--layers 1] [--memory 0.5] [--repeats 3] [--processes 1 2] [--exact] [--json FILE]

Ridge on principal components with a penalty per site. Every side runs in processes of its own, each with one thread,
from features that lie on disk, in turns. On a busy machine the CPU seconds still tell what a side needs. Peak memory
is what the kernel counted (VmHWM), with all libraries. Medians over the repeats without the time of the imports, and
how far the predictions are from those of the full singular value decomposition (where that fits, `--exact`). himalaya
has no principal components: its ridge is on all features. Ours is what train/probe.py does once activations are
stored.
"""

import argparse
import importlib.util
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from harness import CommandFailed, measure_in_turns, options_of, run_alone, write_json


def make_problem(folder: Path, stimuli: int, features: int, sites: int) -> None:
    """Features whose variances fall off as in a network's layer, and responses that depend on the leading ones."""
    draw = np.random.default_rng(0)
    rank = min(stimuli, features)
    left = draw.normal(size=(stimuli, rank)).astype(np.float32) * np.arange(1, rank + 1, dtype=np.float32) ** -0.5
    whole = np.memmap(folder / "features.f32", np.float32, "w+", shape=(stimuli, features))
    for start in range(0, features, 8192):
        stop = min(start + 8192, features)
        whole[:, start:stop] = left @ draw.normal(size=(rank, stop - start)).astype(np.float32)
        whole[:, start:stop] += draw.normal(size=(stimuli, stop - start)).astype(np.float32)
    whole.flush()
    rates = left[:, :50] @ draw.normal(size=(50, sites)) + draw.normal(size=(stimuli, sites))
    np.save(folder / "rates.npy", rates.astype(np.float32))


def ours(folder: Path, options: argparse.Namespace) -> None:
    """What train/probe.py does once the activations are on disk, over all processes."""
    from stored_problem import StoredProblem

    from train.distributed.runtime import start_runtime
    from train.probing.layer_regressions import LayerRegressions, Partition
    from train.probing.layer_results import ResultFiles
    from train.probing.product_store import ProductStore
    from train.run.folder import RunFolder
    from train.run.monitor import Monitor
    from train.run.recipe import ProbeRecipe

    counts = counts_of(options)
    recipe = ProbeRecipe(components=options.components, memory=options.memory)
    layers = [f"layer{number}" for number in range(options.layers)]
    everyone = np.arange(sum(counts))
    partition = Partition(everyone[: counts[0]], everyone[counts[0] :], [])
    with start_runtime(None, "fp32") as runtime:
        silent = Monitor(RunFolder(folder), is_main=False, trackers=[])
        stored = StoredProblem(folder, counts, layers, recipe, runtime)
        stored.store()
        rates = np.load(folder / "rates.npy")
        imported = peak_memory()
        runtime.barrier()
        started_at, cpu_before = time.monotonic(), time.process_time()
        products, files = ProductStore(recipe, stored, runtime, silent), ResultFiles(stored.folder / "results")
        results = LayerRegressions(recipe, layers, [partition], rates, products, files, runtime, silent).run()
        seconds, cpu = time.monotonic() - started_at, time.process_time() - cpu_before
        if runtime.is_main:
            np.savez(folder / f"ours_{runtime.ranks}.npz", ridge=results[layers[0]].prediction)
        peaks, cpu_of_all = runtime.gather_objects(peak_memory()), runtime.gather_objects(cpu)
        if runtime.is_main:
            found = results[layers[0]].components
            print(f"{runtime.ranks} processes: components {found}; {imported:.2f} GiB before", file=sys.stderr)
            memory = {"gib": max(peaks), "gib of all": sum(peaks)}
            print(json.dumps({"seconds": seconds, "cpu": max(cpu_of_all)} | memory))
        runtime.barrier()
        shutil.rmtree(stored.folder)


def scikit_learn(folder: Path, options: argparse.Namespace, solver: str = "auto") -> None:
    """PCA with its default settings, then RidgeCV with a penalty per site; each layer by itself."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import RidgeCV

    started_at, cpu_before, fit = time.monotonic(), time.process_time(), options.stimuli
    rates = np.load(folder / "rates.npy")
    prediction = np.empty(0)  # of the last layer
    for _ in range(options.layers if solver == "auto" else 1):
        features = np.fromfile(folder / "features.f32", np.float32).reshape(len(rates), -1)
        pca = PCA(options.components, svd_solver=solver, random_state=0)
        scores, new = pca.fit_transform(features[:fit]), pca.transform(features[fit:])
        del features
        # The penalties of ours, in units of the mean over stimuli of their squared distance from the mean.
        variance = pca.explained_variance_[0] / pca.explained_variance_ratio_[0] * (fit - 1) / fit
        ridge = RidgeCV(alphas=np.logspace(-6, 6, 49) * variance, alpha_per_target=True)
        prediction = ridge.fit(scores, rates[:fit]).predict(new)
        del scores, new, pca
    used = {"seconds": time.monotonic() - started_at, "cpu": time.process_time() - cpu_before}
    np.savez(folder / f"{'exact' if solver == 'full' else 'scikit-learn'}.npz", ridge=prediction)
    print(json.dumps(used | {"gib": peak_memory(), "gib of all": peak_memory()}))


def himalaya(folder: Path, options: argparse.Namespace) -> None:
    """Ridge on all features through their kernel, a penalty per site by five folds, in float32."""
    from himalaya.backend import set_backend
    from himalaya.kernel_ridge import KernelRidgeCV

    backend = set_backend("torch_cuda" if options.gpu else "torch")
    started_at, cpu_before, fit = time.monotonic(), time.process_time(), options.stimuli
    rates = np.load(folder / "rates.npy")
    prediction = np.empty(0)  # of the last layer
    for _ in range(options.layers):
        features = np.fromfile(folder / "features.f32", np.float32).reshape(len(rates), -1)
        mean, mean_rates = features[:fit].mean(axis=0), rates[:fit].mean(axis=0)
        features -= mean
        unit = float(np.vdot(features[:fit], features[:fit])) / fit
        ridge = KernelRidgeCV(alphas=np.logspace(-6, 6, 49).astype(np.float32) * unit, kernel="linear")
        ridge.fit(backend.asarray(features[:fit]), backend.asarray(rates[:fit] - mean_rates))
        prediction = backend.to_numpy(ridge.predict(backend.asarray(features[fit:]))) + mean_rates
    used = {"seconds": time.monotonic() - started_at, "cpu": time.process_time() - cpu_before}
    np.savez(folder / "himalaya.npz", ridge=prediction)
    print(json.dumps(used | {"gib": peak_memory(), "gib of all": peak_memory()}))


def counts_of(options: argparse.Namespace) -> tuple[int, int]:
    """Stimuli to fit and held out."""
    return options.stimuli, options.held_out


def peak_memory() -> float:
    """Peak resident memory of this process, in GiB, as the kernel counts it."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2**20


def run_side(side: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """A side in processes of its own: its seconds and GiB."""
    processes = int(side.removeprefix("ours_")) if side.startswith("ours") else 1
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    words += [__file__, "--one", side, "--folder", str(folder)]
    if options.gpu:
        words.append("--gpu")
    for name in ("components", "stimuli", "held_out", "layers", "memory"):
        words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    threads = "1" if side.startswith("ours") else str(options.rival_threads)
    limits = {f"{library}_NUM_THREADS": threads for library in ("OMP", "OPENBLAS", "MKL")}
    status, output = run_alone(words, options.limit, **limits)
    if status is None:
        nothing = float("nan")
        print(f"{side}: given up after {options.limit:g} s")
        return dict.fromkeys(("seconds", "cpu", "gib", "gib of all"), nothing)
    if status:
        raise CommandFailed(f"{side} failed:\n{output[-3000:]}")
    return json.loads(next(line for line in reversed(output.splitlines()) if line.startswith("{")))


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Run the sides in turns and print the comparison."""
    sides = {name: partial(run_side, name, folder, options) for name in sides_of(options)}
    measured = measure_in_turns(sides, options.repeats, warm_up=0)
    print(measured["seconds"].table("seconds", {"of scikit-learn": "scikit-learn"}))
    print(measured["cpu"].table("CPU seconds of the busiest process", {"of scikit-learn": "scikit-learn"}))
    print(measured["gib"].table("GiB of the largest process", {"of scikit-learn": "scikit-learn"}))
    print(measured["gib of all"].table("GiB of all processes", {"of scikit-learn": "scikit-learn"}))
    write_json(options, {name: turns.values for name, turns in measured.items()})
    if options.exact:
        run_side("exact", folder, options)
        exact = np.load(folder / "exact.npz")["ridge"]
        for side in [side for side in sides if (folder / f"{side}.npz").exists()]:
            error = np.abs(np.load(folder / f"{side}.npz")["ridge"] - exact).max() / np.abs(exact).max()
            print(f"{side}: largest difference from the full decomposition {error:.1e} of the largest prediction")


def sides_of(options: argparse.Namespace) -> list[str]:
    """Ours on each number of processes, and the rivals."""
    rivals = ["scikit-learn", "himalaya"] if options.himalaya else ["scikit-learn"]
    if "himalaya" in rivals and importlib.util.find_spec("himalaya") is None:
        print("himalaya: not installed")
        rivals.remove("himalaya")
    return [*(f"ours_{processes}" for processes in options.processes), *rivals]


def main() -> None:
    """Make the features and measure."""
    parser = options_of(__doc__, repeats=3)
    for name, value in (("stimuli", 2592), ("held-out", 288), ("features", 50176), ("sites", 168)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--components", type=int, default=1000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--layers", type=int, default=1, help="probed in one run; all have the same features")
    parser.add_argument("--memory", type=float, default=0.5, help="GiB, as --memory of a probe")
    parser.add_argument("--himalaya", action="store_true", help="compare with himalaya too, if it is installed")
    parser.add_argument("--gpu", action="store_true", help="himalaya computes on the GPU")
    parser.add_argument("--rival-threads", type=int, default=1)
    parser.add_argument("--limit", type=float, default=3600, help="seconds after which a side is given up")
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        sides: dict[str, Callable[[Path, argparse.Namespace], None]] = {
            "scikit-learn": scikit_learn,
            "himalaya": himalaya,
            "exact": partial(scikit_learn, solver="full"),
        }
        sides.get(options.one, ours)(options.folder, options)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_problem(Path(folder), options.stimuli + options.held_out, options.features, options.sites)
        measure(Path(folder), options)


if __name__ == "__main__":
    main()
