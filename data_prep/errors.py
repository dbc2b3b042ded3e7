"""How every command says that its input is bad: one clear sentence and exit code 2."""

import os
import sys
from collections.abc import Callable


class BadInput(Exception):
    """What the user gave cannot be used. The message names the file, the field and what would be right."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main`; bad input ends in one sentence on standard error and exit code 2, without a traceback.

    Under a launcher each process finds the same fault; the lowest one on each machine speaks for all.
    """
    try:
        main()
    except BadInput as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, `head` say, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
