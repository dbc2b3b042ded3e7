"""Text for a terminal: aligned columns, bars, histograms, bold."""

import re
import sys
from collections.abc import Sequence

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_STYLE = re.compile(r"\x1b\[[0-9;]*m")


def printable(text: str) -> str:
    """A text with its control characters escaped, so that it cannot control the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def bold(text: str) -> str:
    """The text, bold on a terminal and plain in a file."""
    return f"\x1b[1m{text}\x1b[0m" if sys.stdout.isatty() else text


def bar(share: float, width: int = 12) -> str:
    """A bar of `share` of `width` characters, exact to an eighth; of # where blocks cannot be printed."""
    eighths = round(min(max(share, 0), 1) * width * 8)
    text = "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
    if not _can_print(text):
        text = "#" * round(eighths / 8)
    return text.ljust(width)


def histogram(values: Sequence[float], low: float, high: float, bins: int = 20) -> str:
    """The distribution of values between two limits, a block per bin; the outermost bins count values beyond them."""
    counts = [0] * bins
    for value in values:
        index = int((value - low) / (high - low) * bins) if high > low else 0
        counts[min(max(index, 0), bins - 1)] += 1
    text = _blocks(counts, " ▁▂▃▄▅▆▇█")
    return text if _can_print(text) else _blocks(counts, " .:|#")


def _blocks(counts: Sequence[int], levels: str) -> str:
    """A character per count, from the first level for 0 to the last for the largest."""
    largest = max(counts) or 1
    return "".join(levels[-(-count * (len(levels) - 1) // largest)] for count in counts)


def _can_print(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def aligned(rows: Sequence[Sequence[str]], gap: str = "  ") -> list[str]:
    """Rows as lines with aligned columns; columns of numbers are aligned to the right."""
    widths = [max(_width(row[k]) for row in rows) for k in range(len(rows[0]))]
    right = [all(_is_number(row[k]) for row in rows[1:]) for k in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = []
        for cell, width, to_right in zip(row, widths, right, strict=True):
            room = " " * (width - _width(cell))
            cells.append(room + cell if to_right else cell + room)
        lines.append(gap.join(cells).rstrip())
    return lines


def _width(cell: str) -> int:
    return len(_STYLE.sub("", cell))


def _is_number(cell: str) -> bool:
    return bool(re.fullmatch(r"-?[\d,.]*%?", cell))
