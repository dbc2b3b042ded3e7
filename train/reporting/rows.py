"""What a report knows of a run: its scores, settings, history and predictions, read from its folder as plain data.

Nothing in a folder is trusted: what is not of the form that `train/` writes is refused by name, and texts are only
ever shown. Runs of earlier versions lack some facts; these are None.
"""

import json
import shlex
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import npz_arrays, parse_json, read_regular
from data_prep.common.terminal import printable
from train.evaluation.comparison import ScoredPredictions
from train.evaluation.plots import layer_label
from train.run.folder import RunFolder
from train.run.recipe import MOST_STIMULI
from train.run.yaml_files import read_yaml

LINEAR, TASK_DRIVEN, DATA_DRIVEN, HYBRID, CLASSIFIERS, OTHER = FAMILIES = (
    "Linear regression",
    "Task-driven",
    "Data-driven",
    "Hybrid",
    "Classification",
    "Other",
)
Model = TypeVar("Model", bound=BaseModel)
Text = Annotated[str, AfterValidator(printable)]


class _Plain(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class Score(_Plain):
    """A metric over the sites."""

    mean: float | None
    median: float | None = None
    ci95: tuple[float, float] | None = None
    per_site: list[float | None]
    ceiling: Text | None = None
    method: Text | None = None


class Regression(_Plain):
    """The scores of predicted responses."""

    r2: Score
    explained_variance: Score
    mse: Score
    pearson_r: Score
    ceiling: Score | None = None
    ceiled_explained_variance: Score | None = None
    ceiled_pearson_r: Score | None = None
    feve: Score | None = None
    unreliable_sites: list[Text] = []
    sites_without_r2: list[Text] = []

    def score(self, metric: str) -> Score | None:
        """By its name in metrics.json."""
        return getattr(self, metric)


class Classification(_Plain):
    """The scores of named objects."""

    top1: float
    top5: float | None = None
    balanced_accuracy: float | None = None
    per_class: dict[Text, float] = {}


class LayerBlock(_Plain):
    """A layer of a probe."""

    features: int | None = None
    regression: Regression
    inner_r2: float | None = None


class Metrics(_Plain):
    """What of a metrics.json is shown."""

    split: Text
    stimuli: int
    recording: Text
    fingerprint: Text | None = None
    simulated: bool = False
    regression: Regression | None = None
    classification: Classification | None = None
    layers: dict[Text, LayerBlock] = {}
    chosen: Text | None = None
    control: Text | None = None
    selected_on: list[Text] = []
    trained_on: list[Text] = []
    training_stimuli: Annotated[int, Field(gt=0, le=MOST_STIMULI)] | None = None
    epoch: int | None = None


class Environment(_Plain):
    """What of an env.json is shown."""

    command: list[Text] = []
    python: Text | None = None
    versions: dict[Text, Text] = {}
    git_commit: Text | None = None
    devices: list[Text] = []
    world_size: int = 1
    data: Text | None = None
    parameters: dict[Text, int] = {}

    @field_validator("data", mode="before")
    @classmethod
    def _one_text(cls, value: Any) -> Any:
        return " ".join(map(str, value)) if isinstance(value, list) else value  # of several recordings


@dataclass(frozen=True)
class Row:
    """A run, as a line of the table; one on several recordings has a line for each.

    Attributes:
        path: of its folder.
        name: that of the folder, with more where that is shared.
        split: whose scores are shown.
        metrics: of that split; None where it has not been scored.
        environment: versions, hardware, command.
        recipe: its settings as they stand in recipe.yaml.
        history: a mapping per epoch.
        found_by: the sweep whose best trial this is.
        recording: whose scores these are, of a run on several.
    """

    path: Path
    name: str
    split: str
    metrics: Metrics | None
    environment: Environment
    recipe: dict[str, Any] = field(repr=False)
    history: list[dict[str, Any]] = field(repr=False)
    found_by: str | None = None
    recording: str | None = None

    @property
    def title(self) -> str:
        """The name, with the layer that a probe chose, and whether it is a control."""
        if self.metrics is None:
            return self.name
        layer = f" ({layer_label(self.metrics.chosen)})" if len(self.metrics.layers) > 1 else ""
        return self.name + layer + (f" (CONTROL: {self.metrics.control})" if self.metrics.control else "")

    @property
    def regression(self) -> Regression | None:
        """The scores of the responses; None for a classifier, and before it has been scored."""
        return None if self.metrics is None else self.metrics.regression

    @property
    def classification(self) -> Classification | None:
        """The scores of the objects, where it names some."""
        return None if self.metrics is None else self.metrics.classification

    @property
    def is_probe(self) -> bool:
        """Whether its network is frozen and a regression was fitted to what it computes."""
        return "layers" in self.recipe

    @property
    def family(self) -> str:
        """Which of the study's families it belongs to."""
        if self.is_probe:
            return LINEAR if self.recipe["layers"] == ["pixels"] else TASK_DRIVEN
        by_kind = {"regression": DATA_DRIVEN, "hybrid": HYBRID, "classification": CLASSIFIERS}
        return by_kind.get(str(self._setting("task.kind")), OTHER)

    @property
    def what(self) -> str:
        """The system in a few words, e.g. "resnet50, random weights, linear readout"."""
        if self.family == LINEAR:
            return f"{self._setting('readout')} on pixels"
        weights = str(self._setting("backbone.weights"))
        parts = [str(self._setting("backbone.name"))]
        parts += [] if self._setting("backbone.cut") is None else [f"cut after {self._setting('backbone.cut')}"]
        parts += [] if weights == "pretrained" else [f"{'random' if weights == 'random' else 'other'} weights"]
        if self.is_probe:
            return ", ".join([*parts, f"frozen, {self._setting('readout')}"])
        parts += ["head only"] if self._setting("backbone.trainable") == "head" else []
        kind = self._setting("readout.kind")
        parts += [f"{kind} readout"] if self.family in (DATA_DRIVEN, HYBRID) and kind is not None else []
        loss = self._setting("loss.responses")
        parts += [f"{loss} loss"] if loss not in (None, "mse") and self.family != CLASSIFIERS else []
        recordings = self.metrics.trained_on if self.metrics else []
        parts += [f"trained on {' + '.join(recordings)}"] if recordings else []
        return "" if self.family == OTHER else ", ".join(parts)

    def _setting(self, name: str) -> Any:
        found: Any = self.recipe
        for part in name.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        return printable(found) if isinstance(found, str) else found

    @property
    def parameters(self) -> tuple[int, int] | None:
        """Of the whole model, and those of them that were fitted to the recording; None where the run does not tell."""
        known = self.environment.parameters
        if "all" not in known:
            return None
        if not self.is_probe:
            return known["all"], known.get("trained", known["all"])
        layer = self.metrics.layers.get(self.metrics.chosen or "") if self.metrics else None
        if layer is None or layer.features is None or self.regression is None:
            return None
        fitted = (layer.features + 1) * self.sites
        return known["all"] + fitted, fitted

    @property
    def sites(self) -> int:
        """How many were scored."""
        return len(self.regression.r2.per_site) if self.regression else 0

    @property
    def seconds(self) -> float | None:
        """Of training, its selection included; None where the run does not tell."""
        spans = [line.get(name) for line in self.history for name in ("train_seconds", "score_seconds", "seconds")]
        spans = [span for span in spans if isinstance(span, int | float)]
        return float(sum(spans)) if spans else None

    @property
    def hardware(self) -> str:
        """On what it was trained."""
        devices, ranks = self.environment.devices, self.environment.world_size
        if not devices:
            return "-"
        if devices[0].startswith("CPU"):
            return devices[0] + (f", {ranks} processes" if ranks > 1 else "")
        return f"{ranks} × {devices[0]}"

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """The lines of its history that are epochs."""
        return [line for line in self.history if isinstance(line.get("epoch"), int)]

    @property
    def state(self) -> str:
        """Of a run that has not been scored on the split: how far it is, and what to do about it."""
        if self.is_probe:
            return f"the probe is not done, or was not scored on {self.split}"
        done, of = max((line["epoch"] for line in self.epochs), default=0), self._setting("epochs")
        progress = f"{done} of {of} epochs done" if done else "no epoch done yet"
        value = next((line.get("inner", line.get("val")) for line in reversed(self.epochs) if line.get("best")), None)
        shown = {"r2": "R2", "top1": "top-1"}
        scores = [f"{label} {value[key]:.3f}" for key, label in shown.items() if _is_number(value, key)]
        best = f", best {scores[0]} on the split that selects" if scores else ""
        silent = self._silent_seconds()
        alive = "" if silent is None else f", last sign of life {_span(silent)} ago"
        return f"{progress}{best}{alive}; to score it: train/evaluate.py {self.path} --split {self.split}"

    def _silent_seconds(self) -> float | None:
        folder = RunFolder(self.path)
        times = [path.stat().st_mtime for path in (folder.history, folder.log, folder.recipe) if path.is_file()]
        return max(time.time() - max(times), 0) if times else None

    @property
    def commands(self) -> list[str]:
        """What was typed, as far as the run tells, and what scored it."""
        if not self.environment.command:
            return []
        launcher = f"launch/local.sh -n {self.environment.world_size}"
        typed = shlex.join([f"train/{self.environment.command[0]}", *self.environment.command[1:]])
        lines = [f"{launcher} {typed}"]
        if not self.is_probe:
            lines.append(shlex.join(["launch/local.sh", "train/evaluate.py", str(self.path), "--split", self.split]))
        return lines

    def _predicted(self) -> dict[str, np.ndarray] | None:
        folder = RunFolder(self.path).evaluation(self.split, recording=self.recording)
        return _arrays(folder / "predictions.npz")

    @cached_property
    def predictions(self) -> ScoredPredictions | None:
        """What it predicted for the responses, stimuli in alphabetical order; None where that cannot be read."""
        if self.regression is None:
            return None
        arrays = self._predicted()
        if arrays is None or not {"stimulus_id", "prediction", "target"} <= arrays.keys():
            return None
        prediction, target, order = arrays["prediction"], arrays["target"], np.argsort(arrays["stimulus_id"])
        if prediction.shape != target.shape or prediction.shape != (len(order), self.sites):
            return None
        ceiling = self.regression.ceiling
        known = None if ceiling is None else np.array([np.nan if v is None else v for v in ceiling.per_site])
        if known is not None and known.shape != (self.sites,):
            return None
        return ScoredPredictions(prediction[order], target[order], known)

    @cached_property
    def classes(self) -> dict[str, np.ndarray] | None:
        """`class_id`, and of each stimulus `class` and `predicted_class`, of a network that names objects."""
        arrays = self._predicted() or {}
        wanted = ("stimulus_id", "class_id", "class", "predicted_class")
        if not set(wanted) <= arrays.keys():
            return None
        order, known = np.argsort(arrays["stimulus_id"]), len(arrays["class_id"])
        found = {name: arrays[name][order] for name in ("class", "predicted_class")}
        for values in found.values():
            if values.dtype.kind != "i" or not len(values) or values.min() < 0 or values.max() >= known:
                return None
        return found | {"class_id": arrays["class_id"]}


def _is_number(value: Any, key: str) -> bool:
    return isinstance(value, dict) and isinstance(value.get(key), int | float)


def _span(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _arrays(path: Path) -> dict[str, np.ndarray] | None:
    """Arrays of plain numbers and texts; None where there are none, or the file is not whole."""
    try:
        found = npz_arrays(path)
    except (OSError, ValueError):
        return None
    good = all(array.dtype.kind in "fiuU" for array in found.values())
    return found if good and len({len(found[n]) for n in found if n not in ("site_id", "class_id")}) <= 1 else None


# --------------------------------------------------------------------------------------------------------- reading


def read_rows(run: Path, split: str, name: str, found_by: str | None = None) -> list[Row]:
    """A run, scored or not: a line, or one for each recording that was scored of a run on several.

    Raises:
        BadInput: it is no run folder, or a file in it is damaged.
    """
    folder = RunFolder(run).evaluation(split)
    scored = [] if (folder / "metrics.json").is_file() else sorted(folder.glob("*/metrics.json"))
    recordings = [path.parent.name for path in scored]
    if not recordings:
        return [_read_row(run, split, name, found_by)]
    return [_read_row(run, split, f"{name}: {printable(each)}", found_by, each) for each in recordings]


def _read_row(run: Path, split: str, name: str, found_by: str | None, recording: str | None = None) -> Row:
    folder = RunFolder(run)
    metrics_file = folder.evaluation(split, recording=recording) / "metrics.json"
    if not run.is_dir() or not (folder.recipe.is_file() or metrics_file.is_file()):
        raise BadInput(f"{run} is no run; give folders made by train/finetune.py, train/probe.py or train/sweep.py")
    metrics = _read(metrics_file, Metrics) if metrics_file.is_file() else None
    if metrics is not None and metrics.regression is None and metrics.classification is None:
        raise BadInput(f"{metrics_file} has no scores (`regression` or `classification`); evaluate the run again")
    if metrics is not None and metrics.layers and metrics.chosen not in metrics.layers:
        raise BadInput(f"{metrics_file}: `chosen` ({metrics.chosen!r}) is none of its layers; probe again")
    environment = _read(folder.env, Environment) if folder.env.is_file() else Environment()
    history = [_of_recording(line, recording) for line in read_history(folder.history)]
    return Row(run, name, split, metrics, environment, _recipe(folder.recipe), history, found_by, recording)


def _of_recording(line: dict[str, Any], recording: str | None) -> dict[str, Any]:
    """A line of history with the scores of one of several recordings in place of their means."""
    each = line.get("recordings")
    own = each.get(recording) if isinstance(each, dict) else None
    return line | {split: own for split in ("inner", "val") if split in line} if isinstance(own, dict) else line


def _read(path: Path, model: type[Model]) -> Model:
    try:
        return model.model_validate(parse_json(read_regular(path)))
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "content"
        raise BadInput(f"{path}: {where}: {fault['msg']}; it was not written by train/, or is damaged") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} is damaged ({error}); make it again") from None


def _recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = read_yaml(path)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} is not readable as YAML: {error}") from None
    return content if isinstance(content, dict) else {}


def read_history(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a history.jsonl; the last one may be being written."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            continue
        found += [content] if isinstance(content, dict) else []
    return found


def shortest_names(runs: list[Path]) -> list[str]:
    """The folders' names, each with as many of the folders above as it takes to tell them apart."""
    parts = [run.absolute().parts for run in runs]
    depth = 1
    while depth < max(map(len, parts)) and len({part[-depth:] for part in parts}) < len(set(parts)):
        depth += 1
    return [printable("/".join(part[-depth:])) for part in parts]
