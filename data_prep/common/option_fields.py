"""The options of a command, from the fields of its pydantic model: names, flags, defaults."""

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import tyro
from pydantic import BaseModel
from pydantic.fields import FieldInfo

VALUE_NAMES: dict[Any, str] = {int: "N", float: "NUMBER", str: "TEXT", Path: "PATH", bool: ""}

(_POSITIONAL,) = get_args(tyro.conf.Positional[int])[1:]


@dataclass(frozen=True)
class Mark:
    """A mark on a field, used as `Annotated[int, OFTEN_CHANGED]`."""

    meaning: str


OFTEN_CHANGED = Mark("among the settings that people change most; help shows it first")


@dataclass(frozen=True)
class ValueName:
    """What help shows for an option's value in place of its type."""

    text: str


FolderLocation = Annotated[str, ValueName("PATH|URL")]
"""The type of an option that takes a shard folder."""


@dataclass(frozen=True)
class Option:
    """One option of a command line.

    Attributes:
        name: dotted, as in a recipe: optimizer.lr.
        field: of the model.
        default: its value if the option is not given; tyro.MISSING for a required option.
        section: the model that holds the field.
    """

    name: str
    field: FieldInfo
    default: Any
    section: type[BaseModel]

    @property
    def required(self) -> bool:
        """Whether it must be given."""
        return self.default is tyro.MISSING

    @property
    def positional(self) -> bool:
        """Whether it is given without a flag."""
        return _POSITIONAL in self.field.metadata

    @property
    def value_name(self) -> str:
        """What help shows for its value: PATH, {mean,stack}, ..."""
        names = [mark.text for mark in self.field.metadata if isinstance(mark, ValueName)]
        return names[0] if names else _value_name(self.field.annotation)

    @property
    def flags(self) -> list[str]:
        """Its flags; settings of a section are spelled as in a recipe.

        A switch has a flag for either state. The one that changes the default comes first; the other repeats what a
        recipe, or a run that is resumed, already says.
        """
        name = self.name if "." in self.name else self.name.replace("_", "-")
        aliases = [alias for mark in self.field.metadata for alias in getattr(mark, "aliases", None) or ()]
        if not isinstance(self.default, bool):
            return [f"--{name}", *aliases]
        section, dot, last = name.rpartition(".")
        states = [f"--{name}", f"--{section}{dot}no-{last}"]
        return [*(reversed(states) if self.default else states), *aliases]

    @property
    def usage(self) -> str:
        """The option as a usage line shows it."""
        if self.positional:
            name = self.value_name if self.value_name.startswith("{") else self.name.upper()
            return f"{name} ..." if self.value_name.endswith(" ...") else name
        return f"{self.flags[0]} {self.value_name}".rstrip()


def _value_name(kind: Any) -> str:
    origin, inner = get_origin(kind), [part for part in get_args(kind) if part is not type(None)]
    if origin is Annotated:
        names = [mark.text for mark in inner[1:] if isinstance(mark, ValueName)]
        return names[0] if names else _value_name(inner[0])
    if origin is Literal:
        return f"{{{','.join(map(str, inner))}}}"
    if origin in (Union, types.UnionType):
        return "|".join(dict.fromkeys(map(_value_name, inner)))
    if origin is list or (origin is tuple and Ellipsis in inner):
        return f"{_value_name(inner[0])} ..."
    if origin is tuple:
        return " ".join(map(_value_name, inner))
    return VALUE_NAMES.get(kind, "VALUE")


def leaf_fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo, type[BaseModel]]]:
    """Every field of a model and of the sections in it: its dotted name, the field, the model that holds it."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaf_fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field, model


def marked(model: type[BaseModel], mark: Mark) -> frozenset[str]:
    """The dotted names of the fields that have a mark."""
    return frozenset(name for name, field, _ in leaf_fields(model) if mark in field.metadata)


def options_of(model: type[BaseModel], defaults: Mapping[str, Any]) -> list[Option]:
    """The options of a command; `defaults` replace those of the model's own fields."""
    return [
        Option(name, field, _default(name, field, defaults), section)
        for name, field, section in leaf_fields(model)
        if not subcommands(field)
    ]


def _default(name: str, field: FieldInfo, defaults: Mapping[str, Any]) -> Any:
    first, _, rest = name.partition(".")
    if first in defaults:
        return value_at(defaults[first], rest) if rest else defaults[first]
    return declared_default(field)


def declared_default(field: FieldInfo) -> Any:
    """The default of a field as its model declares it; `tyro.MISSING` where the field must be given."""
    # pydantic 2.10 asks for the values of the other fields, which none of our default factories use.
    return tyro.MISSING if field.is_required() else field.get_default(call_default_factory=True, validated_data={})


def value_at(settings: BaseModel, name: str) -> Any:
    """The value of a field by its dotted name."""
    value: Any = settings
    for part in name.split("."):
        value = getattr(value, part)
    return value


def subcommands(field: FieldInfo) -> dict[str, type[BaseModel]]:
    """By name, the models of a field that is a choice of subcommands; empty for any other."""
    choices = {}
    for choice in get_args(field.annotation):
        for mark in getattr(choice, "__metadata__", ()):
            if isinstance(choice.__origin__, type) and issubclass(choice.__origin__, BaseModel):
                choices[mark.name] = choice.__origin__
    return choices
