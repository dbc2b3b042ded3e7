"""Rules for a setting, as metadata on its field: when it is used, and whether it may change on resume."""

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from data_prep.common.errors import BadInput
from data_prep.common.option_fields import Mark, leaf_fields, value_at

FREE_ON_RESUME = Mark("how and where the run computes, not what: it may differ when a run is resumed")
TRAINING_ONLY = Mark("used in training only")


@dataclass(frozen=True)
class UsedWhen:
    """A setting that has an effect only while another one has one of some values; see `used_when`."""

    setting: str
    values: tuple[Any, ...]
    harmless: tuple[Any, ...]

    def holds(self, settings: BaseModel) -> bool:
        """Whether the other setting has a value that gives this one an effect."""
        value = value_at(settings, self.setting)
        return value in self.values if self.values else value is not None

    def __str__(self) -> str:
        if not self.values:
            return self.setting
        return f"{self.setting} {' or '.join(str(value).lower() for value in self.values)}"


def used_when(setting: str, *values: Any, harmless: tuple[Any, ...] = ()) -> UsedWhen:
    """The metadata of a field that has an effect only while `setting` has one of `values`, or is set if none is given.

    Args:
        setting: dotted name, from the top of the recipe.
        values: of that setting.
        harmless: values of the field itself that are fine although they have no effect then.
    """
    return UsedWhen(setting, values, harmless)


def check_nothing_is_ignored(settings: BaseModel) -> None:
    """Refuse a setting that differs from its default and would have no effect.

    Raises:
        BadInput: naming it and the setting that it depends on.
    """
    for name, field, _ in leaf_fields(type(settings)):
        value, default = value_at(settings, name), field.default
        rules = [rule for rule in field.metadata if isinstance(rule, UsedWhen) and value not in rule.harmless]
        if value != default and not all(rule.holds(settings) for rule in rules):
            needed = " and ".join(map(str, rules))
            raise BadInput(f"{name} ({value}) has an effect only with {needed}; leave it at {default}")


def check_no_training_settings(settings: BaseModel) -> None:
    """Refuse a setting that differs from its default and is used in training only.

    Raises:
        BadInput: naming it.
    """
    for name, field, _ in leaf_fields(type(settings)):
        if TRAINING_ONLY in field.metadata and value_at(settings, name) != field.default:
            raise BadInput(f"{name} is for training only; leave it at {field.default}")
