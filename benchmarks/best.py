"""Make the tables of docs/results/best.md: how well each system predicts responses to new images.

    python benchmarks/best.py RECORDING [RECORDING ...] --out OUT [--folds 5] [--subsets 100 200 400]

A RECORDING is a folder as `pack.py folder` takes it, or the word `simulated`. Every system is trained and scored by the
real commands on a fixed split (a fifth held out, seed 0), with --folds by cross-validation too, and with --subsets on
parts of train, whose scores make the data-efficiency curve. With several recordings a network is also fine-tuned on the
train parts of all others before it is frozen and probed. What is done is not done again: the command goes on where it
was stopped, and systems share the runs that they have in common.

OUT/table.md, results.json      the tables, and all their numbers
OUT/<recording>/<division>/     shards, runs (with their wall time in seconds.json) and ensembles
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness import ROOT, run_checked

sys.path.insert(0, str(ROOT))

from data_prep.confidence_interval import confidence_interval
from train.evaluation.confidence_intervals import bootstrap_means
from train.evaluation.metrics import POSSIBLE, mean_score
from train.regression.methods import r2_per_site

SIMULATED = "simulated"
GIVEN = "given"
LITE = "tf_efficientnet_lite"
FOLDS = range(1, 6)
MEMBERS = ((0, 168), (1, 168), (2, 168))  # network and px of the probes that are joined
FINE_TUNED = ["train/finetune.py", "train/recipes/best.yaml"]
FAST = ["train/finetune.py", "train/recipes/best_fast.yaml"]
FIELDS = ["train/probe.py", "train/recipes/probes/best.yaml"]
TUNE = [*FAST, "--optimizer.lr", "1e-4", "--optimizer.backbone-lr-factor", "1", "--epochs", "6"]


@dataclass(frozen=True)
class Step:
    """One command and the folder that it fills.

    Attributes:
        name: of the folder.
        words: the command.
        needs: the steps whose folders it uses.
        elsewhere: whether it is trained on the other recordings.
        takes: the option that receives the first of `needs`, and the file in that folder.
    """

    name: str
    words: tuple[str, ...]
    needs: tuple["Step", ...] = ()
    elsewhere: bool = False
    takes: tuple[str, str] | None = None

    @property
    def is_ensemble(self) -> bool:
        """Whether it combines its needs into an ensemble."""
        return self.words[0] == "train/evaluate.py"

    @property
    def trains(self) -> bool:
        """Whether it depends on a trained network, and so on the seed."""
        return self.words[0] == "train/finetune.py" or any(need.trains for need in self.needs)

    @property
    def needs_others(self) -> bool:
        """Whether it needs other recordings."""
        return self.elsewhere or any(need.needs_others for need in self.needs)


def step(name: str, words: Sequence[Any], *needs: Step, **options: Any) -> Step:
    """Make a step; the words are converted to strings."""
    return Step(name, tuple(map(str, words)), needs, **options)


def fields(network: int, size: int) -> Step:
    """A probe of a frozen network through windows."""
    return step(f"fields_{network}_{size}", [*FIELDS, "--backbone.name", f"{LITE}{network}", "--images.size", size])


def fold(number: int, recipe: Sequence[str] = FINE_TUNED, name: str = "fine_tuned", *words: str) -> Step:
    """A fine-tuned network whose best epoch is selected on one fold of train."""
    return step(f"{name}_{number}", [*recipe, "--early-stopping.fold", number, *words])


def stacked(name: str, *needs: Step, combine: str = "stack") -> Step:
    """An ensemble."""
    return step(name, ["train/evaluate.py", "--combine", combine], *needs)


def systems() -> dict[str, Step]:
    """The systems to compare, in the order of the table."""
    probe = ["train/probe.py", "--images.size"]
    head = ["--backbone.trainable", "head", "--optimizer.backbone-lr-factor", "1"]
    folds, many = [fold(k) for k in FOLDS], [fields(*member) for member in MEMBERS]
    one = many[0]
    ensemble = stacked("ensemble", *many, *folds)
    tuned = step("tuned_on_others", TUNE, elsewhere=True)
    last = ("--backbone.weights", "checkpoints/last/network.safetensors")
    transferred = step("fields_tuned", [*one.words, "--backbone.cut", "blocks.5"], tuned, takes=last)
    return {
        "pixels": step("pixels", [*probe, 112, "--layers", "pixels"]),
        "frozen, best layer": step("frozen", [*probe, 224, "--layers", "all"]),
        "frozen, through windows": one,
        "head only": fold(1, FINE_TUNED, "head", *head),
        "fine-tuned": folds[0],
        "fine-tuned, fast": fold(1, FAST, "fast"),
        "fine-tuned, five folds": stacked("folds", *folds, combine="mean"),
        "frozen, three networks": stacked("frozen_three", *many),
        "tuned on the others, through windows": transferred,
        "these, and tuned on the others": stacked("frozen_tuned", *many, transferred),
        "best": stacked("best", one, *folds),
        "ensemble": ensemble,
        "ensemble, and tuned on the others": stacked("ensemble_tuned", *many, transferred, *folds),
        "distilled": step(
            "distilled", ["train/finetune.py", "train/recipes/distill.yaml"], ensemble, takes=("--distill.teacher", "")
        ),
        "control: frozen, shuffled": step("control_frozen", [*one.words, "--shuffle-responses"]),
        "control: fine-tuned, shuffled": fold(1, FINE_TUNED, "control_fine_tuned", "--task.shuffle-responses"),
    }


CURVE = (
    *("pixels", "frozen, best layer", "frozen, through windows", "frozen, three networks"),
    *("head only", "fine-tuned", "fine-tuned, fast", "best", "ensemble"),
)


# ------------------------------------------------------------------------------------------------------ running steps


def command(words: Sequence[Any]) -> None:
    """Run a command of the project, which must succeed."""
    run_checked([sys.executable, *words], PYTHONPATH=str(ROOT))


def pack(recording: str, folder: Path, division: str, folds: int) -> Path:
    """Pack the shards of a division, `given` or `fold_K`, unless they exist; returns their folder."""
    shards = folder / division / "shards"
    if shards.exists():
        return shards
    source = [SIMULATED] if recording == SIMULATED else ["folder", Path(recording).resolve()]
    if division == GIVEN:
        words = [] if recording == SIMULATED else ["--val-fraction", "0.2", "--test-fraction", "0"]
    else:
        words = ["--split", "k-fold", "--folds", str(folds), "--fold", division.partition("_")[2]]
    command(["data_prep/pack.py", *source, "--out", shards, *words])
    return shards


def done(wanted: Step, folder: Path) -> bool:
    """Whether a step has been scored (or trained, if it is not scored)."""
    return (folder / ("seconds.json" if wanted.elsewhere else "eval/val/metrics.json")).exists()


@dataclass(frozen=True)
class Cell:
    """The data, subset and seed of a set of runs.

    Attributes:
        shards: of the division; the runs are stored beside them.
        others: shards of the other recordings.
        subset: number of training stimuli, None for all.
        seed: of training, and of the subset.
    """

    shards: Path
    others: tuple[Path, ...]
    subset: int | None
    seed: int

    def folder(self, wanted: Step) -> Path:
        """Folder of a step; steps that do not depend on the seed share one."""
        of_subset = self.subset is not None and not wanted.elsewhere
        parts = ["runs", *([str(self.subset)] * of_subset)]
        if self.seed and (of_subset or wanted.trains):
            parts.append(f"seed_{self.seed}")
        division = self.shards.parent.with_name(GIVEN) if wanted.elsewhere else self.shards.parent
        return division / "_".join(parts) / wanted.name

    def words(self, wanted: Step) -> list[str | Path]:
        """Options for training and probing."""
        subset = [] if self.subset is None or wanted.elsewhere else ["--subset", str(self.subset)]
        return ["--data", *(self.others if wanted.elsewhere else [self.shards]), *subset, "--seed", str(self.seed)]


def run(wanted: Step, cell: Cell) -> Path:
    """Run a step and the steps it needs, unless they are done; returns its folder."""
    needed = [run(need, cell) for need in wanted.needs]
    folder = cell.folder(wanted)
    if done(wanted, folder):
        return folder
    print(f"{time.strftime('%H:%M:%S')} {folder}", file=sys.stderr, flush=True)
    started = time.monotonic()
    if wanted.is_ensemble:
        command([wanted.words[0], *needed, *wanted.words[1:], "--out", folder])
    else:
        resume = ["--resume"] if (folder / "recipe.yaml").exists() else []
        taken = [] if wanted.takes is None else [wanted.takes[0], needed[0] / wanted.takes[1]]
        command([*wanted.words, *cell.words(wanted), "--out", folder, *taken, *resume])
        if wanted.words[0] == "train/finetune.py" and not wanted.elsewhere:
            command(["train/evaluate.py", folder])
    before = seconds(folder)
    (folder / "seconds.json").write_text(json.dumps(before + time.monotonic() - started))
    return folder


def seconds(folder: Path) -> float:
    """Wall time of a step alone, over all its starts."""
    path = folder / "seconds.json"
    return json.loads(path.read_text()) if path.exists() else 0.0


def cost(wanted: Step, cell: Cell) -> float:
    """Wall time of a step and of all steps it needs."""
    names: dict[str, float] = {}

    def add(part: Step) -> None:
        names[part.name] = seconds(cell.folder(part))
        for need in part.needs:
            add(need)

    add(wanted)
    return sum(names.values())


# ------------------------------------------------------------------------------------------------------------- scores


def scores(folders: Sequence[Path]) -> dict[str, Any]:
    """Means of R2, EV and r over sites, and the interval of R2 over stimuli; folds are pooled."""
    parts = []
    for folder in folders:
        with np.load(folder / "eval" / "val" / "predictions.npz", allow_pickle=False) as arrays:
            parts.append((arrays["prediction"], arrays["target"]))
    prediction, target = (np.concatenate(rows) for rows in zip(*parts, strict=True))
    metrics = json.loads((folders[0] / "eval" / "val" / "metrics.json").read_text())
    r2 = mean_score(r2_per_site(prediction, target))
    interval = confidence_interval(r2, bootstrap_means(prediction, target)["r2"], len(target), POSSIBLE["r2"])
    scored = {"r2": r2, "ci95": interval}
    scored |= {"stimuli": len(target), "training_stimuli": metrics.get("training_stimuli")}
    if len(folders) == 1:
        regression = metrics["regression"]
        names = ("explained_variance", "pearson_r", "ceiled_explained_variance", "feve")
        scored |= {name: regression[name]["mean"] for name in names if name in regression}
    return scored


def row(name: str, result: dict[str, Any]) -> str:
    """A line of the table."""
    (low, high), r2 = result["ci95"], result["r2_by_seed"]
    spread = f" ({min(r2):.3f} to {max(r2):.3f})" if len(r2) > 1 else ""
    return f"| {name} | {np.mean(r2):.3f}{spread} | [{low:.3f}, {high:.3f}] | {result['seconds'] / 60:.0f} |"


TITLES = "| system | R2, mean over seeds | 95 % over stimuli, first seed | minutes |"


def tables(results: Sequence[dict[str, Any]]) -> str:
    """All results as Markdown, a table for each recording and division."""
    of_title: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        subset = f", {result['subset']} training stimuli" if result["subset"] else ""
        title = f"{result['recording']}, {result['division']}{subset} ({result['stimuli']} stimuli scored)"
        of_title.setdefault(title, []).append(result)
    parts = []
    for title, together in of_title.items():
        parts.append("\n".join([title, "", TITLES, "| --- | --- | --- | --- |"]))
        parts[-1] += "".join(f"\n{row(result['system'], result)}" for result in together)
    return "\n\n".join(parts) + "\n"


def write(out: Path, results: Sequence[dict[str, Any]]) -> None:
    """Write the results so far."""
    for name, text in (("results.json", json.dumps(results, indent=1)), ("table.md", tables(results))):
        temporary = out / f".{name}.tmp"
        temporary.write_text(text)
        temporary.replace(out / name)


def measured(recording: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The results of one recording, as they come."""
    known, name = systems(), Path(recording).name
    others = tuple(
        pack(other, options.out / Path(other).name, GIVEN, 0) for other in options.recordings if other != recording
    )
    wanted = [system for system in options.only if others or not known[system].needs_others]
    divisions = [[GIVEN]] + ([[f"fold_{k}" for k in range(1, options.folds + 1)]] if options.folds else [])
    cells = [(division, None, system) for division in divisions for system in wanted]
    cells += [([GIVEN], size, system) for size in options.subsets for system in wanted if system in CURVE]
    for division, subset, system in cells:
        shards = [pack(recording, options.out / name, part, options.folds) for part in division]
        by_seed, spent = [], 0.0
        for seed in options.seeds:
            parts = [Cell(part, others, subset, seed) for part in shards]
            by_seed.append(scores([run(known[system], part) for part in parts]))
            spent += sum(cost(known[system], part) for part in parts) / len(options.seeds)
        label = division[0] if len(division) == 1 else f"{len(division)}-fold"
        facts = {"recording": name, "division": label, "subset": subset, "system": system, "seconds": spent}
        yield (
            facts | by_seed[0] | {"seeds": options.seeds, "r2_by_seed": [seed_scores["r2"] for seed_scores in by_seed]}
        )


def main() -> None:
    """Run what is missing, recording by recording, and write the tables after every cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = systems()
    parser.add_argument("recordings", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=list(known), default=list(known), metavar="SYSTEM")
    parser.add_argument("--folds", type=int, default=0, help="of cross-validation, beside the given split")
    parser.add_argument("--subsets", type=int, nargs="*", default=[], help="training stimuli, for the curve")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of training and of subsets")
    options = parser.parse_args()
    options.out, results = options.out.resolve(), []
    for recording in options.recordings:
        for result in measured(recording, options):
            results.append(result)
            write(options.out, results)
    print((options.out / "table.md").read_text())


if __name__ == "__main__":
    main()
