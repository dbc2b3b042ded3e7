"""A Markdown page of the results, also of a check that did not come to its end."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from harness import number, table

from gpu.results import FAILED, MEASURED, OUT_OF_TIME, PASSED, SKIPPED, Result

HIDDEN = ("losses",)  # values that are in the file only


def page(results: Sequence[Result]) -> str:
    """All results, part by part, with what failed first."""
    counts = Counter(result.outcome for result in results)
    summary = ", ".join(f"{counts[outcome]} {outcome}" for outcome in (PASSED, MEASURED, FAILED, SKIPPED, OUT_OF_TIME))
    sections = [f"{title(results)}\n\n{len(results)} entries: {summary}"]
    failed = [result for result in results if result.outcome == FAILED]
    if failed:
        sections.append(
            "## Failed\n\n" + "\n".join(f"- {result.part}: {result.entry}: {result.message}" for result in failed)
        )
    parts = dict.fromkeys(result.part for result in results)
    sections += [f"## {part}\n\n{part_table([r for r in results if r.part == part])}" for part in parts]
    return "\n\n".join(sections) + "\n"


def title(results: Sequence[Result]) -> str:
    """The device and the versions, if the check came as far as finding them out."""
    facts = next((result.values for result in results if (result.part, result.entry) == ("device", "facts")), {})
    words = [str(facts[name]) for name in ("device",) if name in facts]
    words += [f"{name} {facts[name]}" for name in ("torch", "CUDA", "python") if name in facts]
    return ", ".join(words) or "unknown device"


def part_table(results: Sequence[Result]) -> str:
    """The entries of a part, a row each."""
    rows = [["entry", "outcome", "s", "found"]]
    for result in results:
        found = "; ".join(f"{name} {shown(value)}" for name, value in result.values.items() if name not in HIDDEN)
        words = [word for word in (result.message, found) if word]
        rows.append([result.entry, result.outcome, f"{result.seconds:.1f}", cell(". ".join(words))])
    return table(rows)


def shown(value: Any) -> str:
    """A value in a table."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return str(value) if isinstance(value, int) else number(value)


def cell(text: str) -> str:
    """Text that cannot break a table."""
    return " ".join(text.split()).replace("|", "/")
