"""Explainable variance of a simulated recording, and the components that predictions capture (docs/results/best.md).

    python benchmarks/simulated_parts.py SHARDS RUN [RUN ...]

SHARDS are of `data_prep/pack.py simulated`; each RUN (of finetune, probe, or an ensemble) was scored on val. The drives
of all sites are computed again from the recording's options (`data_prep/sources/simulation/population.py`), so the
noise-free rates and what is left of them without a component are known.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data_prep.shards.folder import ShardFolder  # noqa: E402
from data_prep.sources.simulation import population as model  # noqa: E402
from train.evaluation.metrics import mean_score  # noqa: E402
from train.regression.methods import r2_per_site  # noqa: E402

PERMUTATIONS = 200
LEARNABLE = ("object", "pose", "view", "image")


def population(options: dict) -> tuple[model.Population, dict[str, np.ndarray]]:
    """The sites, and their raw drives {component: (stimuli, sites)}."""
    sites = model.make_population(options["seed"], options["sites"])
    return sites, model.stimulus_drives(sites, options["seed"], options["stimuli"])


def without_detail(sites: model.Population, raw: dict[str, np.ndarray]) -> np.ndarray:
    """What knows all but `detail` predicts: the mean rates over permutations of it, (stimuli, sites)."""
    generator = np.random.default_rng(0)
    total = np.zeros(raw["detail"].shape)
    for _ in range(PERMUTATIONS):
        total += model.mean_rates(sites, raw | {"detail": generator.permutation(raw["detail"])})
    return total / PERMUTATIONS


def slopes(predicted: np.ndarray, drives: np.ndarray) -> np.ndarray:
    """Of each site's rates (stimuli, sites) on its drives (components, stimuli, sites): (components, sites)."""
    fitted = []
    for rates, drive in zip(predicted.T, np.moveaxis(drives, 2, 0), strict=True):
        standardised = ((drive - drive.mean(1, keepdims=True)) / drive.std(1, keepdims=True)).T
        fitted.append(np.linalg.lstsq(standardised, rates - rates.mean(), rcond=None)[0])
    return np.array(fitted).T


def main() -> None:
    """Print R2, and for each component the slopes that predictions have, in those of what knows all but detail."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("runs", type=Path, nargs="*")
    options = parser.parse_args()
    shards = ShardFolder(options.shards)
    val = shards.split("val")
    rows = [int(name.rpartition("_")[2]) for name in val.stimulus_ids]
    sites, raw = population(shards.manifest.provenance["options"])
    measured, known = val.rates(), without_detail(sites, raw)[rows]
    print(f"noise-free rates   {mean_score(r2_per_site(model.mean_rates(sites, raw)[rows], measured)):.3f}")
    print(f"all but detail     {mean_score(r2_per_site(known, measured)):.3f}")
    drives = np.stack([raw[name][rows] for name in LEARNABLE])
    best = slopes(known, drives)
    print(f"{'':40}  R2     {'  '.join(f'{name:8}' for name in LEARNABLE)}")
    for run in options.runs:
        with np.load(run / "eval" / "val" / "predictions.npz", allow_pickle=False) as arrays:
            predicted = arrays["prediction"].astype(np.float64)
        of_best = (slopes(predicted, drives) * best).sum(1) / np.square(best).sum(1)
        score = mean_score(r2_per_site(predicted, measured))
        print(f"{str(run)[-40:]:40}  {score:.3f}  {'  '.join(f'{share:<8.2f}' for share in of_best)}")


if __name__ == "__main__":
    main()
