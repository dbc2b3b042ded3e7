"""A kit: a folder of wheels and weights for machines without internet, and which of its wheels a machine needs.

KIT/kit.json           for which Python, what is in it and what it leaves out
KIT/wheels/*.whl
KIT/weights/hub/       weights of backbones, as the Hugging Face cache keeps them
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from requirements import Requirement, canonicalize_name

DESCRIPTION = "kit.json"
ANY_VERSION = ""


class KitError(Exception):
    """A sentence for the user."""


@dataclass(frozen=True)
class Wheel:
    """A package in a kit.

    Attributes:
        name: of the package, in canonical spelling.
        version: of the package.
        file: in the kit's folder of wheels.
        sha256: of the file.
        requires: the packages that it needs on the kit's Python and platform, each with a range of versions.
    """

    name: str
    version: str
    file: str
    sha256: str
    requires: list[str]


@dataclass(frozen=True)
class Kit:
    """What is in a kit.

    Attributes:
        python: the version that its wheels are for, such as "3.12".
        machine: the processor that they are for, such as "x86_64".
        requirements: what the project requires.
        wheels: by the name of the package.
        networks: timm names of the backbones whose weights are in it.
    """

    python: str
    machine: str
    requirements: list[str]
    wheels: dict[str, Wheel]
    networks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Needed:
    """What a machine needs: wheels of the kit, and packages that are in neither."""

    wheels: list[Wheel]
    lacking: list[str]


def needed(requirements: Iterable[str], wheels: Mapping[str, Wheel], have: Callable[[str], str | None]) -> Needed:
    """The wheels that a machine needs for some requirements, with what those wheels require in turn.

    Args:
        requirements: packages, each with a range of versions.
        wheels: that there are, by the name of the package.
        have: the version of a package that the machine has: None if it lacks it, ANY_VERSION if it has one that
            will do.
    """
    chosen: dict[str, Wheel] = {}
    lacking = []
    waiting = [Requirement(line) for line in requirements]
    while waiting:
        requirement = waiting.pop(0)
        name = canonicalize_name(requirement.name)
        if name in chosen or admits(requirement, have(name)):
            continue
        wheel = wheels.get(name)
        if wheel is None or not admits(requirement, wheel.version):
            lacking.append(str(requirement))
        else:
            chosen[name] = wheel
            waiting += [Requirement(line) for line in wheel.requires]
    return Needed(list(chosen.values()), sorted(set(lacking)))


def admits(requirement: Requirement, version: str | None) -> bool:
    """Whether an installed version, as `have` of `needed` gives it, meets a requirement."""
    if version is None:
        return False
    return version == ANY_VERSION or requirement.specifier.contains(version, prereleases=True)


def write_kit(kit: Kit, folder: Path) -> None:
    """Write a kit's description."""
    (folder / DESCRIPTION).write_text(json.dumps(asdict(kit), indent=1) + "\n")


def read_kit(folder: Path) -> Kit:
    """Read a kit's description and check that its wheels arrived as they were.

    Raises:
        KitError: there is no kit, or a wheel is missing or damaged.
    """
    try:
        content = json.loads((folder / DESCRIPTION).read_text())
        wheels = {name: Wheel(**wheel) for name, wheel in content.pop("wheels").items()}
        kit = Kit(**content, wheels=wheels)
    except FileNotFoundError:
        raise KitError(f"{folder} is not a kit: it has no {DESCRIPTION}; launch/offline.sh make makes one") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise KitError(f"{folder / DESCRIPTION} is damaged; copy the kit again") from None
    for wheel in kit.wheels.values():
        path = folder / "wheels" / wheel.file
        if not path.is_file():
            raise KitError(f"{path} is missing; copy the kit again")
        if sha256(path) != wheel.sha256:
            raise KitError(f"{path} is damaged; copy the kit again")
    return kit


def sha256(path: Path) -> str:
    """The hash of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
