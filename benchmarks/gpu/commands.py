"""Commands of the project in processes of their own, as users start them, and what they leave."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import ROOT


@dataclass
class Started:
    """A command that runs.

    Attributes:
        process: of it.
        log: file of its output.
        began: time.monotonic() when it was started.
        seconds: until it was seen to have ended.
    """

    process: subprocess.Popen
    log: Path
    began: float
    seconds: float = 0.0

    def wait(self) -> int:
        """Wait until it ends; returns its exit code, negative if a signal killed it."""
        code = self.process.wait()
        self.seconds = self.seconds or time.monotonic() - self.began
        return code

    def must_succeed(self) -> None:
        """Wait until it ends.

        Raises:
            RuntimeError: it failed.
        """
        if (code := self.wait()) != 0:
            raise RuntimeError(f"exit code {code}: {self.last_words}")

    @property
    def said(self) -> str:
        """Its output so far."""
        return self.log.read_text(errors="replace")

    @property
    def last_words(self) -> str:
        """Its last line."""
        return next((line.strip()[:300] for line in reversed(self.said.splitlines()) if line.strip()), "")


def start(words: Sequence[object], log: Path, **environment: str) -> Started:
    """Start `python WORDS` in the root of the repository, in the process group of this entry, which ends with it."""
    with log.open("a") as output:
        process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    return Started(process, log, time.monotonic())


def signal_when(started: Started, condition: Callable[[], bool], number: signal.Signals) -> bool:
    """Send a signal as soon as a condition holds; returns False if the command ended before."""
    while not condition():
        if started.process.poll() is not None:
            return False
        time.sleep(0.01)
    started.process.send_signal(number)
    return True
