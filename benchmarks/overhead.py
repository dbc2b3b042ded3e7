"""Time of an optimizer step of our loop against a bare PyTorch loop, side by side in one process.

    python benchmarks/overhead.py [--large] [--variants plain ddp zero0 ...] [--rounds 120] [--steps 2] [--json FILE]

`ours` is `Training.step` as train/finetune.py builds it, on a batch that stays in memory. The bare loops pass the same
batch through the same network and loss: forward, backward, step, zero_grad. `bare` has the optimizer as we build it
(fused AdamW), `bare again` is the same once more (what it differs by is noise), `unfused` torch's default AdamW. `lean`
is what a short script would do: the timm network itself, images normalised beforehand, `mse_loss`, fused AdamW.

Each variant is a process of its own with one thread: one process without a strategy, the same under DDP over gloo,
and under each stage of ZeRO (DeepSpeed over gloo); `heartbeat` is our loop on two processes under DDP, with the message
that they exchange in every step (train/distributed/heartbeat.py) and without it. In each round every loop does a block
of steps, in random order. Times are medians over the blocks, in ms a step; differences and ratios are medians of
those within a round, with their quartiles; by the clock on the wall, and by the CPU time of the process, which other
programs disturb less.

Networks: test_resnet at 64 px, batch 8; with `--large` resnet18 at 96 px, batch 32; bf16 autocast.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness import Side, Turns, measure_in_turns, options_of, read_results, run_alone, table, write_json
from synthetic import STRATEGIES, first_step, pack_simulated, recipe_of, setting_of, training
from torch import nn

from train.data.batches import Batch
from train.distributed.engine import Engine
from train.distributed.launch_environment import this_process
from train.finetuning.loop import Training
from train.finetuning.optimizer import build_optimizer
from train.models.network import Network, parameter_groups
from train.run.recipe import Recipe

ALONE = ("plain", *(name for name in STRATEGIES if "offload" not in name))
VARIANTS = (*ALONE, "heartbeat")
SMALL, LARGE = ("test_resnet", 64, 8), ("resnet18", 96, 32)  # network, px, stimuli
WARM_UP = 3  # blocks of each loop that do not count
MOST_ADDED = 0.3  # ms that our loop may add to a bare step of the tiny network
TIMEOUT = 600  # s for one variant
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # the second does not count what other programs take
PAIRS = {
    "ours - bare": ("ours", "bare"),
    "ours - unfused": ("ours", "unfused"),
    "ours - lean": ("ours", "lean"),
    "noise": ("bare again", "bare"),
}
HEARTBEAT_PAIRS = {"heartbeat": ("with the heartbeat", "without"), "noise": ("without again", "without")}
Step = Callable[[], object]


def recipe_for(variant: str, large: bool) -> Recipe:
    """The recipe of a variant."""
    network, side, batch = LARGE if large else SMALL
    strategy = setting_of("ddp" if variant in ("plain", "heartbeat") else variant)
    return recipe_of(network, side, batch, strategy=strategy, optimizer={"name": "adamw"}, loader={"workers": 0})


def ours(run: Training, batch: Batch) -> Step:
    """Our loop's step."""
    return lambda: run.step([batch], 0)


def under_ddp(run: Training) -> Training:
    """The run with its network in DDP, which one process alone would go without."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    wrapped = nn.parallel.DistributedDataParallel(run.network, gradient_as_bucket_view=True)
    run.engine = Engine(run.runtime, wrapped, run.network, run.engine.optimizer, accumulation_steps=1, clip_norm=None)
    return run


def bare(run: Training, batch: Batch, *, fused: bool = True) -> Step:
    """A plain PyTorch loop around our network and loss."""
    network = Network(run.recipe, manifest_of(run), run.loader.stimuli.size).to(memory_format=torch.channels_last)
    groups = parameter_groups(network.train(), run.recipe)
    optimizer = build_optimizer(run.recipe.optimizer, groups, run.runtime.device) if fused else unfused(groups)

    def step() -> None:
        loss = network.objective.losses(network(batch.images), batch, lambda own: own)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def unfused(groups: list[dict]) -> torch.optim.Optimizer:
    """torch's default AdamW."""
    return torch.optim.AdamW(groups, lr=1e-3)


def manifest_of(run: Training):
    """The recording of a run."""
    return run.loader.stimuli.recordings[0].split.manifest


def lean(run: Training, batch: Batch) -> Step:
    """The shortest possible loop."""
    net = timm.create_model(run.recipe.backbone.name, num_classes=batch.rates.shape[1])
    net = net.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
    images = (batch.images.float() / 255 - 0.5).contiguous(memory_format=torch.channels_last)
    target = run.network.objective.responses.target(batch.rates)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            predicted = net(images)
        F.mse_loss(predicted.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def block_of(step: Step, steps: int) -> Side:
    """A side of the comparison: milliseconds of a step in a block of some, by each of the clocks."""

    def side() -> dict[str, float]:
        started = {name: clock() for name, clock in CLOCKS.items()}
        for _ in range(steps):
            step()
        return {name: (CLOCKS[name]() - start) / steps * 1e3 for name, start in started.items()}

    return side


def measure(loops: dict[str, Step], rounds: int, steps: int) -> dict[str, dict[str, Sequence[float]]]:
    """Milliseconds a step by each clock, of every loop in every round."""
    sides = {name: block_of(step, steps) for name, step in loops.items()}
    turns = measure_in_turns(sides, rounds, warm_up=WARM_UP, shuffle=True)
    return {clock: dict(turns[clock].values) for clock in CLOCKS}


def measure_variant(options: argparse.Namespace) -> dict[str, dict[str, Sequence[float]]]:
    """All loops of one variant, in this process."""
    torch.set_num_threads(1)
    recipe = recipe_for(options.one, options.large)
    with (
        tempfile.TemporaryDirectory() as folder,
        training(recipe, options.data, Path(folder) / "run") as run,
    ):
        [batch] = first_step(run)
        if options.one == "heartbeat":
            return measure(with_and_without_heartbeat(run, batch), options.rounds, options.steps)
        if options.one == "ddp":
            run = under_ddp(run)
        loops = {
            "ours": ours(run, batch),
            "bare": bare(run, batch),
            "bare again": bare(run, batch),
            "unfused": bare(run, batch, fused=False),
            "lean": lean(run, batch),
        }
        return measure(loops, options.rounds, options.steps)


def with_and_without_heartbeat(run: Training, batch: Batch) -> dict[str, Step]:
    """Our step with and without the heartbeat, as one of several processes that take the same turns."""
    step = ours(run, batch)

    def beating() -> None:
        run.runtime.beat(0.0)
        step()

    return {"with the heartbeat": beating, "without": step, "without again": ours(run, batch)}


def compared(turns: Turns, one: str, other: str) -> dict[str, float]:
    """By how much one loop is slower than another: quartiles of the differences in ms, and the median ratio."""
    low, added, high = turns.added(one, other)
    return {"added": added, "added_low": low, "added_high": high, "ratio": turns.ratio(one, other)}


def summary(turns: Turns, pairs: dict[str, tuple[str, str]]) -> dict[str, dict[str, float]]:
    """Medians and comparisons of all loops."""
    return {
        "milliseconds": {name: turns.median(name) for name in turns.values},
        **{name: compared(turns, one, other) for name, (one, other) in pairs.items()},
    }


def run_variant(variant: str, data: Path, options: argparse.Namespace) -> dict[str, dict]:
    """Measure a variant in its own process; returns its summary by each clock."""
    result = data.parent / f"{variant}.json"
    start = ["bash", "launch/local.sh", "-n", 2] if variant == "heartbeat" else [sys.executable]
    words = [*start, __file__, "--one", variant, "--data", data, "--json", result]
    words += ["--rounds", options.rounds, "--steps", options.steps]
    if options.large:
        words.append("--large")
    environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHON": sys.executable}
    code, output = run_alone(words, TIMEOUT, **environment)
    if code != 0:
        sys.exit(f"{variant} ended with {code}:\n{output}")
    pairs = HEARTBEAT_PAIRS if variant == "heartbeat" else PAIRS
    return {clock: summary(Turns(times), pairs) for clock, times in read_results(result).items()}


def row(variant: str, measured: dict[str, dict[str, float]]) -> list[str]:
    """A variant's line of the table."""
    cells = [variant, *(f"{measured['milliseconds'][name]:.2f}" for name in ("ours", "bare", "unfused", "lean"))]
    return cells + [shown(measured[name]) for name in PAIRS]


def shown(pair: dict[str, float]) -> str:
    """A comparison as text."""
    return f"{pair['added']:+.2f} ({pair['added_low']:+.2f} to {pair['added_high']:+.2f}), {pair['ratio']:.3f}x"


def verdict(plain: dict[str, dict[str, float]]) -> str:
    """State whether the aims are reached."""
    added, ratio = plain["ours - bare"]["added"], plain["ours - unfused"]["ratio"]
    reached = {True: "reached", False: "MISSED"}
    return (
        f"aims, one process: at most {MOST_ADDED} ms over bare: {added:+.2f} ms, {reached[added <= MOST_ADDED]}; "
        f"at most 1.00x of a bare loop with the default optimizer: {ratio:.3f}x, {reached[ratio <= 1]}"
    )


def main() -> None:
    """Measure the variants one after the other and print them."""
    parser = options_of(__doc__)
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--rounds", type=int, default=120)
    parser.add_argument("--steps", type=int, default=2, help="of a block")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measured = measure_variant(options)
        if this_process().rank == 0:
            write_json(options, measured)
        return
    with tempfile.TemporaryDirectory() as folder:
        data = pack_simulated(Path(folder) / "data", side=(LARGE if options.large else SMALL)[1])
        measured = {variant: run_variant(variant, data, options) for variant in options.variants}
    for clock in CLOCKS:
        header = [f"ms a step, {clock}", "ours", "bare", "unfused", "lean", *PAIRS]
        print(table([header, *(row(name, by_clock[clock]) for name, by_clock in measured.items() if name in ALONE)]))
        if "heartbeat" in measured:
            heartbeat = measured["heartbeat"][clock]
            print(
                f"the heartbeat, on two processes: {shown(heartbeat['heartbeat'])}; noise: {shown(heartbeat['noise'])}"
            )
        if "plain" in measured and not options.large:
            print(verdict(measured["plain"][clock]))
    write_json(options, measured)


if __name__ == "__main__":
    main()
