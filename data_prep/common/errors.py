"""The errors that every command reports as one clear sentence and an exit code."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from data_prep.common.process_identity import speaks
from data_prep.common.terminal import printable

BAD_INPUT, FAILURE, INTERRUPTED = 2, 1, 130
DIVERGED = "the training diverged: "  # starts the message of a failure that a retry would not fix
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: running the same command again continues the work
SECONDS_FOR_REPORT = 10  # by which the first process of a machine may lag behind the others


class BadInput(Exception):
    """The user's input cannot be used. The message names the file, the field and what would be right.

    Attributes:
        on_one_rank: whether only this rank can have noticed the error, because each rank reads different stimuli.
    """

    on_one_rank = False


class Stopped(Exception):
    """The work was interrupted by a signal or a limit and can be resumed. The message names the cause."""


class RunFailed(Exception):
    """The input is fine, but the work cannot continue. The message says why and what would help.

    Attributes:
        on_one_rank: as in `BadInput`.
    """

    on_one_rank = False


class CannotWrite(RunFailed):
    """A file could not be written.

    Attributes:
        reason: in the words of the operating system, e.g. "No space left on device".
    """

    def __init__(self, path: Path, error: OSError):
        self.reason = error.strerror or str(error)
        super().__init__(f"{path} cannot be written ({self.reason})")


def run_command(main: Callable[[], None], *, on_ranks: bool = False) -> None:
    """Run a command's `main` and report its expected errors in one sentence on standard error, without a traceback.

    The exit code is 2 for bad input, 1 for a failure, 75 for interrupted work and 130 for Ctrl-C.

    Args:
        main: parses the command line and works.
        on_ranks: whether a launcher starts several processes of this command. All of them notice most errors; the
            first process of each machine reports them.
    """
    reports = not on_ranks or speaks()
    try:
        main()
    except (BadInput, RunFailed) as error:
        if reports or error.on_one_rank:
            print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
        else:
            # Launchers stop all processes as soon as one has ended, also the one that reports.
            time.sleep(SECONDS_FOR_REPORT)
        sys.exit(BAD_INPUT if isinstance(error, BadInput) else FAILURE)
    except Stopped as stop:
        if reports:
            print(f"{stop}; the same command continues (see docs/recovering.md)", file=sys.stderr, flush=True)
        sys.exit(STOPPED)
    except KeyboardInterrupt:
        if reports:
            print("interrupted", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of our output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
