"""Images per second and peak memory of training, on a batch that stays on the device and fed by the loader.

    python benchmarks/throughput.py --data DIR --network resnet50 [--side 224] [--batch 128] [--compile] [--seconds 6]
                                    [--json FILE]

The run is built as train/finetune.py does: random weights, bf16, channels-last, fused AdamW, one process. The batch is
halved until the estimate of train/planning/memory.py fits into the GPU. `synthetic` repeats one batch, `fed`
takes what the loader reads from DIR, epoch after epoch, `loader` is the loader with nobody who uses its batches. Peak
memory is that of steps after the first ones, in which cuDNN tries kernels; on a CPU it is the process's largest
resident set.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import count, islice
from pathlib import Path

import torch
from harness import options_of, write_json
from synthetic import GIB, finish, first_step, peak_bytes, recipe_of, training

from data_prep.shards.manifest import load_manifest
from train.data.batches import Batch
from train.distributed.launch_environment import uses_gpu
from train.finetuning.loop import Training
from train.planning.memory import estimate_memory, read_strategy, usable_memory
from train.planning.step_cost import StepCost, measure_step
from train.run.recipe import Recipe

WARM_UP = 5  # steps
TIMED = 3  # steps from which is told how many there are in some seconds


def fitting_batch(cost: StepCost, batch: int) -> int:
    """The batch size, halved until the estimate fits into the GPU, if there is one."""
    if uses_gpu():
        room = usable_memory(torch.cuda.get_device_properties(0).total_memory)
        while batch > 1 and estimated(cost, batch) > room:
            batch //= 2
    return batch


def estimated(cost: StepCost, batch: int) -> float:
    """Bytes per process according to the plan."""
    return estimate_memory(read_strategy("ddp"), cost, 1, batch, 1).total


def seconds_for(run: Training, steps: Iterable[list[Batch]]) -> tuple[float, int]:
    """Take optimizer steps; how long they took, and how many images they saw."""
    finish(run.runtime.device)
    started, images = time.perf_counter(), 0
    for micros in steps:
        run.step(micros, 0)
        images += sum(len(micro.images) for micro in micros)
    finish(run.runtime.device)
    return time.perf_counter() - started, images


def rate(run: Training, batches: Iterator[list[Batch]], seconds: float) -> float:
    """Images per second, measured over about `seconds`."""
    seconds_for(run, islice(batches, WARM_UP))
    step_seconds = seconds_for(run, islice(batches, TIMED))[0] / TIMED
    took, images = seconds_for(run, islice(batches, max(math.ceil(seconds / step_seconds), TIMED)))
    return images / took


def epochs(run: Training) -> Iterator[list[Batch]]:
    """The batches of the loader, epoch after epoch."""
    for epoch in count():
        yield from run.loader.epoch(epoch)


def loader_rate(run: Training, seconds: float) -> float:
    """Images per second of the loader alone."""
    batches = epochs(run)
    next(batches)
    started, images = time.perf_counter(), 0
    while (took := time.perf_counter() - started) < seconds:
        images += sum(len(micro.images) for micro in next(batches))
    return images / took


def run_once(recipe: Recipe, options: argparse.Namespace, out: Path) -> dict[str, float]:
    """Measure a run: images a second, and bytes."""
    measurements = {}
    with training(recipe, options.data, out) as run, run.runtime.cudnn_autotuning(recipe.deterministic):
        device, fixed = run.runtime.device, first_step(run)
        seconds_for(run, [fixed] * WARM_UP)
        measurements["peak_trying"] = peak_bytes(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        measurements["synthetic"] = rate(run, iter(lambda: fixed, None), options.seconds)
        measurements["peak"] = peak_bytes(device)
        if not options.compile:
            measurements["loader"] = loader_rate(run, options.seconds / 2)
            measurements["fed"] = rate(run, epochs(run), options.seconds * 1.5)
        measurements["loss"] = float(run.step(fixed, 0)["loss"])
    return measurements


def measured(options: argparse.Namespace) -> dict[str, float]:
    """Estimate, then measure."""
    settings = {"optimizer": {"name": "adamw"}, "compile": options.compile}
    cost = measure_step(
        recipe_of(options.network, options.side, options.batch, **settings), load_manifest(options.data)
    )
    batch = fitting_batch(cost, options.batch)
    recipe = recipe_of(options.network, options.side, batch, **settings)
    with tempfile.TemporaryDirectory() as folder:
        measurements = run_once(recipe, options, Path(folder) / "run")
    return {"batch": batch, "estimate": estimated(cost, batch)} | measurements


def main() -> None:
    """Measure and print."""
    parser = options_of(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="shard folder")
    parser.add_argument("--network", required=True)
    parser.add_argument("--side", type=int, default=224, help="size of the images in pixels")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--seconds", type=float, default=6.0)
    options = parser.parse_args()
    measurements = measured(options)
    for name, value in measurements.items():
        in_gib = name.startswith(("peak", "estimate"))
        print(f"{name:<12} {value / GIB:.2f} GiB" if in_gib else f"{name:<12} {value:,.4g}")
    write_json(options, measurements)


if __name__ == "__main__":
    main()
