"""Scores against training stimuli: one curve for each system that was trained on several numbers of stimuli.

A system is what a lab would choose: all settings of a run except which stimuli it had (`subset`, `data`), the random
draws (`seed`, and the fold that selected its epoch), and how it was computed. An ensemble is a system made of its
members' systems and the way they are combined. Runs share a curve only where all of this is known and equal.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common.errors import BadInput
from data_prep.common.option_fields import marked
from data_prep.common.terminal import printable
from train.evaluation.ensemble_record import ENSEMBLE_FILE, read_record
from train.reporting.reported_run import ScoredRun, shortest_names
from train.run.field_rules import FREE_ON_RESUME
from train.run.folder import RunFolder, flattened
from train.run.recipe import ProbeRecipe, Recipe
from train.run.yaml_files import read_yaml

_FREE = marked(Recipe, FREE_ON_RESUME) | marked(ProbeRecipe, FREE_ON_RESUME)
NOT_OF_THE_SYSTEM = _FREE | {"subset", "seed", "early_stopping.fold"}  # settings that a system's runs may differ in
LEAST_SIZES = 3  # below, a straight line fits too easily to mean anything
DEEPEST = 20  # levels of ensembles of ensembles
MOST_NAMED = 3  # settings in a system's name


@dataclass(frozen=True)
class Point:
    """The runs of a system with the same number of training stimuli; they differ in seed or fold."""

    stimuli: int
    runs: tuple[ScoredRun, ...]

    @cached_property
    def scores(self) -> list[float]:
        """R2 of each run, mean over sites."""
        return [scored.regression.r2.mean for scored in self.runs if scored.regression.r2.mean is not None]

    @property
    def mean(self) -> float:
        """R2, mean over the runs."""
        return float(np.mean(self.scores))

    @property
    def ci95(self) -> tuple[float, float] | None:
        """The interval over the scored stimuli, of a single run."""
        return self.runs[0].regression.r2.ci95 if len(self.runs) == 1 else None

    @property
    def spread(self) -> tuple[float, float] | None:
        """The lowest and the highest R2, of several runs."""
        return (min(self.scores), max(self.scores)) if len(self.runs) > 1 else None


@dataclass(frozen=True)
class Curve:
    """A system's scores against its training stimuli.

    Attributes:
        name: of the system, different from those of the other curves.
        description: the system in a few words, where they are known.
        points: two or more, the fewest stimuli first.
    """

    name: str
    description: str
    points: tuple[Point, ...]

    def at(self, stimuli: int) -> Point | None:
        """The point at a number of training stimuli."""
        return next((point for point in self.points if point.stimuli == stimuli), None)

    @property
    def gain(self) -> float | None:
        """R2 gained per doubling of the stimuli: the least-squares slope over log2 of the stimuli.

        None for fewer than `LEAST_SIZES` sizes.
        """
        if len(self.points) < LEAST_SIZES:
            return None
        doublings = np.log2([point.stimuli for point in self.points])
        return float(np.polyfit(doublings, [point.mean for point in self.points], 1)[0])


def curves_of(runs: Sequence[ScoredRun]) -> list[Curve]:
    """The systems that were trained on two or more numbers of stimuli, in the order of their first runs.

    Args:
        runs: scored on the same stimuli and sites.
    """
    systems = _Systems()
    runs_by_system: dict[tuple[str, str | None, tuple[str, ...]], dict[int, list[ScoredRun]]] = {}
    for scored in runs:
        stimuli = scored.metrics.training_stimuli
        if not stimuli or scored.regression.r2.mean is None:
            continue
        system = systems.digest(scored.run.path)
        if system is not None:
            key = (system, scored.metrics.control, tuple(scored.metrics.trained_on))
            runs_by_system.setdefault(key, {}).setdefault(stimuli, []).append(scored)
    curves = [
        [Point(stimuli, tuple(runs_by_size[stimuli])) for stimuli in sorted(runs_by_size)]
        for runs_by_size in runs_by_system.values()
        if len(runs_by_size) > 1
    ]
    names = _names([[scored for point in points for scored in point.runs] for points in curves])
    return [
        Curve(name, points[0].runs[0].run.description, tuple(points))
        for name, points in zip(names, curves, strict=True)
    ]


class _Systems:
    """Identifies the system of a run from its folder; reads each folder once."""

    def __init__(self) -> None:
        self._digests: dict[Path, str | None] = {}

    def digest(self, run: Path, depth: int = 0) -> str | None:
        """A digest that runs of the same system share; None where the system is not known."""
        run = run.absolute()
        if run not in self._digests:
            self._digests[run] = None  # so that an ensemble that names itself as a member ends here
            try:
                facts = self._facts(run, depth)
                text = None if facts is None else json.dumps(facts, sort_keys=True, default=str)
            except (BadInput, OSError, ValueError, TypeError, AttributeError):
                text = None
            self._digests[run] = None if text is None else hashlib.sha256(text.encode()).hexdigest()
        return self._digests[run]

    def _facts(self, run: Path, depth: int) -> Any:
        if (run / ENSEMBLE_FILE).is_file():
            return self._ensemble_facts(run, depth)
        settings = flattened(read_yaml(RunFolder(run).recipe))
        if settings.get("distill.teacher") is not None:
            return None  # the teacher's training stimuli count as well
        return {name: value for name, value in settings.items() if name not in NOT_OF_THE_SYSTEM}

    def _ensemble_facts(self, run: Path, depth: int) -> list[str] | None:
        if depth >= DEEPEST:
            return None
        ensemble = read_record(run)
        digests: list[str] = []
        for path in itertools.chain.from_iterable(ensemble.members):
            digest = self.digest(Path(path), depth + 1)
            if digest is None:
                return None
            digests.append(digest)
        return [ensemble.combine, *sorted(digests)] if digests else None


# ----------------------------------------------------------------------------------------------------------- names


def _names(systems: Sequence[Sequence[ScoredRun]]) -> list[str]:
    """A name for each system: what its folders' names begin or end with, and whatever else distinguishes it."""
    names = [_common_words([scored.run.path.absolute().name for scored in runs]) for runs in systems]
    for describe in (_descriptions, _differing_settings, _largest_runs):
        for name in sorted(set(names)):
            indices = [index for index, other in enumerate(names) if other == name]
            details = describe([systems[index] for index in indices])
            if name and len(set(details)) == 1:
                continue
            for index, detail in zip(indices, details, strict=True):
                names[index] = ", ".join(part for part in (name, detail) if part)
    return [f"{name}{_caution(runs)}" for name, runs in zip(names, systems, strict=True)]


def _caution(runs: Sequence[ScoredRun]) -> str:
    """What makes a system's scores none of prediction: it is a control, or was fitted on what it is scored on."""
    control = runs[0].metrics.control
    seen = any(scored.metrics.seen is not None and scored.metrics.seen.leaks for scored in runs)
    return (f" (CONTROL: {control})" if control else "") + (" (SEEN)" if seen else "")


def _common_words(folders: Sequence[str]) -> str:
    """The words and numbers that all names begin with, or else end with: "frozen" of frozen_100 and frozen_200."""
    words = [re.findall(r"\d+|[^\W\d_]+|[\W_]+", folder) for folder in folders]
    start = _common_start(words)
    end = _common_start([word[::-1] for word in words])[::-1]
    for common in (start, end):
        text = "".join(common).strip(" _-.=")
        if re.search(r"[^\W\d_]", text):
            return printable(text)
    return ""


def _common_start(words: Sequence[Sequence[str]]) -> list[str]:
    equal = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*words, strict=False))
    return [column[0] for column in equal]


def _descriptions(systems: Sequence[Sequence[ScoredRun]]) -> list[str]:
    return [runs[0].run.description for runs in systems]


def _differing_settings(systems: Sequence[Sequence[ScoredRun]]) -> list[str]:
    """The settings in which the systems differ."""
    settings = [
        {name: str(value) for name, value in flattened(runs[0].run.settings).items() if name not in NOT_OF_THE_SYSTEM}
        for runs in systems
    ]
    names = dict.fromkeys(name for of_system in settings for name in of_system)
    differing = [name for name in names if len({of_system.get(name) for of_system in settings}) > 1]
    return [
        ", ".join(printable(f"{name} {of_system[name]}") for name in differing[:MOST_NAMED] if name in of_system)
        for of_system in settings
    ]


def _largest_runs(systems: Sequence[Sequence[ScoredRun]]) -> list[str]:
    """The folder of the run with the most stimuli."""
    return shortest_names([runs[-1].run.path for runs in systems])


# ----------------------------------------------------------------------------------------------------------- words


def have_seeds(curves: Sequence[Curve]) -> bool:
    """Whether at least one point is the mean over several runs."""
    return any(point.spread for curve in curves for point in curve.points)


def describe_gains(curves: Sequence[Curve]) -> str:
    """The gain per doubling of each system, in a sentence; empty where no system was trained on enough sizes."""
    gains = [f"{curve.gain:+.3f} ({curve.name})" for curve in curves if curve.gain is not None]
    return f"Each doubling of the training stimuli adds to R2: {', '.join(gains)}." if gains else ""


def curve_notes(curves: Sequence[Curve]) -> list[str]:
    """How to read the table of curves, in sentences."""
    seeds = "; of several seeds the mean, and in parentheses the lowest and the highest" if have_seeds(curves) else ""
    notes = [f"R2 by the number of training stimuli, in brackets the 95 % interval over the scored stimuli{seeds}."]
    if any(curve.gain is not None for curve in curves):
        notes.append(
            "Per doubling: the slope of a straight line over log2 of the stimuli, fitted by least squares to the means "
            f"of {LEAST_SIZES} or more sizes. It describes the measured sizes; beyond them, curves usually flatten."
        )
    return notes
