"""Commands of the project as users start them, in processes of their own, and what they leave.

Such a process is forked from an entry's, which has imported what the command needs and has not touched the GPU or
computed anything; that saves the seconds of a fresh start.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkProcess
from pathlib import Path

from harness import ROOT, last_line


@dataclass
class Started:
    """A command that runs.

    Attributes:
        process: of it.
        log: file of its output.
        began: time.monotonic() when it was started.
        seconds: until it was seen to have ended.
    """

    process: ForkProcess
    log: Path
    began: float
    seconds: float = 0.0

    def wait(self) -> int:
        """Wait until it ends; returns its exit code, negative if a signal killed it."""
        self.process.join()
        if not self.seconds:
            self.seconds = time.monotonic() - self.began
            print(self.said)  # into the log of the entry
        code = self.process.exitcode
        assert code is not None, "a process that was joined has an exit code"
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
        return last_line(self.said)[:300]


def start(words: Sequence[object], log: Path, **environment: str) -> Started:
    """Start `python WORDS` in the root of the repository."""
    arguments = ([str(word) for word in words], log, environment)
    process = multiprocessing.get_context("fork").Process(target=run_script, args=arguments)
    process.start()
    return Started(process, log, time.monotonic())


def run_script(words: list[str], log: Path, environment: dict[str, str]) -> None:
    """In a command's process: run a script as __main__, with its output in a file."""
    with log.open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def signal_when(started: Started, condition: Callable[[], bool], number: signal.Signals) -> bool:
    """Send a signal as soon as a condition holds; returns False if the command ended before."""
    while not condition():
        if not started.process.is_alive():
            return False
        time.sleep(0.01)
    assert started.process.pid is not None, "it was started"
    os.kill(started.process.pid, number)
    return True
