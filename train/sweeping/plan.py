"""A search that has been checked: the settings of its trials, or the choices and intervals they are sampled from."""

import copy
import difflib
import functools
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from data_prep.common.errors import BadInput
from train.run.recipe import Recipe, load_recipe, nearest_recipe
from train.run.yaml_files import describe_error
from train.sweeping.sweep_settings import MOST_POINTS, Range, SweepSettings

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "train" / "recipes"
CORNERS_CHECKED = 1_024
SEED = "seed"
SAME_FOR_ALL = (  # they decide by which number, and on which stimuli and responses, trials are compared
    *(f"early_stopping.{name}" for name in ("split", "inner_fraction", "folds", "fold", "metric")),
    "task.kind",
    "task.shuffle_responses",
    "subset",
)


@dataclass(frozen=True)
class Plan:
    """A search that has been checked: every recipe it can ask for is valid.

    Attributes:
        sweep: its settings.
        base: the recipe with `set` applied, which every trial starts from.
        metric: which trials are compared by.
        points: the settings of each trial of a grid; None for a space.
        choices: the values of each setting of a grid, and of those of a space that are lists.
        ranges: the intervals of a space.
    """

    sweep: SweepSettings
    base: Recipe
    metric: str
    points: list[dict[str, Any]] | None
    choices: dict[str, list[Any]]
    ranges: dict[str, Range]

    @property
    def keys(self) -> list[str]:
        """The settings that vary, in the order of the file."""
        return list(self.sweep.grid or self.sweep.space)

    @property
    def runs(self) -> list[str]:
        """The name of every trial's run."""
        count = len(self.points) if self.points is not None else self.sweep.trials or 0
        return [f"{number:04d}" for number in range(count)]

    @property
    def seeds(self) -> list[int]:
        """The seeds that every other setting is repeated with; empty where the seed does not vary."""
        return self.choices.get(SEED, [])

    def values(self, key: str) -> list[Any]:
        """The values that a setting takes in this search; the ends of an interval."""
        if key in self.ranges:
            return [self.ranges[key].low, self.ranges[key].high]
        return self.choices.get(key) or [setting_of(self.base, key)]

    def recipe(self, settings: Mapping[str, Any]) -> Recipe:
        """The recipe of a trial.

        Raises:
            BadInput: its settings contradict each other.
        """
        return _check(self.base, settings, "a trial")

    def resolved(self) -> dict[str, Any]:
        """The part of the settings that decides the points, as a sweep file beside its recipe.yaml."""
        content: dict[str, Any] = {"recipe": "recipe.yaml"}
        if self.points is not None:
            return content | {"grid": self.choices}
        space = {key: self.choices.get(key) or self.ranges[key].model_dump() for key in self.keys}
        return content | {"space": space, "trials": self.sweep.trials, "seed": self.sweep.seed}


# ------------------------------------------------------------------------------------------------------- reading


def load_plan(path: Path) -> Plan:
    """Read SWEEP.yaml and check every recipe it asks for.

    Raises:
        BadInput: a setting is unknown, out of bounds or contradictory; names the file and the setting.
    """
    if not path.is_file():
        raise BadInput(f"{path}: no such sweep file{_nearest_search(path)}")
    sweep = load_recipe(path, SweepSettings)
    base = load_recipe(_find_recipe(path, sweep.recipe), Recipe)
    try:
        _check_kind(sweep)
        for section in ("set", "grid", "space"):
            for key in getattr(sweep, section):
                _check_key(section, key)
        _check_varied(sweep)
        base = _check(base, sweep.set, "set")
        _check_selection(base)
        return _plan_grid(sweep, base) if sweep.grid else _plan_space(sweep, base)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None


def _find_recipe(sweep_file: Path, name: str) -> Path:
    """The recipe that a sweep file names: beside it, in the working folder, or one of ours."""
    candidates = [sweep_file.parent / name, Path(name), ROOT / name, RECIPES / name]
    for path in candidates:
        if path.is_file():
            return path
    raise BadInput(
        f"{sweep_file}: recipe: {name} is neither in {sweep_file.parent} nor in {Path.cwd()} nor in {RECIPES}"
        f"{nearest_recipe(Path(name))}"
    )


def _nearest_search(path: Path) -> str:
    """The end of a sentence about a sweep file that does not exist."""
    files = {file.stem: file for folder in (RECIPES / "sweeps", path.parent) for file in folder.glob("*.yaml")}
    near = difflib.get_close_matches(path.stem, files, n=1)
    return f"; did you mean {os.path.relpath(files[near[0]])}?" if near else ""


def _check_kind(sweep: SweepSettings) -> None:
    if bool(sweep.grid) == bool(sweep.space):
        raise BadInput("give either `grid` (all combinations) or `space` (sampled), with a key such as optimizer.lr")
    if sweep.space and sweep.trials is None:
        raise BadInput("trials: give the number of points to sample from `space`, e.g. trials: 20")
    for name in ("trials", "seed"):
        if sweep.grid and name in sweep.model_fields_set:
            raise BadInput(
                f"{name} belongs to `space`; a grid runs every combination once (to set a seed: `set: {{seed: 1}}`)"
            )


def _check_key(section: str, key: str) -> None:
    if key == "data":
        raise BadInput(f"{section}: data is the same for all trials; give it to the sweep with --data")
    names = _setting_names(Recipe)
    if key in names:
        return
    inside = [name for name in names if name.startswith(f"{key}.")]
    if inside:
        raise BadInput(f"{section}: {key} is a section of a recipe; name one of its settings, e.g. {inside[0]}")
    same_leaf = [name for name in names if name.rpartition(".")[2] == key.rpartition(".")[2]]
    near = same_leaf or difflib.get_close_matches(key, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
    raise BadInput(f"{section}: {key} is not a setting of a recipe; {hint}")


def _setting_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    """The dotted names of all settings; a section may be optional."""
    names = []
    for name, field in model.model_fields.items():
        types = (field.annotation, *get_args(field.annotation))
        section = next((kind for kind in types if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        names += [f"{prefix}{name}"] if section is None else _setting_names(section, f"{prefix}{name}.")
    return names


def _check_varied(sweep: SweepSettings) -> None:
    section, varied = ("grid", sweep.grid) if sweep.grid else ("space", sweep.space)
    for key in varied:
        if key in sweep.set:
            raise BadInput(f"{key} is under `set` and under `{section}`; remove it from one of them")
        if key in SAME_FOR_ALL:
            raise BadInput(
                f"{section}: {key} cannot vary, since trials are compared by one metric on one kind of inner split "
                "(val is for reporting); put it under `set`, or run one sweep per value"
            )
    if SEED in sweep.space:
        raise BadInput("space: seed would be selected for its luck; put a seed under `set`, or use a grid over seeds")
    if set(sweep.grid) == {SEED}:
        raise BadInput("grid: seed alone leaves nothing to select; add a setting such as optimizer.lr")


def _check_selection(base: Recipe) -> None:
    if base.early_stopping.split != "inner":
        raise BadInput(
            f"early_stopping.split is {base.early_stopping.split}, but a search must select on the inner split, "
            "because the reported split must not select; add `set: {early_stopping.split: inner}`"
        )


def _with_settings(base: Recipe, settings: Mapping[str, Any], section: str) -> Recipe:
    """A recipe with some settings, named with dots, replaced; an error names their section of SWEEP.yaml."""
    content = copy.deepcopy(base.model_dump())
    for key, value in settings.items():
        *parents, name = key.split(".")
        target = content
        for parent in parents:
            if target[parent] is None:  # an optional section that the base leaves out
                target[parent] = {}
            target = target[parent]
        target[name] = value
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise BadInput(f"{section}: {describe_error(error, Recipe)}") from None


def setting_of(recipe: Recipe, key: str) -> Any:
    """The value of a setting, named with dots."""
    return functools.reduce(getattr, key.split("."), recipe)


def _check(base: Recipe, settings: Mapping[str, Any], section: str) -> Recipe:
    """A recipe with some settings replaced, whose settings do not contradict each other."""
    recipe = _with_settings(base, settings, section)
    try:
        recipe.check()
    except BadInput as error:
        raise BadInput(f"{section}: {error}") from None
    return recipe


# -------------------------------------------------------------------------------------------------------- points


def _plan_grid(sweep: SweepSettings, base: Recipe) -> Plan:
    count = math.prod(len(values) for values in sweep.grid.values())
    if count > MOST_POINTS:
        raise BadInput(f"grid: {count:,} combinations are more than {MOST_POINTS:,}; sample from a `space` instead")
    recipes = [_check(base, point, "grid") for point in _combinations(sweep.grid)]
    points = [{key: setting_of(recipe, key) for key in sweep.grid} for recipe in recipes]
    choices = {key: _distinct(point[key] for point in points) for key in sweep.grid}
    for key, values in choices.items():
        if len(values) < len(sweep.grid[key]):
            raise BadInput(f"grid: {key} lists a value twice ({sweep.grid[key]})")
    return Plan(sweep, base, _metric(recipes), points, choices, {})


def _plan_space(sweep: SweepSettings, base: Recipe) -> Plan:
    ranges = {key: _range(key, value) for key, value in sweep.space.items() if not isinstance(value, list)}
    ends = {key: [ranges[key].low, ranges[key].high] if key in ranges else sweep.space[key] for key in sweep.space}
    for key, values in ends.items():
        if not values:
            raise BadInput(f"space: {key} has no values to choose from")
    choices = {
        key: [setting_of(_with_settings(base, {key: value}, "space"), key) for value in values]
        for key, values in ends.items()
    }
    corners = itertools.islice(_combinations(ends), CORNERS_CHECKED)
    metric = _metric([_check(base, point, "space") for point in corners])
    for key in ranges:
        ranges[key] = _typed(key, ranges[key], *choices.pop(key))
    return Plan(sweep, base, metric, None, choices, ranges)


def _metric(recipes: list[Recipe]) -> str:
    """The metric that all trials are compared by; without `early_stopping.metric` it follows from other settings."""
    metrics = sorted({recipe.selection_metric for recipe in recipes})
    if len(metrics) > 1:
        raise BadInput(
            f"some trials would be selected by {metrics[0]} and others by {metrics[1]}; "
            f"add `set: {{early_stopping.metric: {metrics[0]}}}`"
        )
    return metrics[0]


def _combinations(values: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for combination in itertools.product(*values.values()):
        yield dict(zip(values, combination, strict=True))


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list({as_choice(value): value for value in values}.values())


def as_choice(value: Any) -> str | int | float | bool | None:
    """A setting that can be compared and stored everywhere: plain values as they are, lists and the like as JSON."""
    return value if isinstance(value, str | int | float | bool | None) else json.dumps(value)


def _range(key: str, content: Any) -> Range:
    if not isinstance(content, dict):
        raise BadInput(
            f"space: {key}: give a list of choices, or an interval such as {{low: 1e-4, high: 1e-2, log: true}}"
        )
    try:
        interval = Range.model_validate(content)
    except ValidationError as error:
        raise BadInput(f"space: {key}: {describe_error(error, Range)}") from None
    if interval.low >= interval.high:
        raise BadInput(f"space: {key}: low ({interval.low}) must be less than high ({interval.high})")
    if interval.log and (interval.low <= 0 or interval.step is not None):
        raise BadInput(f"space: {key}: a logarithmic interval needs low > 0 and no step")
    return interval


def _typed(key: str, given: Range, low: Any, high: Any) -> Range:
    """The interval in the setting's own type, as the recipe has read its ends."""
    if any(isinstance(end, bool) or not isinstance(end, int | float) for end in (low, high)):
        raise BadInput(f"space: {key} is not a number; give a list of choices")
    if isinstance(low, int) and given.step is not None and given.step != int(given.step):
        raise BadInput(f"space: {key}: step ({given.step}) must be a whole number, because the setting is one")
    step = given.step if given.step is None else type(low)(given.step)
    return Range(low=low, high=high, log=given.log, step=step)
