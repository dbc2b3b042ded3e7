"""Compare every strategy, number of processes, optimizer and precision with one process of DDP, in real runs.

    python benchmarks/parity.py [--processes 1 2 3] [--strategies ddp zero0 ...] [--optimizers nadam adamw sgd]
                                [--precisions fp32 bf16] [--resume]

Each run trains a small network without batch statistics for two epochs of five steps, with accumulation and clipping,
and is compared with one process of DDP in the same precision: the largest relative difference of a loss and the
largest absolute one of a weight. With `--resume` the run of each strategy on two processes is stopped after step 8
and resumed under every strategy and number of processes. The tolerances allow for float32 sums in another order (1e-6
of a loss, 1e-5 of a weight), and for bf16, which rounds each factor to 4e-3 and depends on batch shapes (1e-4, 1e-2).
Exits with 1 if one is exceeded or a run fails.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

from harness import CommandFailed, run_checked
from safetensors.torch import load_file
from synthetic import STRATEGIES, pack_simulated, setting_of

TOLERANCE = {"fp32": (1e-6, 1e-5), "bf16": (1e-4, 1e-2)}
RECIPE = [
    *("--backbone.name", "test_convnext", "--backbone.weights", "random", "--epochs", "2", "--images.size", "32"),
    *("--batch.global-size", "32", "--batch.per-device", "10", "--optimizer.clip-norm", "0.5"),
    *("--optimizer.lr", "1e-3", "--loader.workers", "0", "--ema", "0.9"),
    *("--checkpoint.every-steps", "4", "--checkpoint.keep", "100"),
]


def run(processes: int, *words: str | Path) -> None:
    """Run a command of train/ on some processes with one thread each; it must succeed."""
    run_checked(["bash", "launch/local.sh", "-n", processes, *words], OMP_NUM_THREADS="1")


def train(data: Path, out: Path, processes: int, strategy: str, optimizer: str, precision: str) -> Path:
    """Train, unless the run exists; returns its folder."""
    if not out.exists():
        options = ["--optimizer.name", optimizer, "--precision", precision, "--strategy", setting_of(strategy)]
        run(processes, "train/finetune.py", "--data", data, "--out", out, *RECIPE, *options)
    return out


def resume(data: Path, before: Path, out: Path, processes: int, strategy: str) -> Path:
    """Resume a copy of a run that was stopped after step 8 of 10; returns its folder."""
    shutil.copytree(before, out, symlinks=True)
    for checkpoint in (out / "checkpoints").glob("step_*"):
        if int(checkpoint.name.removeprefix("step_")) > 8:
            shutil.rmtree(checkpoint)
    run(processes, "train/finetune.py", "--data", data, "--out", out, "--resume", "--strategy", setting_of(strategy))
    return out


def differences(one: Path, other: Path) -> tuple[float, float]:
    """The largest relative difference of a loss, and the largest absolute one of the averaged weights."""
    losses = [[json.loads(line)["loss"] for line in (run / "history.jsonl").open()] for run in (one, other)]
    weights = [load_file(run / "checkpoints" / "last" / "network.safetensors") for run in (one, other)]
    return (
        max(abs(a / b - 1) for a, b in zip(*losses, strict=True)),
        max(float((x.double() - weights[1][name].double()).abs().max()) for name, x in weights[0].items()),
    )


Comparison = tuple[str, str, Callable[[], Path], Callable[[], Path]]


def matrix(data: Path, folder: Path, options: argparse.Namespace) -> Iterator[Comparison]:
    """The label and precision of each comparison, and the functions that make the run and its reference."""

    def trained(precision: str, optimizer: str, strategy: str, processes: int) -> Path:
        out = folder / f"{precision}_{optimizer}_{strategy}_{processes}"
        return train(data, out, processes, strategy, optimizer, precision)

    for precision, optimizer in product(options.precisions, options.optimizers):
        reference = partial(trained, precision, optimizer, "ddp", 1)
        for strategy, processes in product(options.strategies, options.processes):
            label = f"{precision} {optimizer:<6} {strategy:<14} {processes}"
            yield label, precision, partial(trained, precision, optimizer, strategy, processes), reference
    if options.resume:
        for before, after, processes in product(options.strategies, options.strategies, options.processes):

            def resumed(before: str = before, after: str = after, processes: int = processes) -> Path:
                out = folder / f"{before}_then_{after}_{processes}"
                return resume(data, trained("fp32", "nadam", before, 2), out, processes, after)

            label = f"resume {before} on 2 -> {after} on {processes}"
            yield label, "fp32", resumed, partial(trained, "fp32", "nadam", "ddp", 1)


def compare(label: str, precision: str, one: Callable[[], Path], reference: Callable[[], Path]) -> bool:
    """Make both runs and print their differences; returns whether these are within the tolerance."""
    try:
        loss, weight = differences(one(), reference())
    except CommandFailed as failed:
        print(f"{label:<45} FAILED: {failed}", flush=True)
        return False
    fine = loss <= TOLERANCE[precision][0] and weight <= TOLERANCE[precision][1]
    print(f"{label:<45} loss {loss:.0e}  weights {weight:.0e}  {'' if fine else 'EXCEEDED'}", flush=True)
    return fine


def main() -> None:
    """Make a recording, run the matrix, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, choices=STRATEGIES)
    parser.add_argument("--optimizers", nargs="+", default=["nadam", "adamw", "sgd"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=list(TOLERANCE))
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = pack_simulated(folder / "data", side=48)
        fine = [compare(*comparison) for comparison in matrix(data, folder, options)]
    print(f"{sum(fine)} of {len(fine)} within the tolerance")
    sys.exit(0 if all(fine) else 1)


if __name__ == "__main__":
    main()
