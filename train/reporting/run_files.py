"""The files of a run folder that a report reads, checked against what `train/` writes.

Run folders are untrusted input: a file of another form is refused by name, and its texts are only ever displayed.
"""

import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import parse_json, read_regular_file
from data_prep.common.terminal import printable
from train.evaluation.seen_stimuli import Seen
from train.run.recipe import MOST_STIMULI
from train.run.yaml_files import read_yaml

Model = TypeVar("Model", bound=BaseModel)
Text = Annotated[str, AfterValidator(printable)]


class _FileContent(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class Score(_FileContent):
    """A metric over the sites."""

    mean: float | None
    median: float | None = None
    ci95: tuple[float, float] | None = None
    per_site: list[float | None]
    ceiling: Text | None = None
    method: Text | None = None


class Regression(_FileContent):
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
        """A metric by its name in metrics.json; None where it has no mean."""
        score: Score | None = getattr(self, metric)
        return None if score is None or score.mean is None else score

    @property
    def sites(self) -> int:
        """The number of sites that were scored."""
        return len(self.r2.per_site)


class Classification(_FileContent):
    """The scores of predicted classes."""

    top1: float
    top5: float | None = None
    balanced_accuracy: float | None = None
    per_class: dict[Text, float] = {}


class LayerScores(_FileContent):
    """One layer of a probe."""

    features: int | None = None
    regression: Regression
    inner_r2: float | None = None


class Metrics(_FileContent):
    """The part of metrics.json that a report shows."""

    split: Text
    stimuli: int
    recording: Text
    fingerprint: Text | None = None
    simulated: bool = False
    regression: Regression | None = None
    classification: Classification | None = None
    layers: dict[Text, LayerScores] = {}
    chosen: Text | None = None
    control: Text | None = None
    selected_on: list[Text] = []
    seen: Seen | None = None
    trained_on: list[Text] = []
    training_stimuli: Annotated[int, Field(gt=0, le=MOST_STIMULI)] | None = None
    epoch: int | None = None


class Environment(_FileContent):
    """The part of env.json that a report shows."""

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
    def _join_recordings(cls, value: Any) -> Any:
        return " ".join(map(str, value)) if isinstance(value, list) else value


def read_metrics(path: Path) -> Metrics:
    """Read a metrics.json.

    Raises:
        BadInput: it is damaged, has no scores, or names a chosen layer that it does not have.
    """
    metrics = _read(path, Metrics)
    if metrics.regression is None and metrics.classification is None:
        raise BadInput(f"{path} has no scores (`regression` or `classification`); evaluate the run again")
    if metrics.layers and metrics.chosen not in metrics.layers:
        raise BadInput(f"{path}: `chosen` ({metrics.chosen!r}) is not one of its layers; probe again")
    return metrics


def read_environment(path: Path) -> Environment:
    """Read an env.json; an empty one where there is no file.

    Raises:
        BadInput: it is damaged.
    """
    return _read(path, Environment) if path.is_file() else Environment()


def _read(path: Path, model: type[Model]) -> Model:
    try:
        return model.model_validate(parse_json(read_regular_file(path)))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "content"
        raise BadInput(f"{path}: {field}: {first['msg']}; it is damaged or was not written by train/") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} is damaged ({error}); run the command that wrote it again") from None


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a recipe.yaml as they stand; empty where there is no file.

    Raises:
        BadInput: it is not YAML.
    """
    if not path.is_file():
        return {}
    try:
        content = read_yaml(path)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} is not readable as YAML: {error}") from None
    return content if isinstance(content, dict) else {}


def read_history(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a history.jsonl; a run that is training may be writing the last one."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    history = []
    for line in lines:
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(content, dict):
            history.append(content)
    return history
