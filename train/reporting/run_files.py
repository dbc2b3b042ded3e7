"""The files of a run folder that a report reads, checked against what `train/` writes.

Run folders are untrusted input: a file of another form is refused by name, and its texts are only ever displayed.
"""

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import parse_json, parse_json_lines, read_regular_file
from data_prep.common.terminal import printable
from data_prep.common.validation_messages import first_fault
from train.evaluation.seen_stimuli import Seen
from train.run.recipe import MOST_STIMULI
from train.run.yaml_files import read_yaml

Model = TypeVar("Model", bound=BaseModel)
Text = Annotated[str, AfterValidator(printable)]
LARGEST_SCORE = 1e100  # the R2 of a diverged network is far smaller; the square of this is still finite
Number = Annotated[float, Field(ge=-LARGEST_SCORE, le=LARGEST_SCORE)]
Count = Annotated[int, Field(ge=0, le=10**15)]


class _FileContent(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class Score(_FileContent):
    """A metric over the sites."""

    mean: Number | None
    median: Number | None = None
    ci95: tuple[Number, Number] | None = None
    median_ci95: tuple[Number, Number] | None = None
    per_site: list[Number | None]
    ceiling: Text | None = None
    method: Text | None = None


class BrainScoreForm(_FileContent):
    """Brain-Score's score in one of its forms."""

    score: Number | None
    ci95: tuple[Number, Number] | None = None


class BrainScore(BrainScoreForm):
    """Brain-Score's score in its current form, and as it was before January 2026."""

    before_2026_01: BrainScoreForm | None = None


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
    squared_pearson_r: Score | None = None
    r2_er: Score | None = None
    brain_score: BrainScore | None = None
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

    top1: Number
    top5: Number | None = None
    balanced_accuracy: Number | None = None
    per_class: dict[Text, Number] = {}


class Ranks(_FileContent):
    """A layer's ranks among all by R2: how probable each is, and the best and the worst that is possible."""

    probability: Annotated[list[Number], Field(min_length=1)]
    best: Count
    worst: Count


class LayerStanding(_FileContent):
    """A layer among all of a probe; its interval holds together with those of the others."""

    adjusted: tuple[Number, Number]
    ranks: Ranks


class LayerScores(_FileContent):
    """One layer of a probe."""

    features: Count | None = None
    regression: Regression
    inner_r2: Number | None = None
    standing: LayerStanding | None = None


class Metrics(_FileContent):
    """The part of metrics.json that a report shows."""

    split: Text
    stimuli: Annotated[int, Field(gt=0, le=MOST_STIMULI)]
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
    other_scale: bool = False
    training_stimuli: Annotated[int, Field(gt=0, le=MOST_STIMULI)] | None = None
    epoch: Count | None = None
    checkpoint: Text | None = None


class Environment(_FileContent):
    """The part of env.json that a report shows."""

    command: list[Text] = []
    python: Text | None = None
    versions: dict[Text, Text] = {}
    git_commit: Text | None = None
    devices: list[Text] = []
    world_size: Annotated[int, Field(gt=0, le=10**6)] = 1
    data: Text | None = None
    parameters: dict[Text, Count] = {}

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
        fault = first_fault(error, "content")
        raise BadInput(f"{path}: {fault}; it is damaged or was not written by train/") from None
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
    """The complete lines of a history.jsonl; a run that is training may be writing the last one.

    Raises:
        BadInput: it is damaged, or not a plain file.
    """
    if not path.exists():
        return []
    try:
        lines = [content for _, content in parse_json_lines(read_regular_file(path))]
        for content in lines:
            _check_numbers(content)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} is damaged ({error}); remove the line, or report without this run") from None
    return [content for content in lines if isinstance(content, dict)]


def _check_numbers(content: Any) -> None:
    """Refuse numbers that cannot be drawn."""
    values = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    for value in values:
        _check_numbers(value)
    if isinstance(content, int | float) and abs(content) > LARGEST_SCORE:
        raise ValueError(f"{content:.3g} is no score, epoch or duration")
