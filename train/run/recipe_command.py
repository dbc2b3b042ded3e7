"""Command lines that begin with a recipe: its settings are the defaults of the flags."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from data_prep.common import command_line
from train.run.folder import begun_by_this_job
from train.run.recipe import AnyRecipe, Recipe, load_recipe

BEFORE = "[RECIPE.yaml]"  # shown before the options

Options = TypeVar("Options", bound=Any)


def parse_with_recipe(
    model: type[Options], kind: type[AnyRecipe], words: list[str], examples: Sequence[str]
) -> tuple[Options, AnyRecipe]:
    """Parse a command line whose first word may be a recipe.

    Args:
        model: of the options: the recipe's settings and the command's own options.
        kind: of the recipe.
        words: of the command line.
        examples: for the help page.

    Returns:
        The options, and the recipe in them.

    Raises:
        BadInput: an option is unknown, out of bounds, or contradicts another.
    """
    recipe, words = leading_recipe(words, kind)
    options = _parse(model, recipe or kind(), words, examples)
    return options, _recipe_in(options, kind)


def parse_resumable(
    model: type[Options],
    kind: type[AnyRecipe],
    words: list[str],
    examples: Sequence[str],
    recipe_of: Callable[[Path], AnyRecipe],
) -> tuple[Options, AnyRecipe]:
    """`parse_with_recipe` for a command that makes a run or, with --resume, continues it.

    With --resume and no recipe, the run's own recipe gives the defaults. A run that an earlier start of the same job
    began is resumed without --resume.

    Args:
        model, kind, words, examples: as of `parse_with_recipe`; the options have `out` and `resume`.
        recipe_of: opens the recipe of an existing run.
    """
    recipe, words = leading_recipe(words, kind)
    # The run knows its data: until it is opened, an empty name stands for it.
    defaults = recipe or kind(data="" if "--resume" in words else None)
    options = _parse(model, defaults, words, examples)
    resume = options.resume or begun_by_this_job(options.out)
    if resume and recipe is None:
        options = _parse(model, recipe_of(options.out), words, examples)
    options.resume = resume
    return options, _recipe_in(options, kind)


def leading_recipe(words: list[str], kind: type[AnyRecipe]) -> tuple[AnyRecipe | None, list[str]]:
    """The recipe that a command line begins with, if any, and the other words."""
    if words and not words[0].startswith("-"):
        return load_recipe(Path(words[0]), kind), words[1:]
    return None, words


def _parse(model: type[Options], recipe: AnyRecipe, words: list[str], examples: Sequence[str]) -> Options:
    defaults = dict(recipe)
    data = defaults.pop("data")
    if data is not None:
        takes_several = isinstance(recipe, Recipe)
        defaults["data"] = [data] if takes_several and isinstance(data, str) else data
    return command_line.parse(model, words, defaults=defaults, before=BEFORE, examples=examples)


def _recipe_in(options: Any, kind: type[AnyRecipe]) -> AnyRecipe:
    recipe = kind(**{name: getattr(options, name) for name in kind.model_fields})
    recipe.check()
    return recipe
