"""Training speed when fed by the loader, cold and warm, relative to a batch that stays in memory.

    python benchmarks/feed.py [--network resnet18] [--side 96] [--batch 32] [--steps 10] [--repeats 9] [--json FILE]

The run is built as train/finetune.py does: random weights, bf16, channels-last, one process, no decoding processes of
its own, so that decoding and training share one thread: the hardest case for a loader. `synthetic` repeats a batch;
`cold` decodes every image each time (loader.cache off), `warm` has them decoded already. Each takes some steps in
turn, counted per second of processor time; medians over the turns, ratios within a turn. The aims are 0.97 cold and
0.99 warm. `again` is the synthetic side a second time: how far two equal things differ here.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import torch
from harness import Side, Turns, measure_in_turns, options_of, write_json
from synthetic import first_step, pack_jpegs, recipe_of, training
from training_speed import endless, fill_cache, loader_of

from train.data.batches import Batch
from train.finetuning.loop import Training
from train.run.recipe import Recipe

STIMULI = 640


def side_of(run: Training, batches: Iterator[list[Batch]], steps: int) -> Side:
    """A side of the comparison: images per second of processor time over some optimizer steps."""

    def side() -> dict[str, float]:
        started, images = time.process_time(), 0
        for micros in islice(batches, steps):
            run.step(micros, 0)
            images += sum(len(micro.images) for micro in micros)
        return {"images/s": images / (time.process_time() - started)}

    return side


def measure(recipe: Recipe, data: Path, out: Path, steps: int, repeats: int) -> Turns:
    """Images per second of every side, in turns."""
    with ExitStack() as stack:
        run = stack.enter_context(training(recipe, data, out))
        stack.enter_context(run.runtime.cudnn_autotuning(recipe.deterministic))
        fixed = first_step(run)
        warm = loader_of(recipe, data, "ram")
        fill_cache(warm)
        sides = {
            "synthetic": iter(lambda: fixed, None),
            "cold": endless(loader_of(recipe, data, "off")),
            "warm": endless(warm),
            "again": iter(lambda: fixed, None),
        }
        timed = {name: side_of(run, batches, steps) for name, batches in sides.items()}
        return measure_in_turns(timed, repeats)["images/s"]


def main() -> None:
    """Pack, measure, print."""
    parser = options_of(__doc__, repeats=9)
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--side", type=int, default=96, help="size of the images in pixels")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps per turn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"optimizer": {"name": "adamw"}, "loader": {"workers": 0}}
    recipe = recipe_of(options.network, options.side, options.batch, **settings)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = pack_jpegs(folder / "shards", STIMULI, STIMULI, options.side)
        speeds = measure(recipe, data, folder / "run", options.steps, options.repeats)
    print(f"{options.network} at {options.side} px, batch {options.batch}, load average {os.getloadavg()[0]:.1f}")
    print(speeds.table("images/s", {"of synthetic": "synthetic"}))
    write_json(options, {"images_per_second": speeds.values})


if __name__ == "__main__":
    main()
