"""Reads untrusted YAML as plain values, bounded in size, and describes what is wrong with it in a sentence."""

import difflib
import reprlib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from data_prep.common.safe_reading import LARGEST_INTEGER, read_regular_file
from data_prep.common.validation_messages import in_plain_words

LARGEST = 2**17  # bytes
LONGEST_NUMBER = 100  # characters, in any of YAML's notations
MOST_VALUES = 10_000  # with aliases expanded: through them, a few lines can stand for billions of values

_REPR = reprlib.Repr()  # for bad values in messages
_REPR.maxstring = _REPR.maxother = 200


def read_yaml(path: Path) -> Any:
    """The content of a YAML file as plain values.

    Raises:
        ValueError: not YAML, a tag of a Python object, a repeated key, an integer beyond 2^64, or too many values.
        OSError: the file cannot be read.
    """
    text = read_regular_file(path, LARGEST).decode()
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _count_values(node, {}) > MOST_VALUES:
            raise ValueError(f"it holds more than {MOST_VALUES:,} values")
        content = loader.construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except Exception as error:  # the constructors of types raise many kinds
        raise ValueError(" ".join(str(error).split())) from None
    _check_integers(content)
    return content


def _check_integers(content: Any) -> None:
    """Refuse integers that no setting needs: one of thousands of digits cannot even be printed."""
    if isinstance(content, dict):
        for key, value in content.items():
            _check_integers(key)
            _check_integers(value)
    elif isinstance(content, list | tuple | set):
        for value in content:
            _check_integers(value)
    elif isinstance(content, int) and abs(content) > LARGEST_INTEGER:
        raise ValueError(f"an integer of {content.bit_length():,} bits is too large")


def _count_values(node: yaml.Node, counts: dict[int, int]) -> int:
    """The number of values below a node; `counts` has those of the nodes counted so far, by identity."""
    if id(node) not in counts:
        counts[id(node)] = MOST_VALUES + 1  # until it is counted: a node that contains itself never ends
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
            children = [child for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        elif node.tag == "tag:yaml.org,2002:int" and len(node.value) > LONGEST_NUMBER:
            raise ValueError(
                f"line {node.start_mark.line + 1}: a number of {len(node.value):,} characters is too large"
            )
        counts[id(node)] = 1 + sum(_count_values(child, counts) for child in children)
    return counts[id(node)]


def _check_keys(node: yaml.MappingNode) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                raise ValueError(f"line {key.start_mark.line + 1}: {key.value} is repeated")
            seen.add(key.value)


def describe_error(error: ValidationError, model: type[BaseModel]) -> str:
    """The first error that pydantic reports, in a sentence; for an unknown name with the nearest valid one."""
    first = error.errors()[0]
    *sections, name = [str(part) for part in first["loc"]] or ["the file"]
    where = ".".join((*sections, name))
    if first["type"] != "extra_forbidden":
        given = first.get("input")
        words = in_plain_words(first["msg"])
        return f"{where}: {words}" if first["type"] == "missing" else f"{where}: {words} (not {_REPR.repr(given)})"
    names = _field_names(model, sections)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"the settings here are {', '.join(names)}"
    return f"{where} is not a setting; {hint}"


def _field_names(model: type[BaseModel], sections: list[str]) -> list[str]:
    for section in sections:
        kind = model.model_fields[section].annotation
        assert isinstance(kind, type)
        assert issubclass(kind, BaseModel), "pydantic finds unknown names in models only"
        model = kind
    return list(model.model_fields)
