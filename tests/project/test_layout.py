"""The packages of train/: which imports which, and that all of them are installed."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT

# A package imports only those before it.
ORDER = (
    "run",
    "distributed",
    "data",
    "models",
    "regression",
    "evaluation",
    "probing",
    "finetuning",
    "sweeping",
    "planning",
    "reporting",
)


def imported(path: Path) -> Iterator[str]:
    """What a file imports of train/, by dotted name: `train.run.recipe`."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "train":
            names = [f"train.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        yield from (name for name in names if name.startswith("train."))


def test_all_packages_have_their_place():
    assert {path.parent.name for path in ROOT.glob("train/*/__init__.py")} == set(ORDER)


@pytest.mark.parametrize("package", ORDER)
def test_a_package_imports_those_before_it_and_no_command(package):
    allowed = ORDER[: ORDER.index(package) + 1]
    for path in sorted((ROOT / "train" / package).rglob("*.py")):
        assert [name for name in imported(path) if name.split(".")[1] not in allowed] == [], path.name


def test_every_package_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = [path.parent for part in ("data_prep", "train") for path in ROOT.glob(f"{part}/**/__init__.py")]
    assert sorted(listed["packages"]) == sorted(".".join(path.relative_to(ROOT).parts) for path in found)
    for package, patterns in listed["package-data"].items():
        for pattern in patterns:
            assert list(ROOT.joinpath(*package.split(".")).glob(pattern)), (package, pattern)
