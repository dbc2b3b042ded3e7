"""Score the recipes that fit a small CPU side by side: the tables of docs/results/recipes.md.

    python benchmarks/recipes.py DATA OUT --seeds 0 1 2 [--size 112] [--only NAME ...]

Every system is trained and scored by the real commands, one run per seed; what is scored already is not done again.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from harness import CommandFailed, run_checked

LITE = ["train/recipes/quickstart.yaml", "--epochs", "10"]
SYSTEMS = {
    "cnn2": ["train/recipes/cnn2.yaml", "--epochs", "30"],
    "cnn3": ["train/recipes/cnn3.yaml", "--epochs", "30"],
    "resnet18, random weights": ["train/recipes/resnet18.yaml", "--backbone.weights", "random", "--epochs", "10"],
    "lite0, random weights, head only": [*LITE, "--backbone.weights", "random", "--backbone.trainable", "head"],
    "lite0, random weights": [*LITE, "--backbone.weights", "random"],
    "lite0, head only": [*LITE, "--backbone.trainable", "head"],
    "lite0": LITE,
    "lite0, correlation loss": [*LITE, "--loss.responses", "correlation"],
    "lite0, Poisson loss": [*LITE, "--loss.responses", "poisson"],
    "lite0, hybrid": [*LITE, "--task.kind", "hybrid"],
    "lite0, shuffled responses (control)": [*LITE, "--task.shuffle-responses"],
    "head_first": ["train/recipes/head_first.yaml"],
}


def run(data: Path, out: Path, name: str, seed: int, size: int) -> dict | None:
    """Train and score one system, unless that is done; returns its response metrics, or None if training failed."""
    folder = out / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}"
    scores = folder / "eval" / "val" / "metrics.json"
    if not scores.exists():
        resume = ["--resume"] if (folder / "recipe.yaml").exists() else []
        options = ["--data", data, "--out", folder, "--images.size", size, "--seed", seed, *resume]
        for command in (["train/finetune.py", *SYSTEMS[name], *options], ["train/evaluate.py", folder]):
            try:
                run_checked([sys.executable, *command])
            except CommandFailed as failed:
                print(f"{name}: {str(failed).strip().splitlines()[-1]}", file=sys.stderr)
                return None
    return json.loads(scores.read_text())["regression"]


def row(name: str, scores: list[dict]) -> str:
    """A line of the table: mean over seeds and their range, interval over stimuli of the first seed."""
    r2 = [block["r2"]["mean"] for block in scores]
    low, high = scores[0]["r2"]["ci95"]
    explained = statistics.mean(block["explained_variance"]["mean"] for block in scores)
    r = statistics.mean(block["pearson_r"]["mean"] for block in scores)
    return (
        f"| {name} | {statistics.mean(r2):.3f} ({min(r2):.3f} to {max(r2):.3f}) | [{low:.3f}, {high:.3f}] "
        f"| {explained:.3f} | {r:.3f} |"
    )


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--only", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS), metavar="NAME")
    options = parser.parse_args()
    data, out = options.data.resolve(), options.out.resolve()
    lines = []
    for name in options.only:
        scores = [run(data, out, name, seed, options.size) for seed in options.seeds]
        complete = [of_seed for of_seed in scores if of_seed is not None]
        if len(complete) == len(scores):
            lines.append(row(name, complete))
            print(lines[-1], file=sys.stderr, flush=True)
    print("| system | R2: mean over seeds (range) | 95 % over stimuli, first seed | EV | r |\n|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
