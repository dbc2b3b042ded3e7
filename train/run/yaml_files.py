"""YAML of others: settings and nothing else, no matter how it is folded; and what is wrong with them."""

import difflib
import reprlib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from data_prep.common.safe_reading import read_regular_file

LARGEST = 2**17  # bytes
MOST_VALUES = 10_000  # with aliases written out, by which a few lines can stand for billions

_SHOWN = reprlib.Repr()  # of a bad value
_SHOWN.maxstring = _SHOWN.maxother = 200


def read_yaml(path: Path) -> Any:
    """What a YAML file says, in plain types.

    Raises:
        ValueError: no YAML, a tag of a Python object, a key that is there twice, or absurdly many values.
        OSError: it cannot be read.
    """
    text = read_regular_file(path, LARGEST).decode()
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _values(node, {}) > MOST_VALUES:
            raise ValueError(f"it holds more than {MOST_VALUES:,} values")
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except Exception as error:  # the types' constructors raise many kinds
        raise ValueError(" ".join(str(error).split())) from None


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for; `known` are those that were counted, by identity."""
    if id(node) not in known:
        known[id(node)] = MOST_VALUES + 1  # until it is counted: a node within itself has no end
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
            inside = [part for pair in node.value for part in pair]
        else:
            inside = node.value if isinstance(node, yaml.SequenceNode) else []
        known[id(node)] = 1 + sum(_values(part, known) for part in inside)
    return known[id(node)]


def _check_keys(node: yaml.MappingNode) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                raise ValueError(f"line {key.start_mark.line + 1}: {key.value} is there twice")
            seen.add(key.value)


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """The first fault that pydantic found, in a sentence with the nearest valid name."""
    fault = error.errors()[0]
    *sections, name = [str(part) for part in fault["loc"]] or ["the file"]
    where = ".".join((*sections, name))
    if fault["type"] != "extra_forbidden":
        return f"{where}: {fault['msg']} (not {_SHOWN.repr(fault.get('input'))})"
    names = list(_fields_at(model, sections))
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
    return f"{where} is not a setting; {hint}"


def _fields_at(model: type[BaseModel], sections: list[str]) -> dict[str, Any]:
    for section in sections:
        model = model.model_fields[section].annotation
    return model.model_fields
