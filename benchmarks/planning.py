"""How long train/plan.py says that a training and a probe take, beside how long they take.

    python benchmarks/planning.py [--kinds training probe] [--processes 1 2] [--repeats 3] [--json FILE]

A turn is, for each kind and number of processes: the rates by launch/check.sh --rates-only, the plan from them, and the
real command right after, on the same simulated recording; so a change in the speed of the machine affects both. The
table has medians over the turns and the ratio of predicted to measured of each turn. Exits with 1 if the median ratio
of a whole run is off by more than --most (0.15).
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import ROOT, number, options_of, table, write_json

from train.plan import parse_command_line, parse_probe
from train.planning.memory import GIB
from train.planning.operations import probed_network
from train.planning.probe_plan import probe_work
from train.planning.probe_time import forward_pass, probe_time
from train.planning.rates import load_rates
from train.planning.recommendation import estimate_strategies
from train.planning.recording_sizes import manifest_of, probed_stimuli, training_stimuli
from train.planning.step_cost import measure_step
from train.planning.training_plan import memory_of, training_work
from train.planning.training_time import nearest, training_time

TIMEOUT = 3000  # s, of a command
KINDS = ("training", "probe")


@dataclass(frozen=True)
class Sizes:
    """What is run; by default what takes about a minute on two cores.

    Attributes:
        stimuli, sites, side: of the recording.
        training, probe: the words of either recipe.
    """

    stimuli: int
    sites: int
    side: int
    training: Sequence[str]
    probe: Sequence[str]


USUAL = Sizes(
    stimuli=3000,
    sites=168,
    side=64,
    training=(
        *("--backbone.name", "resnet18", "--backbone.weights", "random", "--precision", "fp32"),
        *("--batch.global-size", "32", "--epochs", "3"),
    ),
    probe=("--layers", "all", "--backbone.name", "resnet18", "--backbone.weights", "random", "--pool", "None"),
)


def launched(processes: int, *words: object) -> float:
    """Seconds of a command of ours, started by launch/local.sh."""
    started = time.perf_counter()
    run(["bash", "launch/local.sh", "-n", processes, *words])
    return time.perf_counter() - started


def run(words: Sequence[object]) -> None:
    """Run a command, which must succeed."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"ACCELERATE_USE_CPU": "true", "PYTHON": sys.executable}
    done = subprocess.run(
        [*map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def rates_for(words: Sequence[object], data: Path, processes: int, out: Path) -> Path:
    """The rates of a recipe."""
    run(["bash", "launch/check.sh", "-n", processes, "--json", out, "--rates-only", "--recipe", *words, "--data", data])
    return out


def predicted_training(words: Sequence[str], data: Path, processes: int, rates_file: Path) -> dict[str, float]:
    """What the plan says of a training."""
    options, recipe = parse_command_line(
        [*words, "--data", str(data), "--gpus", str(processes), "--rates", str(rates_file)]
    )
    rates = load_rates(rates_file)
    manifest = manifest_of(options)
    cost = measure_step(recipe, manifest)
    memory = memory_of([rates], options) * GIB
    ddp = next(one for one in estimate_strategies(recipe, cost, processes, memory) if one.strategy == "ddp")
    work = training_work(options, recipe, manifest, training_stimuli(options, recipe, manifest), cost, ddp)
    planned = training_time(work, nearest(work, [rates]))
    epochs = [planned.first_steps, *[work.steps * (planned.step + planned.images)] * (recipe.epochs - 1)]
    return parts_of_training(epochs, [planned.evaluation] * recipe.epochs, planned.whole)


def measured_training(words: Sequence[str], data: Path, processes: int, out: Path) -> dict[str, float]:
    """The seconds of a real training."""
    whole = launched(processes, "train/finetune.py", *words, "--data", data, "--out", out)
    lines = history_of(out)
    evaluations = [line["score_seconds"] for line in lines]
    return parts_of_training([line["train_seconds"] for line in lines], evaluations, whole)


def parts_of_training(epochs: Sequence[float], evaluations: Sequence[float], whole: float) -> dict[str, float]:
    """The seconds of the steps of each epoch and of each evaluation, and what the whole run takes besides."""
    return {
        "first epoch": epochs[0],
        "later epoch": statistics.median(epochs[1:]),
        "evaluation": statistics.median(evaluations),
        "start, checkpoints, end": whole - sum(epochs) - sum(evaluations),
        "whole": whole,
    }


def history_of(out: Path) -> list[dict[str, float]]:
    """The lines of a run's history.jsonl."""
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def predicted_probe(words: Sequence[str], data: Path, processes: int, rates_file: Path) -> dict[str, float]:
    """What the plan says of a probe."""
    options, recipe = parse_probe([*words, "--data", str(data), "--gpus", str(processes), "--rates", str(rates_file)])
    stimuli = probed_stimuli(options, recipe, manifest_of(options))
    work = probe_work(recipe, probed_network(recipe, stimuli.images.side), stimuli)
    rates = load_rates(rates_file)
    forward = forward_pass(work, [rates])
    assert forward is not None, "the check has measured this probe"
    planned = probe_time(work, forward)
    outside = planned.start + rates.place.end_seconds
    return {**planned.parts(), **parts_of_probe(planned.whole - outside, planned.whole)}


def measured_probe(words: Sequence[str], data: Path, processes: int, out: Path) -> dict[str, float]:
    """The seconds of a real probe."""
    whole = launched(processes, "train/probe.py", *words, "--data", data, "--out", out)
    return parts_of_probe(history_of(out)[0]["seconds"], whole)


def parts_of_probe(inside: float, whole: float) -> dict[str, float]:
    """The seconds from the activations to the results, and what the whole run takes besides."""
    return {"activations to results": inside, "start and end": whole - inside, "whole": whole}


PREDICT = {"training": predicted_training, "probe": predicted_probe}
MEASURE = {"training": measured_training, "probe": measured_probe}


def turn(kind: str, sizes: Sizes, processes: int, data: Path, folder: Path) -> dict[str, dict[str, float]]:
    """Rates, plan and run, right after each other."""
    words = getattr(sizes, kind)
    rates = rates_for(words, data, processes, folder / f"rates_{kind}_{processes}.json")
    with tempfile.TemporaryDirectory(dir=folder) as runs:
        measured = MEASURE[kind](words, data, processes, Path(runs) / "run")
    return {"predicted": PREDICT[kind](words, data, processes, rates), "measured": measured}


def compared(turns: Mapping[str, Sequence[Mapping[str, Mapping[str, float]]]]) -> str:
    """Predicted and measured seconds, and their ratio in each turn."""
    rows = [["", "", "predicted s", "measured s", "ratio", "of each turn"]]
    for title, of_title in turns.items():
        for part in of_title[0]["measured"]:
            values = {side: [one[side][part] for one in of_title] for side in ("predicted", "measured")}
            ratios = ratios_of(of_title, part)
            medians = [number(statistics.median(values[side])) for side in ("predicted", "measured")]
            each = " ".join(f"{ratio:.2f}" for ratio in ratios)
            rows.append([title, part, *medians, f"{statistics.median(ratios):.2f}", each])
    return table(rows)


def ratios_of(turns: Sequence[Mapping[str, Mapping[str, float]]], part: str) -> list[float]:
    """Predicted to measured, of each turn."""
    return [one["predicted"][part] / one["measured"][part] for one in turns]


def main() -> int:
    """Measure in turns and compare."""
    parser = options_of(__doc__, repeats=3)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--stimuli", type=int, default=USUAL.stimuli, help="of the simulated recording")
    parser.add_argument("--most", type=float, default=0.15, help="by which a whole run may be off")
    options = parser.parse_args()
    turns: dict[str, list[dict[str, dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        simulated = ["--stimuli", options.stimuli, "--sites", USUAL.sites, "--image-size", USUAL.side]
        run([sys.executable, "data_prep/pack.py", "simulated", "--out", data, *simulated, "--repetitions", 2])
        for _ in range(options.repeats):
            for kind in options.kinds:
                for processes in options.processes:
                    title = f"{kind}, {processes} process{'es' * (processes > 1)}"
                    turns.setdefault(title, []).append(turn(kind, USUAL, processes, data, Path(folder)))
                    print(title, turns[title][-1], file=sys.stderr, flush=True)
    if options.json:
        write_json(options, turns)
    print(compared(turns))
    off = [abs(statistics.median(ratios_of(of_title, "whole")) - 1) for of_title in turns.values()]
    return 1 if max(off) > options.most else 0


if __name__ == "__main__":
    sys.exit(main())
