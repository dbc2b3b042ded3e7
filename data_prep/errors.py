"""How every command says that its input is bad: one clear sentence and exit code 2."""

import os
import sys
from collections.abc import Callable


class BadInput(Exception):
    """What the user gave cannot be used. The message names the file, the field and what would be right.

    Attributes:
        alone: whether only this process can have found it, because each reads other stimuli.
    """

    alone = False


class RunFailed(Exception):
    """The input was fine, and yet the work cannot go on. The message says why and what would help.

    Attributes:
        alone: as above.
    """

    alone = False


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main`; what is known to go wrong ends in one sentence on standard error, without a traceback.

    The exit code is 2 for bad input, 1 for a failure and 130 for Ctrl-C.
    Under a launcher most faults are found by every process; the lowest one on each machine speaks for all.
    """
    try:
        main()
    except (BadInput, RunFailed) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0" or error.alone:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, BadInput) else 1)
    except KeyboardInterrupt:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, `head` say, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
