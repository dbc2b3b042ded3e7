"""What pyproject.toml requires, and whether this Python has it. Needs nothing but pip.

python launch/requirements.py missing [EXTRA ...]    what this Python lacks, a line each; exit code 1 if anything
python launch/requirements.py lowest [EXTRA ...]     each at its lowest version, and what builds the project
"""

import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

try:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
except ModuleNotFoundError:  # in a bare environment
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.utils import canonicalize_name  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]


def pyproject() -> dict[str, Any]:
    """The content of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def required(extras: Iterable[str] = ()) -> list[Requirement]:
    """The project's requirements, with those of its extras."""
    project = pyproject()["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    return [Requirement(line) for lines in lists for line in lines]


def needed_to_build() -> list[Requirement]:
    """What `pip install --no-build-isolation .` needs beforehand."""
    return [Requirement(line) for line in pyproject()["build-system"]["requires"]]


def installed_version(name: str) -> str | None:
    """The version of a package in this Python; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def missing(requirements: Iterable[Requirement]) -> list[str]:
    """A phrase for each requirement that this Python does not meet: "tyro>=1.0" or "tyro>=1.0 (0.9 is installed)"."""
    phrases = []
    for requirement in requirements:
        found = installed_version(requirement.name)
        if found is None:
            phrases.append(str(requirement))
        elif not requirement.specifier.contains(found, prereleases=True):
            phrases.append(f"{requirement} ({found} is installed)")
    return phrases


def lowest(requirements: Iterable[Requirement]) -> list[str]:
    """The requirements, pinned at the lowest versions that they admit."""
    return [f"{requirement.name}=={_lower_bound(requirement)}" for requirement in requirements]


def _lower_bound(requirement: Requirement) -> str:
    bounds = [part.version for part in requirement.specifier if part.operator in (">=", "==")]
    if len(bounds) != 1:
        raise ValueError(f"pyproject.toml: {requirement} must name its lowest version, once")
    return bounds[0]


def main() -> int:
    """Print what is asked for."""
    question, extras = sys.argv[1], sys.argv[2:]
    if question == "lowest":
        print(*lowest([*required(extras), *needed_to_build()]), sep="\n")
        return 0
    lacking = missing(required(extras))
    print(*lacking, sep="\n", end="\n" if lacking else "")
    return 1 if lacking else 0


if __name__ == "__main__":
    sys.exit(main())
