"""Extract the commands and examples of README.md and docs/ as a reader would copy them."""

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
    """A command quoted on a page.

    Attributes:
        page: file that quotes it.
        text: the command, with continuation lines joined and the comment removed.
    """

    page: Path
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}: {self.text}"

    def words(self, keep_optional: bool = True) -> list[str]:
        """The words of the command, with or without its optional part in brackets; an ellipsis is dropped."""
        text = (
            re.sub(r"\[([^\]']*)\]", r" \1 " if keep_optional else " ", self.text)
            if ".[" not in self.text
            else self.text
        )
        return [word for word in shlex.split(text) if word != "..."]


def commands() -> list[Command]:
    """All commands of all pages, in order."""
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
    """The fenced code blocks of a language on a page of docs/."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
