"""Memory of weights, gradients and optimizer state per rank under each strategy, measured against theory.

    python benchmarks/memory.py [--processes 1 2 4] [--strategies ddp zero0 ...] [--network resnet18] [--json FILE]

Each line is a real run of N CPU processes over gloo that takes three steps of resnet18 at 32 px with NAdam. What is
counted are the distinct storages of tensors that are alive, in bytes per parameter, on the rank that holds most:
after the backward pass, just before the optimizer steps (weights, gradients, master weights, optimizer state, and
whatever else is alive: buffers, BatchNorm's statistics, the batch); and within the step. Theory in bytes a parameter,
all in float32, for N ranks (Rajbhandari et al. 2020 with 4 bytes where they have 2, as weights stay float32 here):

             weights  gradients  master  state
    ddp         4         4         -      8       every rank holds everything
    zero0       4         4         -      8       the same
    zero1       4        4 / N    4 / N   8 / N    gradients are whole until they are reduced
    zero2       4        4 / N    4 / N   8 / N
    zero3     4 / N      4 / N    4 / N   8 / N

The master weights are a copy, though the weights are float32 themselves: ZeRO-1 and -2 clone their part; ZeRO-3 would
step the weights' own part, but DeepSpeed 0.19.8 compares a torch.device with a string there and so always copies.
ZeRO-3 also keeps small parameters whole on every rank, whose bytes are added to its theory.

Exits with 1 where what is held before the step exceeds what is allowed: the theory and 2 % (parts are padded to equal
length), and under ZeRO-1 and -2 the largest tensor for each end of a rank's part, as they keep the whole gradient of a
parameter that lies across it. Or where a strategy that divides by N does not hold less on more processes.
"""

import argparse
import gc
import sys
import tempfile
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise
from pathlib import Path

import torch
from harness import options_of, read_results, run_alone, table, write_json
from synthetic import STRATEGIES, first_step, pack_simulated, recipe_of, setting_of, training

from train.distributed.engine import StepOutcome
from train.finetuning.loop import Training

KINDS = ("weights", "gradients", "master", "state")
NAMES = tuple(name for name in STRATEGIES if "offload" not in name)
SIDE = 32  # px
TOLERANCE = 0.02
TIMEOUT = 300  # s for one run
BEFORE, WITHIN = "before the step", "within the step"


def theory(strategy: str, ranks: int) -> dict[str, float]:
    """Bytes per parameter that a rank should hold before the step."""
    stage, part = int(strategy.removeprefix("zero")) if strategy != "ddp" else 0, 4 / ranks
    return {
        "weights": part if stage == 3 else 4,
        "gradients": part if stage else 4,
        "master": part if stage else 0,
        "state": 2 * part if stage else 8,
    }


def tensors_within(held: object) -> Iterator[torch.Tensor]:
    """The tensors in nested lists and dictionaries."""
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, dict):
        yield from chain.from_iterable(map(tensors_within, held.values()))
    elif isinstance(held, list | tuple):
        yield from chain.from_iterable(map(tensors_within, held))


def storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes of the distinct storages, by address."""
    untyped = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in untyped if storage.nbytes()}


def alive() -> list[torch.Tensor]:
    """Every tensor that Python's garbage collector tracks."""
    return [held for held in gc.get_objects() if issubclass(type(held), torch.Tensor)]


def held_by_kind(run: Training) -> dict[str, list[torch.Tensor]]:
    """The tensors of each kind that this rank holds, where the strategy keeps them; attributes that it lacks are empty.

    DeepSpeed has no public names for most of them.
    """
    parameters, torch_optimizer = list(run.network.parameters()), run.engine.optimizer
    zero = getattr(run.engine._wrapped, "optimizer", None)
    masters = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
    gradients = ("averaged_gradients", "all_grad_tensors", "grad_partitions_flat_buffer")
    own = [getattr(parameter, name, None) for parameter in parameters for name in ("grad", "grad_accum")]
    stepped = [parameter for group in torch_optimizer.param_groups for parameter in group["params"]]
    return {
        "weights": [*parameters, *tensors_within([getattr(each, "ds_tensor", None) for each in parameters])],
        "master": list(tensors_within([getattr(zero, name, None) for name in masters])),
        "gradients": list(
            tensors_within([own, [each.grad for each in stepped], *(getattr(zero, name, None) for name in gradients)])
        ),
        "state": list(tensors_within(list(torch_optimizer.state.values()))),
    }


def bytes_by_kind(run: Training) -> dict[str, int]:
    """Bytes of each kind that this rank holds, none counted twice, and of whatever else is alive."""
    seen: dict[int, int] = {}
    counted = {}
    for kind, tensors in {**held_by_kind(run), "other": alive()}.items():
        new = {address: size for address, size in storages(tensors).items() if address not in seen}
        counted[kind] = sum(new.values())
        seen |= new
    return counted


def watch(run: Training) -> dict[str, dict[str, int]]:
    """Count in every step from now on; what is returned fills with the counts of the last step."""
    moments: dict[str, dict[str, int]] = {}
    step = run.engine.step

    def counted_step() -> StepOutcome:
        moments.clear()
        moments[BEFORE] = bytes_by_kind(run)
        return step()

    def counted_within(*_: object) -> None:
        now, most = bytes_by_kind(run), moments.get(WITHIN)
        if most is None or sum(now.values()) > sum(most.values()):
            moments[WITHIN] = now

    run.engine.step = counted_step  # type: ignore[method-assign]  # of this engine alone, whatever its class
    run.engine.optimizer.register_step_pre_hook(counted_within)
    return moments


def size_of(parameter: torch.nn.Parameter) -> int:
    """Number of weights over all ranks; ZeRO-3 leaves none of them in the parameter itself."""
    return getattr(parameter, "ds_numel", parameter.numel())


def measure(options: argparse.Namespace) -> None:
    """Take three steps as one of the ranks; the first writes what the rank with most holds, per parameter."""
    recipe = recipe_of(options.network, SIDE, 16, strategy=setting_of(options.one), loader={"workers": 0})
    with training(recipe, options.data, options.json.with_suffix(".run")) as run:
        moments, micros = watch(run), first_step(run)
        for _ in range(3):
            run.step(micros, 0)
        sizes = [size_of(each) for each in run.network.parameters()]
        whole = [size_of(each) for each in run.network.parameters() if getattr(each, "ds_persist", False)]
        everyones = run.runtime.gather_objects(moments)
    if run.runtime.is_main:
        most = {
            moment: {kind: max(held[moment][kind] for held in everyones) / sum(sizes) for kind in (*KINDS, "other")}
            for moment in moments
        }
        each = {"kept whole": 4 * sum(whole) / sum(sizes), "largest": 4 * max(sizes) / sum(sizes)}
        write_json(options, most | each)


def run_strategy(strategy: str, processes: int, data: Path, options: argparse.Namespace) -> dict:
    """Measure a strategy on some processes of their own."""
    result = data.parent / f"{strategy}_{processes}.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    words = [*launcher, __file__, "--one", strategy, "--data", data, "--json", result, "--network", options.network]
    code, output = run_alone(words, TIMEOUT, OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true")
    if code != 0:
        sys.exit(f"{strategy} on {processes} ended with {code}:\n{output}")
    measured = read_results(result)
    due = theory(strategy, processes)
    due["weights"] += measured["kept whole"]
    held = {moment: sum(measured[moment][kind] for kind in KINDS) for moment in (BEFORE, WITHIN)}
    across = measured["largest"] * min(processes - 1, 2) if strategy in ("zero1", "zero2") else 0
    allowed = sum(due.values()) * (1 + TOLERANCE) + across
    return {"strategy": strategy, "processes": processes, **measured, "theory": due, "allowed": allowed, "held": held}


def is_allowed(measured: dict) -> bool:
    """Whether a run holds no more than is allowed."""
    return measured["held"][BEFORE] <= measured["allowed"]


def row(measured: dict) -> list[str]:
    """A run's line of the table."""
    before, due, held = measured[BEFORE], measured["theory"], measured["held"]
    return [
        *(measured["strategy"], str(measured["processes"])),
        *(f"{before[kind]:.2f} ({due[kind]:.2f})" for kind in KINDS),
        *(f"{held[BEFORE]:.2f} ({sum(due.values()):.2f})", f"{measured['allowed']:.2f}", f"{held[WITHIN]:.2f}"),
        *(f"{before['other']:.2f}", "ok" if is_allowed(measured) else "EXCEEDED"),
    ]


def rising(measured: list[dict]) -> list[str]:
    """The strategies that should divide by N but do not hold less on more processes."""
    divides = [run for run in measured if run["strategy"] in ("zero1", "zero2", "zero3")]
    return [
        after["strategy"]
        for before, after in pairwise(sorted(divides, key=lambda run: (run["strategy"], run["processes"])))
        if before["strategy"] == after["strategy"] and after["held"][BEFORE] >= before["held"][BEFORE]
    ]


def main() -> None:
    """Measure strategies and numbers of processes one after the other and print them."""
    parser = options_of(__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--strategies", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        data = pack_simulated(Path(folder) / "data", SIDE)
        measured = [run_strategy(name, n, data, options) for name in options.strategies for n in options.processes]
    header = [*("bytes a parameter", "ranks"), *(f"{kind} (theory)" for kind in KINDS)]
    header += ["held (theory)", "allowed", "within the step", "other", ""]
    print(table([header, *map(row, measured)]))
    write_json(options, measured)
    for strategy in (failed := rising(measured)):
        print(f"{strategy} does not hold less on more processes")
    sys.exit(1 if failed or not all(map(is_allowed, measured)) else 0)


if __name__ == "__main__":
    main()
