"""How much more training stimuli are worth: the scores of one system by how many it had.

A system is what a lab would choose: all settings of a run but those that say which stimuli it had (`subset`, `data`),
by what chance (`seed`, and the fold that selected its epoch) and how it was computed. An ensemble is its members'
systems and how they are joined. Runs are put on one curve only where all of that is known and the same.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common.safe_reading import parse_json, read_regular
from data_prep.common.terminal import printable
from train.evaluation.ensemble_evaluation import ENSEMBLE_FILE
from train.reporting.rows import Row, shortest_names
from train.run.folder import FREE, RunFolder, flat
from train.run.yaml_files import read_yaml

APART = FREE | {"subset", "seed", "early_stopping.fold"}  # what may differ between the runs of a system
LEAST_SIZES = 3  # for a straight line that its points do not fit by themselves
DEEPEST = 20  # ensembles of ensembles
MOST_NAMED = 3  # settings


@dataclass(frozen=True)
class Point:
    """The runs of a system that had equally many training stimuli; they differ in seed or fold.

    Attributes:
        stimuli: how many.
        rows: the runs.
    """

    stimuli: int
    rows: tuple[Row, ...]

    @cached_property
    def scores(self) -> list[float]:
        """R2 of each run, mean over sites."""
        return [row.regression.r2.mean for row in self.rows]

    @property
    def mean(self) -> float:
        """R2, mean over the runs."""
        return float(np.mean(self.scores))

    @property
    def ci95(self) -> tuple[float, float] | None:
        """Of a single run, its interval over the stimuli that were scored."""
        return self.rows[0].regression.r2.ci95 if len(self.rows) == 1 else None

    @property
    def spread(self) -> tuple[float, float] | None:
        """Of several runs, the least and the greatest R2."""
        return (min(self.scores), max(self.scores)) if len(self.rows) > 1 else None


@dataclass(frozen=True)
class Curve:
    """A system's scores by its training stimuli.

    Attributes:
        name: of the system, unlike those of the others it is shown with.
        what: the system in a few words, where they are known.
        points: two or more, the fewest stimuli first.
    """

    name: str
    what: str
    points: tuple[Point, ...]

    def at(self, stimuli: int) -> Point | None:
        """The point at a number of training stimuli."""
        return next((point for point in self.points if point.stimuli == stimuli), None)

    @property
    def gain(self) -> float | None:
        """What a doubling of the stimuli adds to R2: the slope over log2 of the stimuli of the line of least squares.

        None of fewer than three sizes, which any line fits or nearly so.
        """
        if len(self.points) < LEAST_SIZES:
            return None
        doublings = np.log2([point.stimuli for point in self.points])
        return float(np.polyfit(doublings, [point.mean for point in self.points], 1)[0])


def curves_of(rows: Sequence[Row]) -> list[Curve]:
    """The systems that were trained on two or more numbers of stimuli, in the order of their first runs.

    Args:
        rows: scored on the same held-out stimuli and sites.
    """
    systems, together = _Systems(), {}
    for row in rows:
        system = systems.of(row.path) if row.metrics.training_stimuli and row.regression.r2.mean is not None else None
        if system is not None:
            key = (system, row.metrics.control, tuple(row.metrics.trained_on))
            together.setdefault(key, {}).setdefault(row.metrics.training_stimuli, []).append(row)
    found = [[Point(n, tuple(sizes[n])) for n in sorted(sizes)] for sizes in together.values() if len(sizes) > 1]
    names = _names([[row for point in points for row in point.rows] for points in found])
    return [Curve(name, points[0].rows[0].what, tuple(points)) for name, points in zip(names, found, strict=True)]


class _Systems:
    """Tells runs of the same system by their folders; each is read once."""

    def __init__(self):
        self._known: dict[Path, str | None] = {}

    def of(self, run: Path, depth: int = 0) -> str | None:
        """What a run's folder and those of no other system have in common; None where that cannot be known."""
        run = run.absolute()
        if run not in self._known:
            self._known[run] = None  # which an ensemble that names itself as a member is told
            try:
                facts = self._facts(run, depth)
                text = None if facts is None else json.dumps(facts, sort_keys=True, default=str)
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                text = None
            self._known[run] = None if text is None else hashlib.sha256(text.encode()).hexdigest()
        return self._known[run]

    def _facts(self, run: Path, depth: int) -> Any:
        if not (run / ENSEMBLE_FILE).is_file():
            settings = flat(read_yaml(RunFolder(run).recipe))
            if settings.get("distill.teacher") is not None:
                return None  # the teacher's training stimuli count as well
            return {name: value for name, value in settings.items() if name not in APART}
        note = parse_json(read_regular(run / ENSEMBLE_FILE))
        members = [Path(member) for one in note["members"] for member in one["runs"]]
        systems = [self.of(member, depth + 1) for member in members] if depth < DEEPEST else []
        return [note["combine"], *sorted(systems)] if systems and None not in systems else None


# ----------------------------------------------------------------------------------------------------------- names


def _names(systems: Sequence[Sequence[Row]]) -> list[str]:
    """A name for each system: what its folders' names begin or end with, and as much more as tells it from others."""
    names = [_common([row.path.absolute().name for row in rows]) for rows in systems]
    for more in (_what, _settings, _longest):
        for name in sorted(set(names)):
            places = [place for place, other in enumerate(names) if other == name]
            details = more([systems[place] for place in places])
            if name and len(set(details)) == 1:
                continue
            for place, detail in zip(places, details, strict=True):
                names[place] = ", ".join(part for part in (name, detail) if part)
    controls = [rows[0].metrics.control for rows in systems]
    return [f"{name} (CONTROL: {control})" if control else name for name, control in zip(names, controls, strict=True)]


def _common(folders: Sequence[str]) -> str:
    """The words and numbers that all names begin with, or else end with: "frozen" of frozen_100 and frozen_200."""
    words = [re.findall(r"\d+|[^\W\d_]+|[\W_]+", folder) for folder in folders]
    first, last = _same(words), _same([word[::-1] for word in words])[::-1]
    found = ("".join(part).strip(" _-.=") for part in (first, last))
    return printable(next((part for part in found if re.search(r"[^\W\d_]", part)), ""))


def _same(words: Sequence[Sequence[str]]) -> list[str]:
    """What all begin with."""
    alike = itertools.takewhile(lambda of_all: len(set(of_all)) == 1, zip(*words, strict=False))
    return [of_all[0] for of_all in alike]


def _what(systems: Sequence[Sequence[Row]]) -> list[str]:
    return [rows[0].what for rows in systems]


def _settings(systems: Sequence[Sequence[Row]]) -> list[str]:
    """The settings in which the systems differ."""
    every = [{k: str(v) for k, v in flat(rows[0].recipe).items() if k not in APART} for rows in systems]
    names = [name for name in dict.fromkeys(k for one in every for k in one) if len({o.get(name) for o in every}) > 1]
    return [", ".join(printable(f"{k} {one[k]}") for k in names[:MOST_NAMED] if k in one) for one in every]


def _longest(systems: Sequence[Sequence[Row]]) -> list[str]:
    """The folder of the run with the most stimuli."""
    return shortest_names([rows[-1].path for rows in systems])


# ----------------------------------------------------------------------------------------------------------- words


def have_seeds(curves: Sequence[Curve]) -> bool:
    """Whether a point is the mean over several runs."""
    return any(point.spread for curve in curves for point in curve.points)


def gains(curves: Sequence[Curve]) -> str:
    """What a doubling is worth to each system, in a sentence; empty where no system was trained on enough sizes."""
    told = [f"{curve.gain:+.3f} ({curve.name})" for curve in curves if curve.gain is not None]
    return f"Each doubling of the training stimuli adds to R2: {', '.join(told)}." if told else ""


def notes(curves: Sequence[Curve]) -> Iterator[str]:
    """How the table of curves is to be read, in sentences."""
    runs = "; of several seeds the mean, and in parentheses the least and the greatest" if have_seeds(curves) else ""
    yield f"R2 by the number of training stimuli, in brackets the 95 % interval over the stimuli scored{runs}."
    if any(curve.gain is not None for curve in curves):
        yield (
            "Per doubling: the slope of a straight line over log2 of the stimuli, by least squares through the means "
            f"of {LEAST_SIZES} sizes or more. It describes the sizes measured; beyond them curves usually flatten."
        )
