"""The recipe whose speed a check measures, from the words after its --recipe."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from data_prep.common.option_fields import FolderLocation
from train.planning.options import is_probe
from train.run.recipe import MOST_RECORDINGS, ProbeRecipe, Recipe
from train.run.recipe_command import parse_with_recipe

EXAMPLES = ("train/recipes/resnet50.yaml --data data/it",)


class MeasuredTraining(Recipe):
    """Measure how fast a recipe trains."""

    data: Annotated[list[FolderLocation], Field(min_length=1, max_length=MOST_RECORDINGS)] | None = None
    """Shard folder or its URL (or several); by default a made-up recording."""


class MeasuredProbe(ProbeRecipe):
    """Measure how fast a recipe probes."""

    data: FolderLocation | None = None
    """Shard folder or its URL; by default a made-up recording."""
    split: Literal["val", "test", "cv"] = "val"
    """Stimuli to score."""


@dataclass(frozen=True)
class MeasuredRecipe:
    """A recipe and the recordings that it is measured on; `split` is what a probe scores."""

    recipe: Recipe | ProbeRecipe
    data: list[Path | str]
    split: str = "val"

    @property
    def strategy(self) -> str:
        """The name of a training's strategy."""
        setting = getattr(self.recipe, "strategy", None)
        return "ddp" if setting is None else Path(setting).stem


def parse_measured(words: list[str]) -> MeasuredRecipe:
    """The recipe in the words RECIPE.yaml [--data DIR] [--section.key value ...].

    Raises:
        BadInput: an option is unknown, out of bounds, or contradicts another.
    """
    if is_probe(words):
        probe, probe_recipe = parse_with_recipe(MeasuredProbe, ProbeRecipe, words, EXAMPLES)
        return MeasuredRecipe(probe_recipe, [] if probe.data is None else [probe.data], probe.split)
    training, recipe = parse_with_recipe(MeasuredTraining, Recipe, words, EXAMPLES)
    return MeasuredRecipe(recipe, list(training.data or []))
