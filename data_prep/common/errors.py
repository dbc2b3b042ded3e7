"""How every command says that its input is bad: one clear sentence and exit code 2."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from data_prep.common.terminal import printable

BAD_INPUT, FAILURE, INTERRUPTED = 2, 1, 130
DIVERGED = "the training diverged: "  # begins the sentence of a failure that trying again would not help
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command, started again, goes on


class BadInput(Exception):
    """What the user gave cannot be used. The message names the file, the field and what would be right.

    Attributes:
        alone: whether only this process can have found it, because each reads other stimuli.
    """

    alone = False


class Stopped(Exception):
    """The work was told to stop before it was done; what is needed to go on is saved. The message says by what."""


class RunFailed(Exception):
    """The input was fine, and yet the work cannot go on. The message says why and what would help.

    Attributes:
        alone: as of `BadInput`.
    """

    alone = False


class CannotWrite(RunFailed):
    """A file could not be written.

    Attributes:
        reason: in the words of the operating system, e.g. "No space left on device".
    """

    def __init__(self, path: Path, error: OSError):
        self.reason = error.strerror or str(error)
        super().__init__(f"{path} cannot be written ({self.reason})")


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main`; what is known to go wrong ends in one sentence on standard error, without a traceback.

    The exit code is 2 for bad input, 1 for a failure, 75 for work that was told to stop and 130 for Ctrl-C.
    Under a launcher most faults are found by every process; the lowest one on each machine speaks for all.
    """
    try:
        main()
    except (BadInput, RunFailed) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0" or error.alone:
            print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
        sys.exit(BAD_INPUT if isinstance(error, BadInput) else FAILURE)
    except Stopped as stop:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{stop}; the same command goes on (see docs/recovering.md)", file=sys.stderr, flush=True)
        sys.exit(STOPPED)
    except KeyboardInterrupt:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print("interrupted", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of our output, `head` say, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
