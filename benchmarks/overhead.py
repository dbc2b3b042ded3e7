"""Time of an optimizer step of our loop against a bare PyTorch loop, side by side in one process.

    python benchmarks/overhead.py [--large] [--variants plain ddp zero0 ...] [--rounds 120] [--steps 2] [--json FILE]

`ours` is `Training.step` as train/finetune.py builds it, on a batch that stays in memory. The bare loops pass the same
batch through the same network and loss: forward, backward, step, zero_grad. `same` does so under the same strategy
with the same settings (DDP; `deepspeed.initialize`, `engine.backward` and `engine.step` with the same file), without
Accelerate and without anything of ours; `same again` is that once more, and what it differs by is noise. The others
have no strategy: `bare`; `unfused`, the same with torch's default AdamW; and `lean`, what a short script would do: the
timm network itself, images normalised beforehand, `mse_loss`, fused AdamW.

Each variant is a process of its own with one thread: one process without a strategy, the same under DDP over gloo,
and under each stage of ZeRO (DeepSpeed over gloo); `heartbeat` is our loop on two processes under DDP, with the message
that they exchange in every step (train/distributed/heartbeat.py) and without it. In each round every loop does a block
of steps, in random order. Times are medians over the blocks, in ms a step; differences and ratios are medians of
those within a round, with their 95 % intervals; by the clock on the wall, and by the CPU time of the process, which
other programs disturb less. The verdict widens an interval to what the noise shows, and decides nothing within it.

Networks: test_resnet at 64 px, batch 8; with `--large` resnet18 at 96 px, batch 32; bf16 autocast.
"""

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness import Estimate, Side, Turns, measure_in_turns, options_of, read_results, run_alone, table, write_json
from synthetic import STRATEGIES, first_step, pack_simulated, recipe_of, setting_of, training
from torch import nn

from train.data.batches import Batch
from train.distributed.engine import Engine
from train.distributed.launch_environment import this_process
from train.distributed.strategy import complete_deepspeed_config, resolve_strategy
from train.finetuning.loop import Training
from train.finetuning.optimizer import build_optimizer
from train.models.network import Network, parameter_groups
from train.run.recipe import Recipe

ALONE = ("plain", *(name for name in STRATEGIES if "offload" not in name))
VARIANTS = (*ALONE, "heartbeat")
SMALL, LARGE = ("test_resnet", 64, 8), ("resnet18", 96, 32)  # network, px, stimuli
WARM_UP = 3  # blocks of each loop that do not count
MOST_ADDED = 0.3  # ms that our loop may add to a bare step of the tiny network
MOST_TIMES = 1.05  # of a bare loop under the same strategy
TIMEOUT = 900  # s for one variant
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # the second does not count what other programs take
NOISE = "noise"
PAIRS = {
    "ours - same": ("ours", "same"),
    NOISE: ("same again", "same"),
    "ours - bare": ("ours", "bare"),
    "ours - unfused": ("ours", "unfused"),
    "ours - lean": ("ours", "lean"),
}
SHOWN = ("ours", "same", "bare", "unfused", "lean")
HEARTBEAT_PAIRS = {"heartbeat": ("with the heartbeat", "without"), NOISE: ("without again", "without")}
Step = Callable[[], object]


def recipe_for(variant: str, large: bool) -> Recipe:
    """The recipe of a variant."""
    network, side, batch = LARGE if large else SMALL
    strategy = setting_of("ddp" if variant in ("plain", "heartbeat") else variant)
    return recipe_of(network, side, batch, strategy=strategy, optimizer={"name": "adamw"}, loader={"workers": 0})


def ours(run: Training, batch: Batch) -> Step:
    """Our loop's step."""
    return lambda: run.step([batch], 0)


def in_ddp(network: nn.Module) -> nn.Module:
    """The network in DDP, with the settings of train/distributed/accelerator.py."""
    with warnings.catch_warnings():  # torch is renaming `broadcast_buffers`
        warnings.simplefilter("ignore", FutureWarning)
        return nn.parallel.DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)


def under_ddp(run: Training) -> Training:
    """The run with its network in DDP, which one process alone would go without."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    engine = run.engine
    run.engine = Engine(
        run.runtime, in_ddp(run.network), run.network, engine.optimizer, accumulation_steps=1, clip_norm=None
    )
    return run


def new_network(run: Training) -> Network:
    """A network like the run's."""
    network = Network(run.recipe, run.loader.stimuli.recordings[0].split.manifest, run.loader.stimuli.size)
    return network if run.runtime.deepspeed else network.to(memory_format=torch.channels_last)


def optimizer_of(run: Training, network: Network) -> torch.optim.Optimizer:
    """An optimizer like the run's."""
    return build_optimizer(run.recipe.optimizer, parameter_groups(network, run.recipe), run.runtime.device)


def bare(run: Training, batch: Batch, *, fused: bool = True, ddp: bool = False) -> Step:
    """A plain PyTorch loop around our network and loss."""
    network = new_network(run).to(memory_format=torch.channels_last).train()
    optimizer = optimizer_of(run, network) if fused else unfused(parameter_groups(network, run.recipe))
    wrapped = in_ddp(network) if ddp else network

    def step() -> None:
        loss = network.objective.losses(wrapped(batch.images), batch, lambda own: own)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def unfused(groups: list[dict]) -> torch.optim.Optimizer:
    """torch's default AdamW."""
    return torch.optim.AdamW(groups, lr=1e-3)


def bare_deepspeed(run: Training, batch: Batch) -> Step:
    """A plain DeepSpeed loop around our network and loss, which has the autocast in it."""
    import deepspeed

    network = new_network(run).train()
    settings = resolve_strategy(run.recipe.strategy)
    assert settings is not None
    config = complete_deepspeed_config(
        settings, micro_batch=len(batch.weight), accumulation_steps=1, ranks=1, clip_norm=None
    )
    engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer_of(run, network), config=config)

    def step() -> None:
        engine.backward(network.objective.losses(engine(batch.images), batch, lambda own: own)["loss"])
        engine.step()

    return step


def lean(run: Training, batch: Batch) -> Step:
    """The shortest possible loop."""
    responses = run.network.objective.responses
    assert responses is not None
    assert batch.rates is not None
    net = timm.create_model(run.recipe.backbone.name, num_classes=batch.rates.shape[1])
    net = net.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
    images = (batch.images.float() / 255 - 0.5).contiguous(memory_format=torch.channels_last)
    target = responses.target(batch.rates)

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

        def same() -> Step:
            return bare_deepspeed(run, batch) if run.runtime.deepspeed else bare(run, batch, ddp=options.one == "ddp")

        loops = {
            "ours": ours(run, batch),
            "same": same(),
            "same again": same(),
            "bare": bare(run, batch),
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


@dataclass(frozen=True)
class Comparison:
    """By how much one loop is slower than another: in ms a step, and as a ratio."""

    added: Estimate
    ratio: Estimate

    def __str__(self) -> str:
        added = f"{self.added.middle:+.2f} ({self.added.low:+.2f} to {self.added.high:+.2f})"
        return f"{added}, {self.ratio.middle:.3f}x ({self.ratio.low:.3f} to {self.ratio.high:.3f})"


def compared(turns: Turns, pairs: Mapping[str, tuple[str, str]]) -> dict[str, Comparison]:
    """The loops of each pair."""
    return {name: Comparison(turns.added(*pair), turns.times(*pair)) for name, pair in pairs.items()}


def run_variant(variant: str, data: Path, options: argparse.Namespace) -> dict[str, Turns]:
    """Measure a variant in its own process; returns its times by each clock."""
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
    return {clock: Turns(times) for clock, times in read_results(result).items()}


def row(variant: str, turns: Turns) -> list[str]:
    """A variant's line of the table."""
    comparisons = compared(turns, PAIRS)
    return [variant, *(f"{turns.median(name):.2f}" for name in SHOWN), *(str(comparisons[name]) for name in PAIRS)]


def verdict(variant: str, turns: Turns) -> str:
    """State whether the aims of a variant are reached."""
    pairs = compared(turns, PAIRS)
    noise, same = pairs[NOISE], pairs["ours - same"]
    if variant != "plain":
        return f"{variant}: {judged(same.ratio.widened(noise.ratio, 1), MOST_TIMES, 'times the same strategy, bare')}"
    added = judged(same.added.widened(noise.added, 0), MOST_ADDED, "ms over bare")
    ratio = pairs["ours - unfused"].ratio.widened(noise.ratio, 1)
    return f"{variant}: {added}; {judged(ratio, 1, 'times a bare loop with the default optimizer')}"


def judged(measured: Estimate, most: float, unit: str) -> str:
    """An aim, what was measured, and whether that decides it."""
    outcome = (
        "reached" if measured.high <= most else "MISSED" if measured.low > most else "not decided: within the noise"
    )
    shown = f"{measured.middle:.3f} ({measured.low:.3f} to {measured.high:.3f})"
    return f"at most {most:g} {unit}: {shown}, {outcome}"


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
        milliseconds = measure_variant(options)
        if this_process().rank == 0:
            write_json(options, milliseconds)
        return
    with tempfile.TemporaryDirectory() as folder:
        data = pack_simulated(Path(folder) / "data", side=(LARGE if options.large else SMALL)[1])
        measured = {variant: run_variant(variant, data, options) for variant in options.variants}
    alone = [variant for variant in options.variants if variant in ALONE]
    for clock in CLOCKS:
        print(table([[f"ms a step, {clock}", *SHOWN, *PAIRS], *(row(name, measured[name][clock]) for name in alone)]))
        if "heartbeat" in measured:
            heartbeat = compared(measured["heartbeat"][clock], HEARTBEAT_PAIRS)
            print(f"the heartbeat, on two processes: {heartbeat['heartbeat']}; noise: {heartbeat[NOISE]}")
        if not options.large:
            print(*(verdict(name, measured[name][clock]) for name in alone), sep="\n")
    pairs = {name: HEARTBEAT_PAIRS if name == "heartbeat" else PAIRS for name in measured}
    results = {
        name: {
            clock: {
                "milliseconds": {side: turns.median(side) for side in turns.values},
                **{pair: asdict(comparison) for pair, comparison in compared(turns, pairs[name]).items()},
            }
            for clock, turns in by_clock.items()
        }
        for name, by_clock in measured.items()
    }
    write_json(options, results)


if __name__ == "__main__":
    main()
