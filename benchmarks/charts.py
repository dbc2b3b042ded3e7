"""What TensorBoard costs of a training: the time spent in charts, train scores and images, beside the whole.

    python benchmarks/charts.py [--network test_resnet] [--side 64] [--batch 32] [--epochs 30] [--stimuli 960]

One process trains as train/finetune.py does, on a simulated recording. Everything that feeds TensorBoard is timed where
it is called (`Watch`, `Board`), closing its file included, by the clock on the wall and by the CPU time of the process,
which other programs disturb less. The small network of the default is a hard case: charts cost the same whatever is
trained. Images come when they fit into half a percent of the time trained so far, so a short training has none, and
what the first ones cost is told apart.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from synthetic import pack_simulated, recipe_of, table, training

from train.finetuning import charts
from train.finetuning.charts import Watch
from train.run.monitor import Board

MOST_SHARE = 0.01
CLOCKS = (time.perf_counter, time.process_time)


class Meter:
    """Adds up the seconds that wrapped functions take, those that call each other counted once."""

    def __init__(self):
        self.seconds: dict[str, list[float]] = {}
        self._inside = False

    def wrap(self, owner: object, name: str) -> None:
        """Time a function that is found as `owner.name`."""
        call, label = getattr(owner, name), f"{getattr(owner, '__name__', owner)}.{name}".removeprefix("train.")
        setattr(owner, name, self._timed(call, label))

    def _timed(self, call: Callable, label: str) -> Callable:
        def timed(*args, **options):
            if self._inside:
                return call(*args, **options)
            self._inside, started = True, [clock() for clock in CLOCKS]
            try:
                return call(*args, **options)
            finally:
                self._inside = False
                spent = [clock() - start for clock, start in zip(CLOCKS, started, strict=True)]
                before = self.seconds.get(label, [0.0, 0.0])
                self.seconds[label] = [a + b for a, b in zip(before, spent, strict=True)]

        return timed


def main() -> None:
    """Train, count, compare."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--network", default="test_resnet")
    for name, value in (("side", 64), ("batch", 32), ("epochs", 30), ("stimuli", 960)):
        options.add_argument(f"--{name}", type=int, default=value)
    chosen = options.parse_args()
    meter = Meter()
    for owner, names in ((Watch, ("note", "train_means", "epoch")), (Board, ("scalars", "lay_out", "close"))):
        for name in names:
            meter.wrap(owner, name)
    drawn = []
    draw = charts.draw_figures
    charts.draw_figures = lambda *args: drawn.append(args[-1]) or draw(*args)
    with tempfile.TemporaryDirectory() as folder:
        data = pack_simulated(Path(folder) / "data", chosen.side, chosen.stimuli)
        sections = {"epochs": chosen.epochs, "loader": {"workers": 0}, "early_stopping": {"patience": 10**6}}
        recipe = recipe_of(chosen.network, chosen.side, chosen.batch, **sections)
        with training(recipe, data, Path(folder) / "run") as run:
            started = [clock() for clock in CLOCKS]
            run.run()
            run.monitor.board.close()
            whole = [clock() - start for clock, start in zip(CLOCKS, started, strict=True)]
    rows = [["", "wall s", "wall %", "CPU s", "CPU %"]]
    for name, seconds in [
        *meter.seconds.items(),
        ("together", [sum(s) for s in zip(*meter.seconds.values(), strict=True)]),
    ]:
        shares = [f"{100 * spent / of:.2f}" for spent, of in zip(seconds, whole, strict=True)]
        rows.append([name, f"{seconds[0]:.3f}", shares[0], f"{seconds[1]:.3f}", shares[1]])
    print(f"\n{chosen.epochs} epochs in {whole[0]:.1f} s ({whole[1]:.1f} s of CPU), images {len(drawn)} times")
    print(table(rows))
    share = float(rows[-1][-1]) / 100
    print(f"{'kept' if share < MOST_SHARE else 'BROKEN'}: charts take less than {MOST_SHARE:.0%} of the CPU time")


if __name__ == "__main__":
    main()
