"""Faults that pydantic finds are told in our own words."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field, ValidationError, field_validator

from data_prep.common.errors import BadInput
from data_prep.common.validation_messages import first_fault
from train.run.yaml_files import describe_error


class Inner(BaseModel, extra="forbid"):
    depth: Annotated[int, Field(ge=1, le=5)] = 1


class Everything(BaseModel, extra="forbid", allow_inf_nan=False):
    count: Annotated[int, Field(gt=0, lt=10)] = 1
    share: Annotated[float, Field(ge=0)] = 0
    layers: Annotated[list[str], Field(min_length=1, max_length=2)] = ["a"]
    pair: tuple[float, float] = (0, 1)
    name: Annotated[str, Field(min_length=2, max_length=4, pattern="^[a-z]*$")] = "ab"
    kind: Literal["ridge", "pls"] = "ridge"
    folder: Path = Path()
    is_on: bool = False
    inner: Inner = Inner()
    facts: dict[str, int] = {}
    nothing: None = None

    @field_validator("share")
    @classmethod
    def _not_a_third(cls, value: float) -> float:
        if value == 0.33:
            raise ValueError("must not be a third")
        return value


CASES = {
    "count: must be greater than 0": {"count": 0},
    "count: must be less than 10": {"count": 10},
    "count: must be a whole number": {"count": 1.5},
    "count: has too many digits": {"count": "9" * 5000},
    "share: must be a number": {"share": "x"},
    "share: must be at least 0": {"share": -1},
    "share: must be a finite number": {"share": float("inf")},
    "share: must not be a third": {"share": 0.33},
    "layers: needs at least 1, not 0": {"layers": []},
    "layers: may have at most 2, not 3": {"layers": list("abc")},
    "layers: must be a list": {"layers": 1},
    "pair.1: is missing": {"pair": [1]},
    "name: needs at least 2 characters": {"name": "a"},
    "name: may have at most 4 characters": {"name": "abcde"},
    "name: must match the pattern ^[a-z]*$": {"name": "AB"},
    "name: must be text": {"name": 1},
    "kind: must be 'ridge' or 'pls'": {"kind": "ols"},
    "folder: must be a path": {"folder": 1},
    "is_on: must be true or false": {"is_on": "maybe"},
    "inner.depth: must be at most 5": {"inner": {"depth": 6}},
    "inner: must hold named values": {"inner": 3},
    "facts: must hold named values": {"facts": []},
    "nothing: must be left out": {"nothing": 1},
    "other: is not known here": {"other": 1},
}


@pytest.mark.parametrize("words", CASES)
def test_a_fault_is_told_in_plain_words(words):
    with pytest.raises(ValidationError) as caught:
        Everything.model_validate(CASES[words])
    assert first_fault(caught.value) == words
    told = describe_error(caught.value, Everything)
    assert told.startswith(words.rpartition(":")[0])
    for jargon in ("Input", "should", "validation", "valid ", "items"):
        assert jargon not in told


@pytest.mark.parametrize("path", ["name-\udcff", "/data/\udce9t\udce9"])
def test_paths_that_are_not_utf8_are_refused(path):
    from data_prep.pack import parse_options

    with pytest.raises(BadInput, match="is not UTF-8 text; rename") as caught:
        parse_options(["folder", path, "--out", "x"])
    str(caught.value).encode()


def test_a_working_folder_that_is_not_utf8_is_refused(tmp_path, monkeypatch):
    from data_prep.pack import parse_options

    folder = tmp_path / "\udcff"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(BadInput, match=r"working folder.*is not UTF-8 text; rename") as caught:
        parse_options(["folder", "x", "--out", "x"])
    str(caught.value).encode()
