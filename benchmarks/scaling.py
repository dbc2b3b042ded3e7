"""How long a step takes on more processes and slower links: measured, compared with a model, extrapolated to GPUs.

    python benchmarks/scaling.py [--processes 1 2 4 8] [--megabits 0 1000 500 200] [--strategies ddp zero1 zero2 zero3]
                                 [--steps 8] [--json FILE] [--figure PNG] [--from FILE]

Each process is on a machine of its own, a network namespace (needs root), whose link sends so many Mbit/s (`tc tbf`;
0: no limit; netem, which could add latency, is not needed). All train together, each on the same number of stimuli
(weak scaling), as train/finetune.py would. Of the steps at each bandwidth the quickest counts, which other programs
disturbed least, and of it the mean over processes. On 2 cores, 4 and 8 processes take turns, which is seen in what they
compute and not in what travels. `--from` draws the tables of an earlier run's JSON again.

The model. Bytes that a process sends in a step are those of train/planning/memory.py; in a ring of p they go
round in 2 (p - 1) rounds for an all-reduce, p - 1 for a reduce-scatter or an all-gather (Patarasuk & Yuan 2009,
"Bandwidth optimal all-reduce algorithms for clusters of workstations"), so that travelling takes

    bytes / bandwidth + rounds * latency

Measured here: computing and what else does not depend on the bandwidth (latency, gloo's own work, waiting for those
that are late) are the step without a limit; the model says what a limit adds. The bytes that the link has counted are
shown beside those of the plan.

On GPUs: what may travel during the forward or backward pass is hidden behind it, but for the last bucket of gradients
(Li et al. 2020, "PyTorch Distributed: Experiences on accelerating data parallel training", section 3.2); shown is that
and the case that nothing is hidden. Computing takes as long as one GPU alone cost.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist
from harness import ROOT, options_of, read_results, table, write_json
from synthetic import finish, first_step, pack_simulated, recipe_of, setting_of, training

from train.planning.memory import Strategy, bytes_sent, read_strategy
from train.planning.step_cost import StepCost, measure_step, paper_manifest
from train.run.recipe import Recipe

sys.path.append(str(ROOT / "tests" / "support"))
from machines import Machine, machines, reason_against

NETWORK, SIDE, SHARE = "convnext_atto", 32, 8  # px, stimuli of a process in a step
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
WARM_UP = 2  # steps at each bandwidth that do not count
PARTS = ("forward", "backward", "optimizer", "communication")
TIMEOUT = 600  # s for one strategy on one number of processes
PORT = 29511


# -------------------------------------------------------------------------------------------------- what is measured


def recipe_for(strategy: str, processes: int) -> Recipe:
    """What is trained; without batch statistics, so that it is the same on any number of processes."""
    given = {"strategy": setting_of(strategy), "precision": "fp32", "loader": {"workers": 0}}
    return recipe_of(NETWORK, SIDE, SHARE * processes, optimizer={"name": "adamw"}, **given)


def work(options: argparse.Namespace) -> None:
    """Take steps at each bandwidth as one process; the main process writes their times."""
    machine = Machine(**json.loads(options.machine)) if options.machine else None
    recipe, timings = recipe_for(options.strategies[0], options.processes[0]), {}
    with training(recipe, options.data, options.data.with_name(options.one)) as run:
        batch = first_step(run)
        for megabits in options.megabits:
            if machine is not None and megabits:
                machine.limit(megabits)
            steps = [one_step(run, batch, machine) for _ in range(WARM_UP + options.steps)][WARM_UP:]
            by_step = zip(*run.runtime.gather_objects(steps), strict=True)
            means = [{name: statistics.mean(rank[name] for rank in ranks) for name in ranks[0]} for ranks in by_step]
            timings[f"{megabits:g}"] = min(means, key=lambda step: step["step"])
        if run.runtime.is_main:
            write_json(options, timings)


def one_step(run, batch: list, machine: Machine | None) -> dict[str, float]:
    """Seconds of a step and of its parts, and the bytes that this process sent."""
    if machine is not None:
        dist.barrier()
    sent_before = machine.bytes_sent() if machine else 0
    began = time.perf_counter()
    run.step(batch, 0)
    finish(run.runtime.device)
    took, seconds = time.perf_counter() - began, run.engine.clock.seconds
    parts = {part: seconds.get(part, 0.0) for part in PARTS}
    return {"step": took, **parts, "bytes": (machine.bytes_sent() if machine else 0) - sent_before}


def measured(strategy: str, processes: int, data: Path, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The results of `work` on `processes` machines, by Mbit/s."""
    name = f"{strategy}_{processes}"
    result = data.with_name(f"{name}.json")
    words = [sys.executable, __file__, "--one", name, "--data", data, "--json", result, "--steps", options.steps]
    words += ["--strategies", strategy, "--processes", processes]
    megabits = sorted(options.megabits) if processes > 1 else [0]  # without a limit first
    words += ["--megabits", *megabits]
    with machines(processes) as hosts:
        started = []
        for rank, host in enumerate(hosts):
            machine = ["--machine", json.dumps(asdict(host))] if processes > 1 else []
            environment: dict[str, object] = {"RANK": rank, "WORLD_SIZE": processes}
            environment |= {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
            environment |= {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": PORT, "GLOO_SOCKET_IFNAME": "eth0"}
            environment |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": ROOT}
            started.append(host.start(*words, *machine, **{key: str(value) for key, value in environment.items()}))
        outputs = [process.communicate(timeout=TIMEOUT) for process in started]
    if any(process.returncode for process in started):
        sys.exit(f"{name} failed:\n" + "".join(err for _, err in outputs)[-3000:])
    return read_results(result)


# -------------------------------------------------------------------------------------------------- what the model says


def compared(results: dict, cost: StepCost) -> list[dict]:
    """Each measurement under a limit, with the prediction from the one without."""
    rows = []
    for strategy, by_processes in results.items():
        for processes, by_limit in by_processes.items():
            free = by_limit["0"]
            for megabits, step in by_limit.items():
                planned = bytes_sent(read_strategy(strategy), cost, int(processes), 1) if int(processes) > 1 else 0.0
                travelled = planned / (float(megabits) * 1e6 / 8) if float(megabits) else 0.0
                row = {"strategy": strategy, "processes": int(processes), "megabits": float(megabits), **step}
                rows.append(row | {"planned": planned, "predicted": free["step"] + travelled})
    return rows


def error_of(rows: list[dict]) -> str:
    """Relative error of the model under a limit."""
    limited = [row for row in rows if row["megabits"]]
    errors = sorted(row["predicted"] / row["step"] - 1 for row in limited)
    middle, worst = statistics.median(map(abs, errors)), max(errors, key=abs)
    return (
        f"the model's step under a limit is off by {middle:.1%} in the median of {len(limited)}, {worst:+.1%} at worst"
    )


@dataclass(frozen=True)
class Cluster:
    """GPUs and the links between them.

    Attributes:
        name: for tables.
        inside: bytes/s that a GPU sends to others of its machine.
        between: bytes/s that a machine sends to others.
        latency: s of a round of a ring that leaves the machine; `latency_inside` of one that does not.
        per_machine: GPUs.
    """

    name: str
    inside: float
    between: float
    latency: float
    latency_inside: float = 5e-6
    per_machine: int = 8


@dataclass(frozen=True)
class Workload:
    """The work of one GPU.

    Attributes:
        network: timm's name.
        images: per second, on one GPU.
        batch: of one GPU in a step.
    """

    network: str
    images: float
    batch: int


RESNET = Workload("resnet50", 2470, 256)  # one A100, mixed precision, channels-last: NVIDIA's DeepLearningExamples
REFERENCE = (8, 16621)  # GPUs of one DGX A100, and their images/s together, from the same table
CLUSTERS = (
    # NVLink 3: 600 GB/s of a GPU in both directions together; 8 network cards of 200 Gbit/s (DGX A100's data sheet).
    # 80 % of both is taken to be reached.
    Cluster("8 x 200 Gbit/s InfiniBand per machine", 0.8 * 300e9, 0.8 * 8 * 25e9, 10e-6),
    Cluster("1 x 25 Gbit/s Ethernet per machine", 0.8 * 300e9, 0.8 * 25e9 / 8, 50e-6),
)
GPUS = (8, 64, 512)
BUCKET = 25 * 2**20  # bytes of gradients that DDP sends together
FORWARD = 1 / 3  # of the time of computing: a backward pass takes about twice as long


@dataclass(frozen=True)
class Travel:
    """Seconds that travelling takes in a step: beside the forward pass, beside the backward pass, and after both."""

    forward: float
    backward: float
    after: float


def travel(strategy: Strategy, cost: StepCost, gpus: int, cluster: Cluster) -> Travel:
    """How the bytes of a step and the rounds in which they go are spread over it.

    ZeRO-1 and -2 gather weights when the optimizer has stepped; ZeRO-3 before forward and again before backward.
    """
    alone = gpus <= cluster.per_machine
    bandwidth = cluster.inside if alone else min(cluster.inside, cluster.between)
    latency = cluster.latency_inside if alone else cluster.latency
    total = bytes_sent(strategy, cost, gpus, 1)
    one_way = (gpus - 1) * -(-cost.trainable // BUCKET)  # rounds of a reduce-scatter or an all-gather, in buckets
    match strategy.stage:
        case None | 0:
            bytes_, rounds = (0.0, total, 0.0), (0, 2 * one_way, 0)
        case 1 | 2:
            bytes_, rounds = (0.0, total * 2 / 3, total / 3), (0, 2 * one_way, one_way)
        case _:
            forward = total * cost.weights / (2 * cost.weights + cost.trainable)
            bytes_, rounds = (forward, total - forward, 0.0), (one_way, 2 * one_way, 0)
    return Travel(*(part / bandwidth + number * latency for part, number in zip(bytes_, rounds, strict=True)))


def step_seconds(
    strategy: Strategy, cost: StepCost, gpus: int, cluster: Cluster, computing: float
) -> tuple[float, float]:
    """Time of a step with communication hidden behind computing as far as possible, and not at all."""
    goes = travel(strategy, cost, gpus, cluster)
    last = goes.backward * min(BUCKET / cost.trainable, 1)
    hidden = max(FORWARD * computing, goes.forward) + max((1 - FORWARD) * computing + last, goes.backward) + goes.after
    return hidden, computing + goes.forward + goes.backward + goes.after


def extrapolated(cost: StepCost) -> list[dict]:
    """Images/s of each cluster, number of GPUs and strategy, and what share of ideal scaling that is."""
    computing, rows = RESNET.batch / RESNET.images, []
    for cluster in CLUSTERS:
        for gpus in GPUS:
            for name in STRATEGIES:
                times = step_seconds(read_strategy(name), cost, gpus, cluster, computing)
                shares = [computing / seconds for seconds in times]
                rows.append(
                    {"cluster": cluster.name, "gpus": gpus, "strategy": name, "hidden": shares[0], "not": shares[1]}
                )
    return rows


def needs_of(network: str, side: int, sites: int = 168) -> StepCost:
    """Of a network on paper."""
    return measure_step(recipe_of(network, side, 2, optimizer={"name": "adamw"}), paper_manifest(sites, 64, side))


# -------------------------------------------------------------------------------------------------------------- shown


def measured_table(rows: list[dict]) -> str:
    """Milliseconds of a step and of its parts, beside what the model says."""
    header = ["strategy", "processes", "Mbit/s", "compute ms", "communication ms", "step ms", "model ms"]
    lines = [[*header, "MB sent", "MB by plan"]]
    for row in rows:
        computing = sum(row[part] for part in PARTS[:3])
        limit = f"{row['megabits']:g}" if row["megabits"] else "no limit"
        times = [f"{1e3 * seconds:.0f}" for seconds in (computing, row["communication"], row["step"], row["predicted"])]
        if row["strategy"] != "ddp":
            times[1] = "-"  # DeepSpeed's communication is part of "compute"
        volumes = [f"{volume / 1e6:.2f}" for volume in (row["bytes"], row["planned"])]
        cells = [row["strategy"], str(row["processes"]), limit if row["processes"] > 1 else "-", *times, *volumes]
        lines.append(cells)
    return table(lines)


def extrapolated_table(rows: list[dict]) -> str:
    """Share of ideal scaling: hidden behind computing what can be, and nothing."""
    lines = [["cluster", "strategy", *(f"{gpus} GPUs" for gpus in GPUS)]]
    for cluster in CLUSTERS:
        for name in STRATEGIES:
            matching = [row for row in rows if (row["cluster"], row["strategy"]) == (cluster.name, name)]
            cells = [f"{row['hidden']:.1%} ({row['not']:.1%})" for row in matching]
            lines.append([cluster.name, name, *cells])
    return table(lines)


def draw(rows: list[dict], far: list[dict], path: Path) -> None:
    """Measured against predicted step times, and what is extrapolated."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, *right = figure.subplots(1, 3)
    colours = dict(zip(STRATEGIES, colormaps["cividis"]([0.0, 0.33, 0.66, 0.95]), strict=True))
    limited = [row for row in rows if row["megabits"]]
    for strategy, colour in colours.items():
        points = [row for row in limited if row["strategy"] == strategy]
        steps, predicted = [row["step"] for row in points], [row["predicted"] for row in points]
        left.loglog(steps, predicted, "o", color=colour, label=strategy)
    ends = [min(row["step"] for row in limited), max(row["step"] for row in limited)]
    left.loglog(ends, ends, color="0.5", linewidth=1)
    left.set(xlabel="measured step, s", ylabel="step by the model, s", title="CPU processes over gloo, measured")
    ticks = [0.25, 0.5, 1, 2, 4]
    for axis in (left.xaxis, left.yaxis):
        axis.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        axis.set_minor_formatter("")
    left.legend(frameon=False)
    for axes, cluster in zip(right, CLUSTERS, strict=True):
        for strategy, colour in colours.items():
            points = [row for row in far if (row["cluster"], row["strategy"]) == (cluster.name, strategy)]
            axes.plot(GPUS, [row["hidden"] for row in points], "o-", color=colour, label=strategy)
            axes.plot(GPUS, [row["not"] for row in points], ":", color=colour)
        axes.set_xscale("log", base=2)
        axes.set(xticks=GPUS, xticklabels=GPUS, ylim=(0, 1.05), xlabel="A100 GPUs", title=cluster.name)
    right[0].set_ylabel("share of ideal scaling, EXTRAPOLATED\n(dotted: nothing hidden)")
    for axes in (left, *right):
        axes.title.set_fontsize(10)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, compare, extrapolate."""
    parser = options_of(__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--megabits", type=float, nargs="+", default=[0, 1000, 500, 200])
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--from", dest="earlier", type=Path)
    for name in ("--one", "--machine"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        work(options)
        return
    results = read_results(options.earlier) if options.earlier else measure_all(options)
    write_json(options, results)
    rows, far = compared(results, needs_of(NETWORK, SIDE, sites=12)), extrapolated(needs_of(RESNET.network, 224))
    print(measured_table(rows), error_of(rows), sep="\n\n")
    gpus, images = REFERENCE
    print(
        f"\nEXTRAPOLATED: {RESNET.network}, batch {RESNET.batch} and {RESNET.images:,} images/s per GPU\n"
        "share of ideal scaling; in brackets if nothing is hidden behind computing "
        f"({gpus} GPUs by NVIDIA's own table: {images / gpus / RESNET.images:.1%})\n",
        extrapolated_table(far),
        sep="\n",
    )
    if options.figure:
        draw(rows, far, options.figure)


def measure_all(options: argparse.Namespace) -> dict:
    """Every strategy on every number of processes."""
    if reason := reason_against():
        sys.exit(reason)
    results: dict[str, dict[str, dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = pack_simulated(Path(folder) / "data", SIDE)
        for strategy in options.strategies:
            results[strategy] = {}
            for processes in options.processes:
                results[strategy][str(processes)] = measured(strategy, processes, data, options)
                print(strategy, processes, "measured", file=sys.stderr, flush=True)
    return results


if __name__ == "__main__":
    main()
