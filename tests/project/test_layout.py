"""The layout of the code: imports go one way, without circles; commands are short; every package is installed."""

import ast
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from helpers import ROOT

# A module imports from its own room and from those before it. A file of data_prep/ that lies in no package is a room.
TRAIN = (
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
DATA_PREP = (
    "common",
    "remote",
    "recording",
    "spikes",
    "confidence_interval",
    "ceiling",
    "splits",
    "split_options",
    "shards",
    "sources.files",
    "sources.responses",
    "sources",
)
COMMANDS = {"data_prep": ("pack", "show", "fetch"), "train": tuple(path.stem for path in ROOT.glob("train/[!_]*.py"))}
LONGEST_COMMAND = 80  # lines
# Who may know a library; everybody else asks them.
KNOWN_BY = {
    "accelerate": ("train.distributed", "train.run"),
    "deepspeed": ("train.distributed",),
    "optuna": ("train.sweeping",),
    "fsspec": ("data_prep.remote",),
}


@cache
def imports(path: Path) -> frozenset[str]:
    """The dotted names of the modules that a file imports, also within functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            inner = {f"{module}.{alias.name}" for alias in node.names}
            modules = {name for name in inner if is_module(name)}
            names |= modules or {module}
    return frozenset(names)


def is_module(name: str) -> bool:
    """Whether a dotted name is a file or a package of this repository."""
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def modules(package: str) -> dict[str, Path]:
    return {module_of(path): path for path in sorted((ROOT / package).rglob("*.py"))}


def room_of(module: str, rooms: tuple[str, ...]) -> str | None:
    """The room of a module of data_prep or train: the longest name that its path begins with."""
    inside = module.partition(".")[2]
    matching = [room for room in rooms if inside == room or inside.startswith(f"{room}.")]
    return max(matching, key=len, default=None)


def is_command(module: str) -> bool:
    package, _, name = module.partition(".")
    return name in COMMANDS.get(package, ())


@pytest.mark.parametrize(("package", "rooms"), [("data_prep", DATA_PREP), ("train", TRAIN)])
def test_every_module_is_a_command_or_in_a_room(package, rooms):
    homeless = [
        name for name in modules(package) if name != package and not is_command(name) and not room_of(name, rooms)
    ]
    assert homeless == []


@pytest.mark.parametrize(("package", "rooms"), [("data_prep", DATA_PREP), ("train", TRAIN)])
def test_a_room_imports_only_those_before_it(package, rooms):
    wrong = []
    for module, path in modules(package).items():
        room = room_of(module, rooms)
        if room is None:
            continue
        for name in imports(path):
            imported_room = room_of(name, rooms) if name.startswith(f"{package}.") else None
            if imported_room is not None and rooms.index(imported_room) > rooms.index(room):
                wrong.append(f"{module} imports {name}")
    assert wrong == []


def test_data_prep_knows_nothing_of_train():
    wrong = [
        module
        for module, path in modules("data_prep").items()
        if any(n.split(".")[0] == "train" for n in imports(path))
    ]
    assert wrong == []


def test_neither_knows_the_public_package():
    every = modules("data_prep") | modules("train")
    wrong = [module for module, path in every.items() if any(n.split(".")[0] == "spiketune" for n in imports(path))]
    assert wrong == []


def test_the_public_package_knows_both_and_no_command():
    wrong = [
        f"{module} imports {name}"
        for module, path in modules("spiketune").items()
        for name in imports(path)
        if is_command(name) or "distributed" in name
    ]
    assert wrong == []


def test_sources_know_nothing_of_shards():
    wrong = [
        module
        for module, path in modules("data_prep/sources").items()
        if module != "data_prep.sources.joined" and any(name.startswith("data_prep.shards") for name in imports(path))
    ]
    assert wrong == []


def test_models_know_nothing_of_processes():
    wrong = [
        module for module, path in modules("train/models").items() if any("distributed" in n for n in imports(path))
    ]
    assert wrong == []


def test_no_module_imports_a_command():
    every = modules("data_prep") | modules("train")
    wrong = [f"{module} imports {name}" for module, path in every.items() for name in imports(path) if is_command(name)]
    assert wrong == []


def test_no_modules_import_each_other():
    every = modules("data_prep") | modules("train") | modules("spiketune")
    TopologicalSorter({module: imports(path) & every.keys() for module, path in every.items()}).prepare()


@pytest.mark.parametrize("library", KNOWN_BY)
def test_a_library_is_known_by_few(library):
    every = modules("data_prep") | modules("train")
    users = [module for module, path in every.items() if any(name.split(".")[0] == library for name in imports(path))]
    assert users, f"nobody uses {library} any more"
    assert [module for module in users if not module.startswith(KNOWN_BY[library])] == []


@pytest.mark.parametrize("command", [f"{package}/{name}.py" for package, names in COMMANDS.items() for name in names])
def test_a_command_is_short(command):
    lines = (ROOT / command).read_text().count("\n")
    assert lines <= LONGEST_COMMAND


def test_every_package_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    parts = ("data_prep", "train", "spiketune")
    packages = [path.parent for part in parts for path in ROOT.glob(f"{part}/**/__init__.py")]
    assert sorted(listed["packages"]) == sorted(".".join(path.relative_to(ROOT).parts) for path in packages)
    for package, patterns in listed["package-data"].items():
        for pattern in patterns:
            assert list(ROOT.joinpath(*package.split(".")).glob(pattern)), (package, pattern)
