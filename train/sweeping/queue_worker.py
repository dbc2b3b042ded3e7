"""What every worker of a queue does: it takes trials until none is left, and ends when it is asked to."""

import signal
import sys
import time
from collections.abc import Callable, Collection
from types import FrameType
from typing import Any

from data_prep.common.errors import RunFailed
from train.sweeping.queue import Claim, Queue
from train.sweeping.supervised_process import POLL_SECONDS
from train.sweeping.trial import Outcome

HEARTBEATS_UNTIL_STALE = 6
LONGEST_HEARTBEAT = 10.0  # seconds between two
TRIES = 2


class StopRequest:
    """Remembers that this worker was asked to end until it can; a second signal ends it at once."""

    def __init__(self) -> None:
        self._signal = 0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._handlers = {number: signal.signal(number, self._remember) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _remember(self, number: int, _: FrameType | None) -> None:
        self._signal = number
        self.restore_handlers()

    def __exit__(self, *_: object) -> None:
        self.restore_handlers()

    def restore_handlers(self) -> None:
        """Handle signals as before."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """End this worker if it was asked to.

        Raises:
            KeyboardInterrupt: on Ctrl-C.
            SystemExit: 143, on SIGTERM.
        """
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self._signal:
            sys.exit(128 + self._signal)


def take_trials(
    queue: Queue,
    stop: StopRequest,
    run: Callable[[Claim], None],
    runs: Collection[str] | None = None,
    at_most: int | None = None,
) -> list[str]:
    """Run trials until none is left, including those of workers that die meanwhile.

    Args:
        queue: of the trials.
        stop: whether this worker was asked to end.
        run: runs a trial and records how it ended.
        runs: the trials to run; by default all.
        at_most: trials to run to their end; what other workers run is not waited for then.

    Returns:
        The trials that this worker has run to their end.

    Raises:
        RunFailed: the queue, or a trial's files, cannot be written.
    """
    try:
        return _take_trials(queue, stop, run, runs, at_most)
    except OSError as error:
        reason = f"{error.filename or 'the folder of the queue'} cannot be written ({error.strerror})"
        raise RunFailed(f"{reason}; make room, and run the same command again to go on") from None


def _take_trials(
    queue: Queue,
    stop: StopRequest,
    run: Callable[[Claim], None],
    runs: Collection[str] | None,
    at_most: int | None,
) -> list[str]:
    is_waiting = False
    ended: list[str] = []
    while not queue.settled(runs) and len(ended) != at_most:
        stop.check()
        claim = queue.claim(runs)
        if claim is not None:
            is_waiting = False
            run(claim)
            if queue.settled([claim.run]):  # else it will be tried again
                ended.append(claim.run)
            continue
        if at_most is not None:
            break
        if not is_waiting:
            print_line(
                "waiting for other workers; what one that was killed has left is taken over after "
                f"{queue.stale_seconds:g} s"
            )
        is_waiting = True
        _pause(seconds_between_heartbeats(queue.stale_seconds), stop)
    return ended


def record_failure(queue: Queue, claim: Claim, outcome: Outcome, log: str = "") -> None:
    """Leave a trial that did not end well to be tried again, or for good where that would not help.

    Args:
        queue: of the trial.
        claim: of this worker.
        outcome: of the trial.
        log: its file, where the outcome's reason does not name it.
    """
    if outcome.kind == "failed" and claim.failures + 1 < TRIES:
        queue.release(claim, failed=True)
        print_line(f"{claim.run} failed and will be tried again: {outcome.reason}")
        return
    queue.fail(claim, outcome.reason, diverged=outcome.kind == "diverged")
    print_line(f"{claim.run} failed: {outcome.reason}{f' -> {log}' if log else ''}")


def _pause(seconds: float, stop: StopRequest) -> None:
    """Wait until the heartbeats of other workers are worth another look."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        stop.check()
        time.sleep(POLL_SECONDS)


def seconds_between_heartbeats(stale_seconds: float) -> float:
    """How often a worker gives a sign of life.

    Args:
        stale_seconds: without one, after which another worker takes over its trial.
    """
    return min(stale_seconds / HEARTBEATS_UNTIL_STALE, LONGEST_HEARTBEAT)


def print_line(line: str) -> None:
    """Print a line at once, also where standard output is a file."""
    print(line, flush=True)
