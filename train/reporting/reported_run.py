"""A run as a report presents it: title, family, description, size, cost, progress and predictions.

Facts that a run folder does not hold are None.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common.errors import BadInput
from data_prep.common.terminal import printable
from data_prep.shards.manifest import from_json_list
from train.evaluation.comparison import ScoredPredictions
from train.evaluation.ensemble_record import EnsembleRecord
from train.evaluation.figures.layer_figure import layer_label
from train.evaluation.predictions_file import (
    PREDICTIONS_FILE,
    ClassPredictions,
    ForeignPredictions,
    read_class_predictions,
    read_predictions,
)
from train.models.saved_probe import SAVED_PROBE
from train.reporting.reproduction import commands_of
from train.reporting.run_files import (
    Classification,
    Environment,
    Metrics,
    Regression,
)
from train.run.folder import RunFolder

LINEAR, TASK_DRIVEN, DATA_DRIVEN, HYBRID, CLASSIFICATION, ENSEMBLE, OTHER = FAMILIES = (
    "Linear regression",
    "Task-driven",
    "Data-driven",
    "Hybrid",
    "Classification",
    "Ensemble",
    "Other",
)
FAMILY_OF_TASK = {"regression": DATA_DRIVEN, "hybrid": HYBRID, "classification": CLASSIFICATION}
TIME_UNITS = (("days", 86400), ("h", 3600), ("min", 60))


@dataclass(frozen=True)
class Size:
    """Numbers of parameters: of the whole model, and of the part that was fitted to the recording."""

    all: int
    fitted: int


@dataclass(frozen=True)
class ReportedRun:
    """A run, or one recording of a run on several.

    Attributes:
        path: its folder.
        name: the folder's name, preceded by parent folders where several runs share it.
        split: whose scores are shown.
        metrics: of that split; None where it has not been scored.
        environment: versions, hardware, command.
        settings: the content of recipe.yaml.
        history: one mapping per epoch.
        found_by: the sweep whose best trial this is.
        recording: whose scores these are, for a run on several.
        ensemble: its members and how they are combined; None for a run or a probe.
    """

    path: Path
    name: str
    split: str
    metrics: Metrics | None
    environment: Environment
    settings: dict[str, Any] = field(repr=False)
    history: list[dict[str, Any]] = field(repr=False)
    found_by: str | None = None
    recording: str | None = None
    ensemble: EnsembleRecord | None = None

    @property
    def title(self) -> str:
        """The name, with the layer that a probe chose, and with what makes its score none of prediction."""
        if self.metrics is None:
            return self.name
        layer = f" ({layer_label(self.metrics.chosen)})" if self.metrics.chosen and len(self.metrics.layers) > 1 else ""
        control = f" (CONTROL: {self.metrics.control})" if self.metrics.control else ""
        seen = self.metrics.seen
        kept = f" (SEEN: {seen.leaks:,} of {self.metrics.stimuli:,})" if seen and seen.leaks else ""
        scale = " (OTHER SCALE)" if self.metrics.other_scale else ""
        outdated = "" if self.newer_epoch is None else f" (OF EPOCH {self.metrics.epoch}, NOW {self.newer_epoch})"
        return f"{self.name}{layer}{control}{kept}{scale}{outdated}"

    @property
    def newer_epoch(self) -> int | None:
        """The epoch whose checkpoint has since replaced the one that was scored; None if the score is up to date."""
        if self.metrics is None or self.metrics.epoch is None or self.metrics.checkpoint not in ("best", "last"):
            return None
        is_best = self.metrics.checkpoint == "best"
        now = max((line["epoch"] for line in self.epochs if line.get("best") or not is_best), default=0)
        return now if now > self.metrics.epoch else None

    @property
    def is_probe(self) -> bool:
        """Whether a regression was fitted to a frozen network's activations."""
        return "layers" in self.settings

    @property
    def family(self) -> str:
        """Which of the study's families it belongs to."""
        if self.ensemble is not None:
            return ENSEMBLE
        if self.is_probe:
            return LINEAR if self.settings["layers"] == ["pixels"] else TASK_DRIVEN
        return FAMILY_OF_TASK.get(str(self.setting("task.kind")), OTHER)

    @property
    def description(self) -> str:
        """The system in a few words, e.g. "resnet50, random weights, linear readout"; empty where it is not known."""
        if self.ensemble is not None:
            members = ["+".join(shortest_names([Path(run) for run in runs])) for runs in self.ensemble.members]
            return printable(f"{'stack' if self.ensemble.combine == 'stack' else 'mean'} of {', '.join(members)}")
        if self.family == LINEAR:
            return f"{self.setting('readout')} on pixels"
        if self.is_probe:
            return ", ".join([*self._describe_backbone(), f"frozen, {self.setting('readout')}"])
        if self.family == OTHER:
            return ""
        return ", ".join([*self._describe_backbone(), *self._describe_training()])

    def _describe_backbone(self) -> list[str]:
        words = [str(self.setting("backbone.name"))]
        cut, weights = self.setting("backbone.cut"), self.setting("backbone.weights")
        if cut is not None:
            words.append(f"cut after {cut}")
        if weights != "pretrained":
            words.append("random weights" if weights == "random" else "other weights")
        return words

    def _describe_training(self) -> list[str]:
        readout, loss = self.setting("readout.kind"), self.setting("loss.responses")
        words = []
        if self.setting("backbone.trainable") == "head":
            words.append("head only")
        if self.family != CLASSIFICATION and readout is not None:
            words.append(f"{readout} readout")
        if self.family != CLASSIFICATION and loss not in (None, "mse"):
            words.append(f"{loss} loss")
        if self.metrics and self.metrics.trained_on:
            words.append(f"trained on {' + '.join(self.metrics.trained_on)}")
        return words

    def setting(self, name: str) -> Any:
        """A setting of its recipe by dotted name; None where there is none."""
        value: Any = self.settings
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return printable(value) if isinstance(value, str) else value

    @property
    def size(self) -> Size | None:
        """Its numbers of parameters; None where they are not known."""
        counts = self.environment.parameters
        if "all" not in counts:
            return None
        if not self.is_probe:
            return Size(counts["all"], counts.get("trained", counts["all"]))
        if self.metrics is None or self.metrics.regression is None:
            return None
        layer = self.metrics.layers.get(self.metrics.chosen or "")
        if layer is None or layer.features is None:
            return None
        fitted = (layer.features + 1) * self.metrics.regression.sites
        return Size(counts["all"] + fitted, fitted)

    @property
    def seconds(self) -> float | None:
        """Training time including selection; None where it is not known."""
        names = ("train_seconds", "score_seconds", "seconds")
        durations = [line.get(name) for line in self.history for name in names]
        seconds = [float(duration) for duration in durations if isinstance(duration, int | float)]
        return sum(seconds) if seconds else None

    @property
    def hardware(self) -> str:
        """What it was trained on."""
        devices, ranks = self.environment.devices, self.environment.world_size
        if not devices:
            return "-"
        if not devices[0].startswith("CPU"):
            return f"{ranks} × {devices[0]}"
        return f"{devices[0]}, {ranks} processes" if ranks > 1 else devices[0]

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """The lines of its history that are epochs."""
        return [line for line in self.history if isinstance(line.get("epoch"), int)]

    @property
    def progress(self) -> str:
        """How far a run that has not been scored is, and how to score it."""
        if self.ensemble is not None:
            return f"the ensemble was not scored on {self.split}; to score it: {self.command}"
        command = f"train/evaluate.py {self.path} --split {self.split}"
        if self.is_probe and (self.path / SAVED_PROBE).is_file():
            return f"the probe is done; to score it: {command}"
        if self.is_probe:
            return f"the probe is not done, or was not scored on {self.split}"
        done = max((line["epoch"] for line in self.epochs), default=0)
        epochs = f"{done} of {self.setting('epochs')} epochs done" if done else "no epoch done yet"
        return f"{epochs}{self._best_so_far()}{self._last_written()}; to score it: {command}"

    def _best_so_far(self) -> str:
        best: dict[str, Any] = next((line for line in reversed(self.epochs) if line.get("best")), {})
        scores = best.get("inner", best.get("val"))
        if isinstance(scores, dict):
            for metric, label in (("r2", "R2"), ("top1", "top-1")):
                if isinstance(scores.get(metric), int | float):
                    return f", best {label} {scores[metric]:.3f} on the selection split"
        return ""

    def _last_written(self) -> str:
        folder = RunFolder(self.path)
        times = [path.stat().st_mtime for path in (folder.history, folder.log, folder.recipe) if path.is_file()]
        if not times:
            return ""
        seconds = max(time.time() - max(times), 0)
        for unit, length in TIME_UNITS:
            if seconds >= 2 * length:
                return f", last written {seconds / length:.0f} {unit} ago"
        return f", last written {seconds:.0f} s ago"

    @cached_property
    def commands(self) -> list[str]:
        """The commands that made and scored it, of an ensemble's members too; empty where they are not known."""
        return commands_of(self.path, self.split)

    @property
    def command(self) -> str | None:
        """The command that made it, of an ensemble the one that combined its members; None where it is not known."""
        if not self.commands:
            return None
        return self.commands[0 if self.ensemble is None else -1]

    @property
    def _predictions_file(self) -> Path:
        return RunFolder(self.path).evaluation(self.split, recording=self.recording) / PREDICTIONS_FILE

    @cached_property
    def predictions(self) -> ScoredPredictions | None:
        """Its predicted responses, stimuli in alphabetical order; None where they cannot be read.

        Raises:
            BadInput: they are not those that metrics.json scores.
        """
        regression = self.metrics.regression if self.metrics else None
        if regression is None:
            return None
        try:
            predictions = read_predictions(self._predictions_file)
        except ForeignPredictions:
            raise
        except BadInput:
            return None
        rates, responses = predictions.rates, predictions.responses
        if responses is None or rates.shape[1] != regression.sites:
            return None
        reliability = None
        if regression.ceiling is not None:
            reliability = from_json_list(regression.ceiling.per_site)
            if len(reliability) != regression.sites:
                return None
        order = np.argsort(predictions.stimulus_ids)
        scored = np.isfinite(from_json_list(regression.mse.per_site))  # the others could not be fitted
        if len(scored) != regression.sites:
            return None
        return ScoredPredictions(
            rates[order],
            np.where(scored, responses[order], np.nan),
            reliability,
            [predictions.stimulus_ids[row] for row in order],
            predictions.site_ids,
        )

    @cached_property
    def class_predictions(self) -> ClassPredictions | None:
        """The classes that it predicted; None where it predicts none, or they cannot be read.

        Raises:
            BadInput: they are not those that metrics.json scores.
        """
        try:
            return read_class_predictions(self._predictions_file)
        except ForeignPredictions:
            raise
        except BadInput:
            return None


@dataclass(frozen=True)
class ScoredRun:
    """A run whose predicted responses have been scored."""

    run: ReportedRun
    metrics: Metrics
    regression: Regression


@dataclass(frozen=True)
class ScoredClassifier:
    """A run whose predicted classes have been scored."""

    run: ReportedRun
    metrics: Metrics
    classification: Classification


def scored_runs(runs: Sequence[ReportedRun]) -> list[ScoredRun]:
    """Those with scored responses."""
    return [
        ScoredRun(run, run.metrics, run.metrics.regression) for run in runs if run.metrics and run.metrics.regression
    ]


def scored_classifiers(runs: Sequence[ReportedRun]) -> list[ScoredClassifier]:
    """Those with scored classes."""
    return [
        ScoredClassifier(run, run.metrics, run.metrics.classification)
        for run in runs
        if run.metrics and run.metrics.classification
    ]


def shortest_names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, each with as many parent folders as it takes to make all of them differ."""
    paths = [folder.absolute().parts for folder in folders]
    depth = 1
    while depth < max(map(len, paths)) and len({path[-depth:] for path in paths}) < len(set(paths)):
        depth += 1
    return [printable("/".join(path[-depth:])) for path in paths]
