"""Run a command that ends with the worker that asked for it, whatever ends that worker.

    python -P train/sweeping/supervised_process.py BEAT TOKEN SECONDS LOCK COMMAND ...

A launcher's processes outlive a killed parent: torchrun starts each in a session of its own, and `accelerate launch`
leaves its child behind. So a worker puts this small process between. It sees its standard input close when the worker
is gone, however that happened; it adopts what the launcher leaves behind (PR_SET_CHILD_SUBREAPER) and ends it all.

BEAT is a file that holds TOKEN. While the command runs it is touched every SECONDS, so that others see that it runs;
when it holds another token, the work has been given to somebody else, and the command is ended. The file descriptor
LOCK is a lock on BEAT that all of them hold together, so that a successor waits until the last of them is gone.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from data_prep.common import locks

GRACE_SECONDS = 5.0
POLL_SECONDS = 0.2
PR_SET_CHILD_SUBREAPER = 36  # from linux/prctl.h


# ------------------------------------------------------------------------------------------- what the worker calls


@contextmanager
def turn(beat: Path, check: Callable[[], None]) -> Iterator[int]:
    """Hold the lock on a beat file, which frees itself when all that was run under it is gone.

    Args:
        beat: the file; it exists. It is touched while one waits.
        check: called a few times a second; what it raises ends the waiting, and then passes on.
    """
    with beat.open("rb") as file:
        while not locks.try_lock(file.fileno()):
            check()
            os.utime(beat)
            time.sleep(POLL_SECONDS)
        yield file.fileno()


def run_kept(
    command: Sequence[str], beat: "Beat", lock: int, log: Path, environment: Mapping[str, str], check: Callable
) -> int:
    """Run a command through a keeper and wait for it.

    Args:
        command: its words.
        beat: how it shows that it runs.
        lock: from `turn`.
        log: what the command prints is added here.
        environment: of the command.
        check: called a few times a second; what it raises ends the command, and then passes on.

    Returns:
        The command's exit code, 128 + N for signal N; negative where the keeper itself was killed.
    """
    keeper = [sys.executable, "-P", __file__, str(beat.path), beat.token, str(beat.seconds), str(lock)]
    with log.open("ab") as out:
        process = subprocess.Popen(
            [*keeper, *command],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=(lock,),
            start_new_session=True,  # a Ctrl-C is for the worker, which ends the command in its own way
        )
    try:
        while process.poll() is None:
            check()
            time.sleep(POLL_SECONDS)
        return process.returncode
    finally:
        process.stdin.close()
        process.wait()


def seconds_since(beats: Sequence[Path]) -> list[float]:
    """How long ago beat files were touched, by the clock of the file system that holds them.

    The clocks of two machines may differ; those of two files in one folder do not. Files are opened, because a network
    file system then asks its server instead of its cache.

    Args:
        beats: files of one folder.

    Returns:
        Seconds for each; infinity where there is no such file.
    """
    if not beats:
        return []
    beats[0].parent.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=beats[0].parent, prefix=".clock.") as clock:
        os.utime(clock.fileno())
        now = os.fstat(clock.fileno()).st_mtime
    return [now - _touched(beat) for beat in beats]


def _touched(beat: Path) -> float:
    try:
        with beat.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return float("-inf")


# -------------------------------------------------------------------------------------------------- the keeper itself


@dataclass
class Beat:
    """A sign of life: a file that is touched now and then.

    Attributes:
        path: of the file.
        token: what it holds as long as the work is this one's.
        seconds: between touches.
    """

    path: Path
    token: str
    seconds: float
    _next: float = 0.0

    def touch(self) -> bool:
        """Touch the file if it is time; returns whether the work is still this one's."""
        if time.monotonic() < self._next:
            return True
        self._next = time.monotonic() + self.seconds
        try:
            if self.path.read_text() != self.token:
                return False
            os.utime(self.path)
        except FileNotFoundError:
            return False
        return True


def keep(command: Sequence[str], beat: Beat, lock: int) -> int:
    """Run a command until it ends, or until it is no longer wanted.

    Returns:
        Its exit code, 128 + N for signal N.
    """
    adopt_orphans()
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(lock,))
    try:
        while child.poll() is None:
            worker_is_gone = bool(select.select([sys.stdin], [], [], POLL_SECONDS)[0])
            if worker_is_gone or not beat.touch():
                return 128 + signal.SIGTERM
        return child.returncode if child.returncode >= 0 else 128 - child.returncode
    finally:
        end_descendants()


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies, so that none is lost sight of."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants() -> None:
    """End all processes below this one: asked first, killed after some seconds."""
    deadline = time.monotonic() + GRACE_SECONDS
    asked = set()
    while living := psutil.Process().children(recursive=True):
        for process in living:
            with suppress(psutil.Error):
                if time.monotonic() > deadline:
                    process.kill()
                elif process not in asked:
                    asked.add(process)
                    process.terminate()
        psutil.wait_procs(living, timeout=0.1)


def main() -> int:
    """Parse and keep."""
    path, token, seconds, lock, *command = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    return keep(command, Beat(Path(path), token, float(seconds)), int(lock))


if __name__ == "__main__":
    sys.exit(main())
