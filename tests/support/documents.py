"""The commands and examples in README.md and docs/, as a reader would copy them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from helpers import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BEGINNING = re.compile(r"([A-Z_]+=\S+ )*(python|bash|pip|tensorboard|torchrun|accelerate|sbatch|launch/\w+\.sh)\s")
INLINE = re.compile(r"`((?:python |bash |pip |tensorboard |(?:train/|data_prep/)?\w+\.py )[^`]*)`")


@dataclass(frozen=True)
class Command:
    """A command in a text.

    Attributes:
        page: where it stands.
        text: as it stands there, lines joined and the comment cut off.
    """

    page: Path
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}: {self.text}"

    def words(self, keep_optional: bool = True) -> list[str]:
        """Its words, with or without what stands in brackets; an ellipsis is no word."""
        text = (
            re.sub(r"\[([^\]']*)\]", r" \1 " if keep_optional else " ", self.text)
            if ".[" not in self.text
            else self.text
        )
        return [word for word in shlex.split(text) if word != "..."]


def commands() -> list[Command]:
    """All of them, in order."""
    return list(dict.fromkeys(Command(page, text) for page in PAGES for text in _of_page(page.read_text())))


def _of_page(text: str) -> Iterator[str]:
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("    ") and BEGINNING.match(line.strip()):
            following = lines[number + 1] if number + 1 < len(lines) else ""
            continuation = following.strip() if following.startswith(" " * 8) and line[4] != " " else ""
            yield re.sub(r"\s+# .*", "", f"{line.strip()} {continuation}".strip())
        yield from INLINE.findall(line)


def fenced(page: str, language: str) -> list[str]:
    """The examples in a language on a page of docs/."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
