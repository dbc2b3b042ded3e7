"""The leading components of a large Gram matrix on disk: our search for them against all eigenvectors.

    python benchmarks/components.py [--stimuli 8000] [--components 700] [--sites 200] [--memory 1] [--processes 1]
                                    [--repeats 1] [--json FILE]

The spectrum falls off as in a layer of a network, over noise. Each side runs in processes of its own, each with one
thread, in turns: CPU seconds of the main process for the components and for the ridge on them, its peak memory with all
libraries, and how far the predictions are from those of the other side. `--skip-full` leaves all eigenvectors out.
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

HELD_OUT = 100
SIGNAL = 50  # components that drive the responses
COLUMNS = 1000  # features that are drawn at a time


def make_problem(folder: Path, stimuli: int, features: int, sites: int) -> None:
    """Write the products as float32, and responses."""
    draw = np.random.default_rng(0)
    rank, count = min(stimuli, 3000), stimuli + HELD_OUT
    left = draw.standard_normal((count, rank), np.float32) * np.arange(1, rank + 1, dtype=np.float32) ** -0.5
    products = np.lib.format.open_memmap(folder / "products.npy", "w+", np.float32, (count, count))
    for _ in range(0, features, COLUMNS):
        block = left @ draw.standard_normal((rank, COLUMNS), np.float32)
        block += 0.3 * draw.standard_normal((count, COLUMNS), np.float32)
        block -= block.mean(0)
        for start in range(0, count, COLUMNS):
            products[start : start + COLUMNS] += block[start : start + COLUMNS] @ block.T
    signal = left[:stimuli, :SIGNAL] @ draw.normal(size=(SIGNAL, sites))
    rates = signal + signal.std() * draw.normal(size=signal.shape)
    np.save(folder / "rates.npy", rates.astype(np.float32))


def one_side(side: str, folder: Path, options: argparse.Namespace) -> None:
    """Find the components and fit, in one of the processes of a side."""
    from train.distributed.runtime import start_runtime
    from train.regression import krylov
    from train.regression.methods import Method, regress
    from train.regression.rows import RowFile, stripe
    from train.regression.striped_gram import StripedGram

    if side == "all eigenvectors":
        krylov.LEAST_STIMULI = sys.maxsize
    fit, held_out = np.arange(options.stimuli), np.arange(options.stimuli, options.stimuli + HELD_OUT)
    with start_runtime(None, "fp32") as runtime:
        whole, count = RowFile(folder / "products.npy"), options.stimuli + HELD_OUT
        own = stripe(count, runtime.rank, runtime.ranks)
        rows: RowFile | np.ndarray = whole if runtime.ranks == 1 else whole[own]
        memory = options.memory * 2**30
        gram = StripedGram(rows, own.start, fit, held_out, runtime, rounding=2e-7, memory_bytes=memory)
        started_at = time.process_time()
        facts = gram.leading(options.components).facts
        found_at = time.process_time()
        prediction = regress(gram, np.load(folder / "rates.npy"), Method("ridge", options.components)).prediction
        if runtime.is_main:
            np.save(folder / f"{side}.npy", prediction)
            seconds = {"components": found_at - started_at, "ridge": time.process_time() - found_at}
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(f"{side}: {facts}", file=sys.stderr)
            print(json.dumps({**seconds, "gib": peak}))


def run_side(side: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """A side in processes of its own: its seconds and GiB."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.processes}"]
    words += [__file__, "--one", side, "--folder", str(folder), "--components", str(options.components)]
    words += ["--stimuli", str(options.stimuli), "--memory", str(options.memory)]
    output = run_checked(words, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    return json.loads(output.splitlines()[-1])


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Run the sides in turns and print the comparison."""
    names = ["search"] if options.skip_full else ["search", "all eigenvectors"]
    measured = measure_in_turns(
        {name: partial(run_side, name, folder, options) for name in names}, options.repeats, warm_up=0
    )
    reference = {} if options.skip_full else {"of all eigenvectors": "all eigenvectors"}
    for key in ("components", "ridge", "gib"):
        print(measured[key].table(f"{key}, GiB" if key == "gib" else f"{key}, CPU seconds", reference))
    write_json(options, {name: turns.values for name, turns in measured.items()})
    if not options.skip_full:
        ours, exact = (np.load(folder / f"{name}.npy") for name in names)
        error = np.abs(ours - exact).max() / np.abs(exact).max()
        print(f"largest difference of the predictions: {error:.1e} of the largest")


def main() -> None:
    """Make the products and measure."""
    parser = options_of(__doc__, repeats=1)
    for name, value in (("stimuli", 8000), ("components", 700), ("sites", 200), ("features", 6000), ("processes", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--memory", type=float, default=1.0)
    parser.add_argument("--skip-full", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one_side(options.one, options.folder, options)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_problem(Path(folder), options.stimuli, options.features, options.sites)
        measure(Path(folder), options)


if __name__ == "__main__":
    main()
