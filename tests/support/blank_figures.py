"""Blank files in place of figures that no test looks at: drawing one takes a third of a second, in each of its formats.

All code up to matplotlib's drawing runs. Commands in processes of their own draw what they always draw.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

DRAW = Figure.savefig


def _blank_png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    return file.getvalue()


BLANK = {"png": _blank_png(), "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>', "pdf": b"%PDF-1.4\n%%EOF\n"}


def _save_blank(figure: Figure, file: io.BytesIO | Path, **options: Any) -> None:
    """Only what a command draws in memory is blank, not what benchmarks and notebooks save as a file."""
    if isinstance(file, io.BytesIO):
        file.write(BLANK[options["format"]])
    else:
        DRAW(figure, file, **options)


@contextmanager
def blank_figures() -> Iterator[None]:
    """Figures that are saved are blank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", _save_blank)
        yield


@contextmanager
def drawn_figures() -> Iterator[None]:
    """Figures are drawn, within `blank_figures`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", DRAW)
        yield
