"""What each part of our training step costs beyond a bare PyTorch loop, timed within the step itself.

    python benchmarks/step_parts.py [--steps 500] [--large] [--json FILE]

benchmarks/overhead.py compares whole steps, whose noise is larger than most parts. Here every part is timed where it
runs, in each of many steps of train/finetune.py's loop, among the work that has replaced its code and data in the
caches; repeated by itself it would take a tenth of that. Medians over the steps and their middle halves, in us; by the
clock on the wall, of which other programs take little from parts so short. One process, one thread, no strategy.

Not among them: factors of the loss, which are given as its gradient, and the few lines between the parts.
"""

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from harness import options_of, table, write_json
from overhead import LARGE, SMALL, recipe_for
from synthetic import first_step, pack_simulated, training

from train.data.batches import Batch
from train.distributed.step_timing import StepClock, _Part
from train.finetuning import loop
from train.finetuning.loop import Training

WARM_UP = 20  # steps that do not count


def parts_of(run: Training) -> dict[str, list[tuple[object, str]]]:
    """The functions of each part: where they are found, and their names."""
    return {
        "seeds": [(run._seeds, "begin")],
        "learning rates": [(loop, "set_rates")],
        "copy to the device": [(Batch, "to")],
        "times of the parts": [(_Part, "__enter__"), (_Part, "__exit__"), (StepClock, "finish_step")],
        "predictions kept for train scores": [(run._charts, "keep_predictions")],
        "check that the gradient is finite": [(run.engine, "_check_gradient")],
        "record for warnings": [(run._non_finite, "record")],
        "heartbeat": [(run.runtime, "beat")],
    }


class PartTimes:
    """Nanoseconds of each part, step by step."""

    def __init__(self) -> None:
        self._steps: dict[str, list[int]] = defaultdict(list)
        self._now: dict[str, int] = defaultdict(int)

    def timed(self, part: str, function: Callable) -> Callable:
        """The function, with its time added to a part."""

        def call(*args, **kwargs):
            began = time.perf_counter_ns()
            try:
                return function(*args, **kwargs)
            finally:
                self._now[part] += time.perf_counter_ns() - began

        return call

    def finish_step(self, counts: bool) -> None:
        """Keep the times of the step, if it counts, and begin another."""
        if counts:
            for part, nanoseconds in self._now.items():
                self._steps[part].append(nanoseconds)
            self._steps["all of these"].append(sum(self._now.values()))
        self._now.clear()

    def quartiles(self) -> dict[str, list[float]]:
        """Of each part, in us."""
        return {
            part: [value / 1000 for value in statistics.quantiles(steps, n=4)] for part, steps in self._steps.items()
        }


def measure(run: Training, steps: int) -> dict[str, list[float]]:
    """Quartiles of each part over the steps, in us."""
    [batch] = first_step(run)
    times = PartTimes()
    for part, functions in parts_of(run).items():
        for owner, name in functions:
            setattr(owner, name, times.timed(part, getattr(owner, name)))
    for number in range(WARM_UP + steps):
        run.runtime.beat(0.0)
        run.step([batch], 0)
        times.finish_step(counts=number >= WARM_UP)
        if number % loop.STEPS_BETWEEN_READS == 0:
            run._read_losses()
    return times.quartiles()


def main() -> None:
    """Measure and print."""
    parser = options_of(__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--large", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = pack_simulated(Path(folder) / "data", side=(LARGE if options.large else SMALL)[1])
        with training(recipe_for("plain", options.large), data, Path(folder) / "run") as run:
            quartiles = measure(run, options.steps)
    rows = [[part, f"{middle:.0f}", f"{low:.0f}-{high:.0f}"] for part, (low, middle, high) in quartiles.items()]
    print(table([["part", "us a step", "middle half"], *rows]))
    write_json(options, quartiles)


if __name__ == "__main__":
    main()
