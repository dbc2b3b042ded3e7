"""Does a plan hold? Coverage and power on the simulated recording, widths on real trials; the tables of docs/power.md.

On the simulated recording the true scores are known: intervals for other stimuli, other sites and both are drawn again
and again, and the power that pilots foretell is held beside how often a difference is found. On a folder with
trials.npy (stimuli, repetitions, sites), stimuli.csv and images/, the widths of our bootstrap intervals on parts of the
stimuli and of the trials are held beside those foretold from the whole, and from pilots. The models are ridge
regressions on fixed image features (Gabor energies, brightness and colour), and on every other of these.

    python benchmarks/power.py [--stimuli 2400] [--draws 400]
    python benchmarks/power.py FOLDER [--draws 40]
"""

import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from harness import ROOT, options_of, table, write_json
from PIL import Image

sys.path.insert(0, str(ROOT))

from data_prep.confidence_interval import confidence_interval
from data_prep.sources.simulation import population as model
from train.evaluation.confidence_intervals import bootstrap_means
from train.evaluation.power.components import POPULATIONS, Design, Population
from train.evaluation.power.influence import PLANNED
from train.evaluation.power.planning import Question
from train.evaluation.power.study import Study
from train.evaluation.power.trials import Trials

R2 = PLANNED["r2"]
SITES = 50  # that are drawn of the simulated ones
SIMULATED_DESIGNS = ((50, 4), (100, 2), (100, 8), (200, 2), (200, 8), (400, 4))  # stimuli, repetitions
PILOT, PILOTS = (200, 4), 20  # stimuli, repetitions
RECORDED_DESIGNS = ((40, 2), (40, 6), (80, 2), (80, 4), (80, 6), (160, 2), (160, 4), (160, 6))
RECORDED_PILOTS = ((80, 3), (160, 4))
RESAMPLES = 400
FORETOLD: tuple[Population, ...] = ("stimuli", "both")  # to which pilots generalise


@dataclass(frozen=True)
class Source:
    """Stimuli to draw from, and what two models predict for them.

    Attributes:
        predictions: of the better model and the other, float (stimuli, sites) each.
    """

    predictions: tuple[np.ndarray, np.ndarray]

    def study(self, response: np.ndarray, rows: np.ndarray, sites: np.ndarray, models: int, trials=None) -> Study:
        """Of the better model's score, or of its lead over the other."""
        predictions = [prediction[np.ix_(rows, sites)] for prediction in self.predictions[:models]]
        return Study(response, predictions, R2, trials)


def ridge_predictions(features: np.ndarray, rates: np.ndarray, fit: np.ndarray, scored: np.ndarray) -> np.ndarray:
    """Of a ridge regression whose one penalty has the least leave-one-out error: float64 (scored, sites)."""
    mean, deviation = features[fit].mean(axis=0), features[fit].std(axis=0) + 1e-6
    standardised = (features - mean) / deviation
    kernel = standardised[fit] @ standardised[fit].T
    values, vectors = np.linalg.eigh(kernel)
    centre = rates[fit].mean(axis=0)
    rotated = vectors.T @ (rates[fit] - centre)
    errors = {}
    for penalty in np.logspace(-4, 3, 29) * np.trace(kernel) / len(fit):
        shrinkage = np.maximum(values, 0) / (np.maximum(values, 0) + penalty)
        residual = rates[fit] - centre - vectors @ (shrinkage[:, None] * rotated)
        freedom = 1 - vectors**2 @ shrinkage - 1 / len(fit)
        errors[penalty] = float(((residual / freedom[:, None]) ** 2).mean())
    penalty = min(errors, key=errors.__getitem__)
    dual = vectors @ (rotated / (np.maximum(values, 0) + penalty)[:, None])
    return standardised[scored] @ (standardised[fit].T @ dual) + centre


def both_predictions(
    features: np.ndarray, rates: np.ndarray, fit: np.ndarray, scored: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of the model on all maps of image features, and of that on every other map."""
    half = features.reshape(len(features), -1, model.FIELDS**2)[:, ::2].reshape(len(features), -1)
    return ridge_predictions(features, rates, fit, scored), ridge_predictions(half, rates, fit, scored)


# --------------------------------------------------------------------------------------------------------- simulated


@dataclass(frozen=True)
class Simulated(Source):
    """The simulated recording as an endless one: held-out stimuli are drawn with replacement, trials simulated again.

    Attributes:
        rates: noise-free, float (stimuli, sites).
    """

    rates: np.ndarray

    @classmethod
    def of(cls, stimuli: int, sites: int, seed: int = 0) -> "Simulated":
        """Half of the stimuli fit the models, with 28 trials each; the others are the population."""
        population = model.make_population(seed, sites)
        features = model.stimulus_features(seed, stimuli)
        poses = model.pose_array([model.pose_of(seed, index) for index in range(stimuli)])
        raw = model.raw_drives(population, np.arange(stimuli) % len(model.OBJECTS), poses)
        rates = model.mean_rates(population, raw | {"image": model.image_drive(population, features)}).astype(float)
        order = np.random.default_rng(seed).permutation(stimuli)
        fit, scored = order[: stimuli // 2], order[stimuli // 2 :]
        averages = rates.copy()
        averages[fit] = trials_of(rates[fit], 28, np.random.default_rng(seed + 1)).mean(axis=1)
        return cls(both_predictions(features, averages, fit, scored), rates[scored])

    def truth(self, repetitions: int) -> np.ndarray:
        """True R2 over the population with a number of repetitions, float64 (models, sites)."""
        noise = (self.rates / model.WINDOW_S + model.OVERDISPERSION * self.rates**2).mean(axis=0) / repetitions
        variance = self.rates.var(axis=0) + noise
        errors = np.array([((self.rates - prediction) ** 2).mean(axis=0) for prediction in self.predictions])
        return 1 - (errors + noise) / variance


def trials_of(rates: np.ndarray, repetitions: int, rng: np.random.Generator) -> np.ndarray:
    """Trials, float64 (stimuli, repetitions, sites), of noise-free rates (stimuli, sites)."""
    trials = model.draw_trials(rates.ravel(), repetitions, rng).reshape(repetitions, *rates.shape)
    return trials.transpose(1, 0, 2).astype(np.float64)


def simulated_rows(source: Simulated, draws: int) -> Iterator[dict]:
    """Coverage and power of each design."""
    pilots = list(pilot_studies(source))
    every = np.arange(source.rates.shape[1])
    for stimuli, repetitions in SIMULATED_DESIGNS:
        rng = np.random.default_rng([stimuli, repetitions])
        truth = source.truth(repetitions)
        truths = (truth[0], truth[0] - truth[1])
        held = {(models, population): 0 for models in (1, 2) for population in POPULATIONS}
        found, design = dict.fromkeys(POPULATIONS, 0), Design(stimuli, SITES)
        for _ in range(draws):
            rows, sites = rng.integers(len(source.rates), size=stimuli), rng.integers(len(every), size=SITES)
            response = trials_of(source.rates[rows], repetitions, rng).mean(axis=1)
            for models in (1, 2):
                components = source.study(response[:, sites], rows, sites, models).components()
                these_stimuli = source.study(response, rows, every, models).components().value
                of_population: dict[Population, float] = {
                    "stimuli": truths[models - 1][sites].mean(),
                    "sites": these_stimuli,
                    "both": truths[models - 1].mean(),
                }
                for population, value in of_population.items():
                    low, high = components.interval(design, population)
                    held[models, population] += low <= value <= high
                    if models == 2:
                        found[population] += low > 0 or high < 0
        shown = source.truth(PILOT[1])
        foretold = {
            population: np.mean(
                [
                    Question(population, difference=float((shown[0] - shown[1]).mean())).power_of(
                        pilot, Design(stimuli, SITES, repetitions)
                    )
                    for pilot in pilots
                ]
            )
            for population in FORETOLD
        }
        yield {
            "stimuli": stimuli,
            "repetitions": repetitions,
            "score": {population: held[1, population] / draws for population in POPULATIONS},
            "difference": {population: held[2, population] / draws for population in POPULATIONS},
            "found": {population: found[population] / draws for population in foretold},
            "foretold": foretold,
        }


def pilot_studies(source: Simulated) -> Iterator[Study]:
    """Small recordings that power is foretold from."""
    for seed in range(PILOTS):
        rng = np.random.default_rng([seed, 7])
        rows = rng.integers(len(source.rates), size=PILOT[0])
        sites = rng.integers(source.rates.shape[1], size=SITES)
        trials = trials_of(source.rates[np.ix_(rows, sites)], PILOT[1], rng)
        yield source.study(trials.mean(axis=1), rows, sites, 2, Trials.of(trials))


def simulated_table(rows: Sequence[dict]) -> str:
    header = ["stimuli, repetitions"]
    header += [f"{what}: {population}" for what in ("score", "difference") for population in POPULATIONS]
    header += [f"found: {population} (foretold)" for population in FORETOLD]
    lines = [header]
    for row in rows:
        cells = [f"{row['stimuli']}, {row['repetitions']}"]
        cells += [f"{row[what][population]:.3f}" for what in ("score", "difference") for population in POPULATIONS]
        cells += [f"{row['found'][name]:.2f} ({row['foretold'][name]:.2f})" for name in FORETOLD]
        lines.append(cells)
    return table(lines)


# ---------------------------------------------------------------------------------------------------------- recorded


@dataclass(frozen=True)
class Recorded(Source):
    """A recording's held-out half, of which parts are drawn without replacement.

    Attributes:
        trials: float (stimuli, repetitions, sites), NaN = missing.
    """

    trials: np.ndarray

    @classmethod
    def read(cls, folder: Path) -> "Recorded":
        """The models are fitted to a random half."""
        trials = np.load(folder / "trials.npy").astype(np.float64)
        with (folder / "stimuli.csv").open(newline="") as file:
            names = [line["image"] for line in csv.DictReader(file)]
        features = np.stack([image_features(folder / name) for name in names])
        order = np.random.default_rng(0).permutation(len(names))
        fit, scored = order[: len(order) // 2], order[len(order) // 2 :]
        averages = np.nanmean(trials, axis=1)
        return cls(both_predictions(features, averages, fit, scored), trials[scored])

    def part(self, stimuli: int, repetitions: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Some random stimuli, and so many random trials of each."""
        rows = rng.choice(len(self.trials), stimuli, replace=False)
        present = ~np.isnan(self.trials[rows]).all(axis=2)
        order = np.argsort(np.where(present, rng.random(present.shape), 2), axis=1)[:, :repetitions]
        return rows, np.take_along_axis(self.trials[rows], order[:, :, None], axis=1)


def image_features(path: Path) -> np.ndarray:
    """Gabor energies, brightness and colours of an image: float32 (features,)."""
    with Image.open(path) as image:
        small = image.convert("RGB").resize((model.RETINA, model.RETINA), Image.Resampling.BILINEAR)
    return model.image_features(np.asarray(small))


def observed_widths(source: Recorded, stimuli: int, repetitions: int, draws: int) -> tuple[float, float]:
    """The mean widths of our bootstrap intervals of a score and of a difference on random parts."""
    rng = np.random.default_rng([stimuli, repetitions])
    widths = []
    for _ in range(draws):
        rows, trials = source.part(stimuli, repetitions, rng)
        response = np.nanmean(trials, axis=1)
        models = [bootstrap_means(prediction[rows], response, RESAMPLES)["r2"] for prediction in source.predictions]
        scores = [Study(response, [prediction[rows]], R2).components().value for prediction in source.predictions]
        score = confidence_interval(scores[0], models[0], stimuli)
        difference = confidence_interval(scores[0] - scores[1], models[0] - models[1], stimuli)
        assert score is not None
        assert difference is not None
        widths.append([score[1] - score[0], difference[1] - difference[0]])
    of_score, of_difference = np.mean(widths, axis=0)
    return float(of_score), float(of_difference)


def foretold_widths(source: Recorded, rows: np.ndarray, trials: np.ndarray, design: Design) -> tuple[float, float]:
    """The widths that a part of the recording foretells for a design."""
    response, every = np.nanmean(trials, axis=1), np.arange(trials.shape[2])
    known = Trials.of(trials)
    studies = [source.study(response, rows, every, models, known) for models in (1, 2)]
    score, difference = (2 * study.components(design.repetitions).half_width(design, "stimuli") for study in studies)
    return score, difference


def recorded_rows(source: Recorded, draws: int) -> Iterator[dict]:
    """Foretold over observed widths of each design."""
    whole, sites = np.arange(len(source.trials)), source.trials.shape[2]
    parts = {}
    for pilot in RECORDED_PILOTS:
        rng = np.random.default_rng([*pilot, 3])
        parts[pilot] = [source.part(*pilot, rng) for _ in range(PILOTS)]
    for stimuli, repetitions in RECORDED_DESIGNS:
        design = Design(stimuli, sites, repetitions)
        observed = np.array(observed_widths(source, stimuli, repetitions, draws))
        row = {"stimuli": stimuli, "repetitions": repetitions, "observed": observed.tolist()}
        row["whole"] = (np.array(foretold_widths(source, whole, source.trials, design)) / observed).tolist()
        for pilot, drawn in parts.items():
            if pilot[0] <= stimuli and pilot[1] <= repetitions and pilot != (stimuli, repetitions):
                ratios = [np.array(foretold_widths(source, *part, design)) / observed for part in drawn]
                row[f"{pilot[0]}, {pilot[1]}"] = np.percentile(ratios, [50, 5, 95], axis=0).T.tolist()
        yield row


def recorded_table(rows: Sequence[dict]) -> str:
    pilots = [f"{stimuli}, {repetitions}" for stimuli, repetitions in RECORDED_PILOTS]
    header = ["stimuli, repetitions", "width: score", "difference", "foretold / observed: score", "difference"]
    header += [f"from {pilot}: {what}" for pilot in pilots for what in ("score", "difference")]
    lines = [header]
    for row in rows:
        cells = [f"{row['stimuli']}, {row['repetitions']}", *(f"{width:.4f}" for width in row["observed"])]
        cells += [f"{ratio:.2f}" for ratio in row["whole"]]
        for pilot in pilots:
            ratios = row.get(pilot)
            cells += ["-", "-"] if ratios is None else [f"{m:.2f} ({low:.2f} to {high:.2f})" for m, low, high in ratios]
        lines.append(cells)
    return table(lines)


def main() -> None:
    parser = options_of(__doc__ or "")
    parser.add_argument("recording", type=Path, nargs="?", help="folder with trials.npy, stimuli.csv and images/")
    parser.add_argument("--stimuli", type=int, default=2400, help="of the simulated recording")
    parser.add_argument("--sites", type=int, default=168, help="of the simulated recording")
    parser.add_argument("--draws", type=int, default=400)
    options = parser.parse_args()
    if options.recording is None:
        simulated = Simulated.of(options.stimuli, options.sites)
        rows = list(simulated_rows(simulated, options.draws))
        print(f"true R2 with 4 repetitions: {simulated.truth(4).mean(axis=1).round(3).tolist()}")
        print(simulated_table(rows))
    else:
        recorded = Recorded.read(options.recording)
        rows = list(recorded_rows(recorded, options.draws))
        print(recorded_table(rows))
    write_json(options, rows)


if __name__ == "__main__":
    main()
