"""A search over recipes: SWEEP.yaml as typed settings, its points, and what lies where in a sweep's folder.

SWEEP_DIR/sweep.yaml  recipe.yaml  study.json     what is searched, from which recipe, on which data
SWEEP_DIR/trials/0000.yaml  0000.log  0000/       a trial's recipe, what it printed, and its run folder
SWEEP_DIR/table.md  table.csv  heatmap.png  best.yaml  tensorboard/
"""

import copy
import difflib
import functools
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError

from data_prep.common.atomic_writes import write_bytes, write_json
from data_prep.common.errors import BadInput
from data_prep.shards.manifest import Manifest
from train.run.folder import check_writable, flattened
from train.run.recipe import LARGEST_SEED, WEEK, Recipe, Settings, Text, load_recipe
from train.run.yaml_files import describe_error, read_yaml

ROOT = Path(__file__).resolve().parents[2]
MOST_POINTS = 10_000
CORNERS_CHECKED = 1_024
SEED = "seed"
SAME_FOR_ALL = (  # what decides by which number, and on which stimuli and responses, trials are compared
    *(f"early_stopping.{name}" for name in ("split", "inner_fraction", "folds", "fold", "metric")),
    "task.kind",
    "task.shuffle_responses",
    "subset",
)


class Range(Settings):
    """An interval to sample from; whole numbers for a setting that is one."""

    low: int | float
    """The least value."""
    high: int | float
    """The greatest value."""
    log: bool = False
    """Sample the logarithm evenly."""
    step: int | float | None = Field(None, gt=0)
    """Distance between the values to choose from; by default any."""


class Sweep(Settings):
    """All settings of a search. Keys of recipes are dotted, e.g. `optimizer.lr`."""

    recipe: Text
    """The recipe that every trial starts from: a path from this file's folder, the working folder, or Spiketune's."""
    set: dict[str, Any] = Field({})
    """Settings of all trials that differ from the recipe's."""
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field({})
    """Values per key; every combination is a trial."""
    space: dict[str, Any] = Field({})
    """A range (low, high, log, step) or a list of choices per key; TPE samples from it."""
    trials: int | None = Field(None, ge=1, le=MOST_POINTS)
    """How many points to sample from `space`."""
    seed: int = Field(0, ge=0, le=LARGEST_SEED)
    """Of the sampler."""
    storage: Text | None = None
    """Database of the study, e.g. sqlite:///sweeps.db or postgresql://...; by default a journal in SWEEP_DIR."""
    stale_seconds: float = Field(120.0, ge=3, le=WEEK)
    """A trial whose worker has given no sign of life for so long is picked up by another."""


@dataclass(frozen=True)
class Plan:
    """A search that has been checked: every recipe it can ask for is valid.

    Attributes:
        sweep: its settings.
        base: the recipe with `set` applied, which every trial starts from.
        metric: by which trials are compared.
        points: of a grid: the settings of each trial; None for a space.
        choices: the values of each key of a grid, and of the keys of a space that are lists.
        ranges: the other keys of a space.
    """

    sweep: Sweep
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
        count = self.sweep.trials if self.points is None else len(self.points)
        return [f"{number:04d}" for number in range(count)]

    @property
    def seeds(self) -> list[int]:
        """The seeds that every other setting is repeated with; empty where the seed does not vary."""
        return self.choices.get(SEED, [])

    def values(self, key: str) -> list[Any]:
        """The values that a setting takes in this search; of an interval its ends."""
        if key in self.ranges:
            return [self.ranges[key].low, self.ranges[key].high]
        return self.choices.get(key) or [setting(self.base, key)]

    def recipe(self, settings: Mapping[str, Any]) -> Recipe:
        """The recipe of a trial.

        Raises:
            BadInput: its settings contradict each other.
        """
        return _checked(self.base, settings, "a trial")

    def resolved(self) -> dict[str, Any]:
        """The search as a sweep file beside its recipe.yaml, with what decides the points alone."""
        content: dict[str, Any] = {"recipe": "recipe.yaml"}
        if self.points is not None:
            return content | {"grid": self.choices}
        space = {key: self.choices.get(key) or self.ranges[key].model_dump() for key in self.keys}
        return content | {"space": space, "trials": self.sweep.trials, "seed": self.sweep.seed}


# ------------------------------------------------------------------------------------------------------- reading


def load_plan(path: Path) -> Plan:
    """Read SWEEP.yaml and check every recipe it asks for.

    Raises:
        BadInput: anything in it that is unknown, out of bounds or contradictory, naming the file and the field.
    """
    if not path.is_file():
        raise BadInput(f"{path}: no such sweep file")
    sweep = load_recipe(path, Sweep)
    base = load_recipe(_find_recipe(path, sweep.recipe))
    try:
        _check_kind(sweep)
        for section in ("set", "grid", "space"):
            for key in getattr(sweep, section):
                _check_key(section, key)
        _check_varied(sweep)
        base = _checked(base, sweep.set, "set")
        _check_selection(base)
        return _plan_grid(sweep, base) if sweep.grid else _plan_space(sweep, base)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None


def _find_recipe(sweep_file: Path, name: str) -> Path:
    places = [sweep_file.parent / name, Path(name), ROOT / name]
    for path in places:
        if path.is_file():
            return path
    raise BadInput(f"{sweep_file}: recipe: there is no {places[0]} and no {places[1].absolute()}")


def _check_kind(sweep: Sweep) -> None:
    if bool(sweep.grid) == bool(sweep.space):
        raise BadInput("give either `grid` (all combinations) or `space` (sampled), with a key such as optimizer.lr")
    if sweep.space and sweep.trials is None:
        raise BadInput("trials: say how many points are sampled from `space`, e.g. trials: 20")
    for name in ("trials", "seed"):
        if sweep.grid and name in sweep.model_fields_set:
            raise BadInput(
                f"{name} belongs to `space`; a grid runs every combination once (for its seeds, `set: {{seed: 1}}`)"
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


def _check_varied(sweep: Sweep) -> None:
    section, varied = ("grid", sweep.grid) if sweep.grid else ("space", sweep.space)
    for key in varied:
        if key in sweep.set:
            raise BadInput(f"{key} is under `set` and under `{section}`; leave it in one of them")
        if key in SAME_FOR_ALL:
            raise BadInput(
                f"{section}: {key} cannot vary: trials are compared by one metric on one kind of inner split "
                "(and val is for reporting); put it under `set`, or make one sweep for each value"
            )
    if SEED in sweep.space:
        raise BadInput("space: seed would be chosen for its luck; put a seed under `set`, or use a grid over seeds")
    if set(sweep.grid) == {SEED}:
        raise BadInput("grid: seed alone leaves nothing to choose; add a setting such as optimizer.lr")


def _check_selection(base: Recipe) -> None:
    if base.early_stopping.split != "inner":
        raise BadInput(
            f"early_stopping.split is {base.early_stopping.split}, but a search must choose by the inner split, since "
            "the split that is reported may not choose; add `set: {early_stopping.split: inner}`"
        )


def changed(base: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """A recipe with some settings, by dotted key, replaced.

    Raises:
        ValidationError: a value is bad.
    """
    content = copy.deepcopy(base.model_dump())
    for key, value in settings.items():
        *sections, name = key.split(".")
        place = content
        for section in sections:
            if place[section] is None:  # an optional section that the base leaves out
                place[section] = {}
            place = place[section]
        place[name] = value
    return Recipe.model_validate(content)


def setting(recipe: Recipe, key: str) -> Any:
    """The value of a dotted key."""
    return functools.reduce(getattr, key.split("."), recipe)


def _built(base: Recipe, settings: Mapping[str, Any], section: str) -> Recipe:
    """A recipe with some settings replaced; a bad value is named with the section it stands in."""
    try:
        return changed(base, settings)
    except ValidationError as error:
        raise BadInput(f"{section}: {describe_error(error, Recipe)}") from None


def _checked(base: Recipe, settings: Mapping[str, Any], section: str) -> Recipe:
    """A recipe with some settings replaced that contradict neither each other nor the rest."""
    recipe = _built(base, settings, section)
    try:
        recipe.check()
    except BadInput as error:
        raise BadInput(f"{section}: {error}") from None
    return recipe


# -------------------------------------------------------------------------------------------------------- points


def _plan_grid(sweep: Sweep, base: Recipe) -> Plan:
    count = math.prod(len(values) for values in sweep.grid.values())
    if count > MOST_POINTS:
        raise BadInput(f"grid: {count:,} combinations are more than {MOST_POINTS:,}; sample from a `space` instead")
    recipes = [_checked(base, point, "grid") for point in _combinations(sweep.grid)]
    points = [{key: setting(recipe, key) for key in sweep.grid} for recipe in recipes]
    choices = {key: _distinct(point[key] for point in points) for key in sweep.grid}
    for key, values in choices.items():
        if len(values) < len(sweep.grid[key]):
            raise BadInput(f"grid: {key} names a value twice ({sweep.grid[key]})")
    return Plan(sweep, base, _metric(recipes), points, choices, {})


def _plan_space(sweep: Sweep, base: Recipe) -> Plan:
    ranges = {key: _range(key, value) for key, value in sweep.space.items() if not isinstance(value, list)}
    ends = {key: [ranges[key].low, ranges[key].high] if key in ranges else sweep.space[key] for key in sweep.space}
    for key, values in ends.items():
        if not values:
            raise BadInput(f"space: {key} has no values to choose from")
    choices = {
        key: [setting(_built(base, {key: value}, "space"), key) for value in values] for key, values in ends.items()
    }
    corners = itertools.islice(_combinations(ends), CORNERS_CHECKED)
    metric = _metric([_checked(base, point, "space") for point in corners])
    for key in ranges:
        ranges[key] = _typed(key, ranges[key], *choices.pop(key))
    return Plan(sweep, base, metric, None, choices, ranges)


def _metric(recipes: list[Recipe]) -> str:
    """What all trials are compared by; without `early_stopping.metric` it follows from other settings."""
    metrics = sorted({recipe.selection_metric for recipe in recipes})
    if len(metrics) > 1:
        raise BadInput(
            f"some trials would be chosen by {metrics[0]} and others by {metrics[1]}; "
            f"add `set: {{early_stopping.metric: {metrics[0]}}}`"
        )
    return metrics[0]


def _combinations(values: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    for combination in itertools.product(*values.values()):
        yield dict(zip(values, combination, strict=True))


def _distinct(values: Iterator[Any]) -> list[Any]:
    return list({as_choice(value): value for value in values}.values())


def as_choice(value: Any) -> Any:
    """A setting as what can be compared and stored everywhere: plain values as they are, lists and the like as JSON."""
    return value if isinstance(value, str | int | float | bool | None) else json.dumps(value)


def _range(key: str, content: Any) -> Range:
    if not isinstance(content, dict):
        raise BadInput(f"space: {key}: give a list of choices, or a range such as {{low: 1e-4, high: 1e-2, log: true}}")
    try:
        found = Range.model_validate(content)
    except ValidationError as error:
        raise BadInput(f"space: {key}: {describe_error(error, Range)}") from None
    if found.low >= found.high:
        raise BadInput(f"space: {key}: low ({found.low}) must be less than high ({found.high})")
    if found.log and (found.low <= 0 or found.step is not None):
        raise BadInput(f"space: {key}: a logarithmic range needs low > 0 and no step")
    return found


def _typed(key: str, given: Range, low: Any, high: Any) -> Range:
    """The range in the setting's own type, as the recipe has read its ends."""
    if any(isinstance(end, bool) or not isinstance(end, int | float) for end in (low, high)):
        raise BadInput(f"space: {key} is no number; give a list of choices")
    if isinstance(low, int) and given.step is not None and given.step != int(given.step):
        raise BadInput(f"space: {key}: step ({given.step}) must be a whole number, as the setting is one")
    step = given.step if given.step is None else type(low)(given.step)
    return Range(low=low, high=high, log=given.log, step=step)


# -------------------------------------------------------------------------------------------------------- folder


class SweepFolder:
    """Paths in a sweep's folder, and what it was begun with."""

    def __init__(self, path: Path):
        self.path = path
        self.sweep = path / "sweep.yaml"
        self.recipe = path / "recipe.yaml"
        self.study = path / "study.json"
        self.lock = path / "sweep.lock"
        self.results_lock = path / "results.lock"
        self.journal = path / "journal.log"
        self.trials = path / "trials"
        self.table = path / "table.md"
        self.csv = path / "table.csv"
        self.heatmap = path / "heatmap.png"
        self.best = path / "best.yaml"
        self.tensorboard = path / "tensorboard"

    def trial_recipe(self, run: str) -> Path:
        """The recipe of a trial."""
        return self.trials / f"{run}.yaml"

    def launch(self, run: str) -> Path:
        """The configuration that `accelerate launch` reads for a trial."""
        return self.trials / f"{run}.launch.yaml"

    def log(self, run: str) -> Path:
        """What a trial printed."""
        return self.trials / f"{run}.log"

    def beat(self, run: str) -> Path:
        """Touched while a trial runs; holds which worker's it is."""
        return self.trials / f"{run}.beat"

    def run(self, run: str) -> Path:
        """The run folder of a trial."""
        return self.trials / run

    def check(self, plan: Plan, manifest: Manifest) -> None:
        """Refuse a folder that holds something else, another search, or the same search on other data.

        Raises:
            BadInput: it does.
        """
        if self.study.is_file():
            self._check_same(plan, manifest)
        elif self.path.exists() and (not self.path.is_dir() or self._holds_something()):
            raise BadInput(f"{self.path} exists and is not an empty folder; choose another --out")
        check_writable(self.path)

    def _holds_something(self) -> bool:
        """Anything but what a sweep leaves that was stopped while it was set up."""
        return any(self.path.iterdir()) and not self.lock.exists()

    def _check_same(self, plan: Plan, manifest: Manifest) -> None:
        if self.facts()["recording"] != manifest.fingerprint:
            raise BadInput(f"{self.path} holds a sweep on other data; join it with the --data it began with")
        before = flattened(_read(self.sweep)) | flattened(_read(self.recipe), "recipe.")
        now = flattened(_plain(plan.resolved())) | flattened(plan.base.model_dump(mode="json"), "recipe.")
        differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if differing:
            name = differing[0]
            raise BadInput(
                f"{self.path} holds another sweep ({name}: {before.get(name)} -> {now.get(name)}); choose another --out"
            )

    def facts(self) -> dict[str, Any]:
        """What study.json holds: the study's name, and the fingerprint of the data."""
        return _read(self.study)

    def begin(self, plan: Plan, manifest: Manifest, study: str) -> None:
        """Write down what is searched; study.json comes last and says that everything is there."""
        for path, content in ((self.recipe, plan.base.model_dump(mode="json")), (self.sweep, _plain(plan.resolved()))):
            write_bytes(path, yaml.safe_dump(content, sort_keys=False).encode())
        write_json(self.study, {"study": study, "recording": manifest.fingerprint, "data": manifest.name})


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_yaml(path)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read ({error}); choose another --out") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path} is no file of a sweep; choose another --out")
    return content


def _plain(content: Any) -> Any:
    return json.loads(json.dumps(content))
