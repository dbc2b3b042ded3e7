"""Write docs/licences.md: every package that an installation consists of, with its version and licence.

    python docs/make_licences.py

Read from the metadata of the packages that are installed, from pyproject.toml's dependencies downwards; of the extras,
`remote` and `test` are listed apart. Packages that are not installed here are named as such.
"""

import tomllib
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

DOCS = Path(__file__).resolve().parent
CLASSIFIER = "License :: "
LONGEST = 60  # characters of a licence; some packages put its whole text there


def closure(wanted: Iterable[str]) -> dict[str, Distribution | None]:
    """The packages that requirements lead to, by name; None for one that is not installed."""
    found: dict[str, Distribution | None] = {}
    waiting = [Requirement(text) for text in wanted]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            found[name] = None
            continue
        extras = requirement.extras or {""}
        needed = map(Requirement, found[name].requires or [])
        waiting += [r for r in needed if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in extras)]
    return found


def licence_of(package: Distribution) -> str:
    """What a package says its licence is: the expression, else the classifiers, else the first line of the field."""
    metadata = package.metadata
    if expression := metadata.get("License-Expression"):
        return expression
    classifiers = [text for text in metadata.get_all("Classifier", []) if text.startswith(CLASSIFIER)]
    named = [text.rpartition(" :: ")[2] for text in classifiers if text.count("::") > 1]
    if named:
        return ", ".join(named)
    lines = (metadata.get("License") or "").strip().splitlines()
    return lines[0][:LONGEST] if lines else "not told"


def table(packages: dict[str, Distribution | None]) -> list[str]:
    """A Markdown table."""
    rows = ["| package | version | licence |", "| --- | --- | --- |"]
    for name, package in sorted(packages.items()):
        version, licence = ("-", "not installed here") if package is None else (package.version, licence_of(package))
        rows.append(f"| {name} | {version} | {licence.replace('|', '/')} |")
    return rows


def main() -> None:
    """Read pyproject.toml and write the page."""
    project = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    base = closure(project["dependencies"])
    lines = [
        "# Licences of the dependencies",
        "",
        "Made by `python docs/make_licences.py` from the metadata of the installed packages.",
        "",
        *table(base),
    ]
    for extra, wanted in project["optional-dependencies"].items():
        more = {name: package for name, package in closure(wanted).items() if name not in base}
        lines += ["", f"## Only with the extra `{extra}`", "", *table(more)]
    (DOCS / "licences.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
