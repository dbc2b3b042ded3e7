"""Progress of long work: a bar on a terminal, plain lines in a log file."""

import sys
import time
from types import TracebackType


def rate_text(per_second: float) -> str:
    """A rate with two digits at least: 1,234, 12, 1.2, 0.012."""
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.2g}"


class Progress:
    """Counts finished items out of a known total.

    On a terminal it draws a bar on standard error. Elsewhere it prints a line every ten seconds, and a last one if
    there was any; quick work is silent.

    Args:
        total: number of items; None if unknown.
        label: what is being done, e.g. "packing".
        unit: name of one item.
        silent: show nothing, as on all ranks but the first.
    """

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, total: int | None, label: str, unit: str = "stimuli", silent: bool = False):
        self.total, self.label, self.unit, self.silent = total, label, unit, silent
        self.done = 0
        self._started = self._last_line = time.monotonic()
        self._printed: int | None = None  # items done when the last line was printed
        self._bar = None
        if sys.stderr.isatty() and not silent:
            from tqdm import tqdm  # here, so that commands that show no bar start faster

            self._bar = tqdm(total=total, desc=label, unit=f" {unit}", dynamic_ncols=True, leave=False)

    def advance(self, by: int = 1, note: str = "") -> None:
        """Count `by` more items as done; `note` is shown after the count."""
        self.done += by
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(by)
        elif not self.silent and time.monotonic() - self._last_line > self.SECONDS_BETWEEN_LINES:
            self._print_line(note)

    def _print_line(self, note: str = "") -> None:
        self._last_line, self._printed = time.monotonic(), self.done
        elapsed = self._last_line - self._started
        total = "" if self.total is None else f"/{self.total}"
        line = f"{self.label}: {self.done}{total} {self.unit}"
        if self.done and elapsed > 0:
            line += f", {rate_text(self.done / elapsed)}/s"
        if note:
            line += f", {note}"
        print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        elif not self.silent and kind is None and self._printed not in (None, self.done):
            self._print_line()
