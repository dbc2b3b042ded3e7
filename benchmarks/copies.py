"""What copies of an image on both sides of a split do to a score: a probe of frozen features, with them and without.

    python benchmarks/copies.py RECORDING --out DIR [--seeds 0 1 2] [--layer blocks.3] [--backbone NAME]

RECORDING is a folder as `pack.py folder` reads it, some of whose images are shown under two ids, such as v4_we_190925.
For each seed a fifth of the stimuli is held out, with copies dealt as it comes and with copies together; the probe is
the same. Images that are shown once are the control: nothing about them differs. Finished packs and probes in DIR are
used again.
"""

import argparse
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.shards.folder import ShardFolder
from data_prep.shards.image_identity import image_identities
from train.evaluation.metrics import mean_score
from train.evaluation.predictions_file import read_predictions
from train.regression.methods import r2_per_site

DEALS = ("as-dealt", "together")
ROOT = Path(__file__).parent.parent


def run(script: str, *words: str | Path) -> None:
    """Run a command of ours."""
    subprocess.run([sys.executable, ROOT / script, *map(str, words)], check=True, stdout=subprocess.DEVNULL)


@dataclass(frozen=True)
class Probed:
    """A shard folder, and the folder of a probe on it."""

    shards: Path
    probe: Path


def probed(options: argparse.Namespace, deal: str, seed: int) -> Probed:
    """The shards and the probe of a seed, made if they do not exist."""
    shards, probe = options.out / f"{deal}-{seed}", options.out / f"run-{deal}-{seed}"
    if not shards.exists():
        split = ("--split", "random", "--split-seed", str(seed), "--split-fractions", "0.2", "0")
        run("data_prep/pack.py", "folder", options.recording, "--out", shards, *split, "--copies", deal)
    if not (probe / "eval/val/metrics.json").exists():
        network = ("--layers", options.layer, "--backbone.name", options.backbone)
        run("train/probe.py", "--data", shards, "--out", probe, *network, "--seen", "keep")
    return Probed(shards, probe)


def scores(probed: Probed) -> dict[str, float]:
    """R2, averaged over sites, on the held-out stimuli: on all, and on those whose image is shown twice and once."""
    folder = ShardFolder(probed.shards)
    names = {split: [row.tobytes() for row in image_identities(folder, split).pixels] for split in ("train", "val")}
    shown = Counter(names["train"] + names["val"])
    count = dict(zip(folder.split("val").stimulus_ids, (shown[name] for name in names["val"]), strict=True))
    predictions = read_predictions(probed.probe / "eval/val/predictions.npz")
    assert predictions.responses is not None, "val has responses"
    twice = np.array([count[stimulus] > 1 for stimulus in predictions.stimulus_ids])
    parts = {"all": np.full(len(twice), True), "shown twice": twice, "shown once": ~twice}
    return {
        name: mean_score(r2_per_site(predictions.rates[part], predictions.responses[part]))
        for name, part in parts.items()
    }


def main() -> None:
    """Pack, probe, and print a table: the mean over seeds, and the lowest and highest of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recording", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--layer", default="blocks.3")
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    options = parser.parse_args()
    print("| copies | all | shown twice | shown once |\n|---|---|---|---|")
    for deal in DEALS:
        results = [scores(probed(options, deal, seed)) for seed in options.seeds]
        cells = []
        for part in results[0]:
            values = [result[part] for result in results]
            cells.append(f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        print(f"| {deal} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
