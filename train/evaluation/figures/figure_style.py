"""The style that all figures share: size, colours, titles, and how they become files.

matplotlib draws without a display. It is imported only when a figure is drawn, so that other commands start fast.
The colours are those of Okabe and Ito (2008), distinguishable with any colour vision.
"""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FileFormat = Literal["png", "svg", "pdf"]
DPI = 150
LARGEST_PAGE = (16.0, 12.0)  # inches
BLUE, VERMILLION, GREEN, ORANGE, SKY, PURPLE = "#0072b2", "#d55e00", "#009e73", "#e69f00", "#56b4e9", "#cc79a7"
WITHOUT_DATE: dict[FileFormat, dict[str, Any]] = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure; its size is in inches, and at most a page."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (min(width, LARGEST_PAGE[0]), min(height, LARGEST_PAGE[1]))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def finish(figure: "Figure", axes: "Axes", title: str) -> "Figure":
    """Add a title and remove the upper and right border; returns the figure."""
    axes.set_title(escape_formulas(title), fontsize=10, wrap=True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def encode(figure: "Figure", kind: FileFormat = "png") -> bytes:
    """A figure as a file's bytes; the same figure gives the same bytes."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "spiketune", "pdf.fonttype": 42}):
        figure.savefig(buffer, format=kind, metadata=WITHOUT_DATE[kind])
    return buffer.getvalue()


def escape_formulas(text: str) -> str:
    """A text with its dollar signs escaped, so that matplotlib does not typeset it as a formula."""
    return text.replace("$", r"\$")


def shorten(title: str, longest: int = 42) -> str:
    """A title of at most `longest` characters; a longer one loses its middle."""
    return title if len(title) <= longest else f"{title[: longest - 9]}…{title[-8:]}"


def known_scores(per_site: Sequence[float | None]) -> np.ndarray:
    """The sites' scores without the missing ones; a single 0 if all are missing, so that something can be drawn."""
    return np.array([value for value in per_site if value is not None] or [0.0])
