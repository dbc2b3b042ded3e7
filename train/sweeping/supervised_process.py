"""Run a command that ends when its worker ends, however that happens.

    python -P train/sweeping/supervised_process.py BEAT TOKEN SECONDS LOCK COMMAND ...

A launcher's processes outlive a killed parent: torchrun starts each in a session of its own, and `accelerate launch`
leaves its child behind. So this small supervisor runs between worker and launcher. Its standard input closes when the
worker is gone; it adopts the processes that the launcher leaves behind (PR_SET_CHILD_SUBREAPER), and ends them all.

BEAT is a file that holds TOKEN. It is touched every SECONDS while the command runs, so that other workers know. When it
holds another token, another worker has taken over, and the command is ended. The file descriptor LOCK is a lock on
BEAT which all these processes hold, so that a successor waits until the last of them is gone.
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
def hold_lock(path: Path, check: Callable[[], None]) -> Iterator[int]:
    """Hold the lock on a heartbeat file, which is released once every process that was run under it is gone.

    Args:
        path: of the file, which exists; it is touched while this process waits.
        check: called a few times a second; an exception that it raises ends the waiting.

    Yields:
        The lock's file descriptor.
    """
    with path.open("rb") as file:
        while not locks.try_lock(file.fileno()):
            check()
            os.utime(path)
            time.sleep(POLL_SECONDS)
        yield file.fileno()


def run_supervised(
    command: Sequence[str],
    heartbeat: "Heartbeat",
    lock: int,
    log: Path,
    environment: Mapping[str, str],
    check: Callable[[], None],
) -> int:
    """Run a command under a supervisor and wait for it.

    Args:
        command: its words.
        heartbeat: kept up while it runs.
        lock: from `hold_lock`.
        log: the command's output is appended here.
        environment: of the command.
        check: called a few times a second; an exception that it raises ends the command.

    Returns:
        The command's exit code, 128 + N for signal N; negative where the supervisor itself was killed.
    """
    supervisor = [
        sys.executable,
        "-P",
        __file__,
        str(heartbeat.path),
        heartbeat.token,
        str(heartbeat.seconds),
        str(lock),
    ]
    with log.open("ab") as out:
        process = subprocess.Popen(
            [*supervisor, *command],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=(lock,),
            start_new_session=True,  # Ctrl-C reaches the worker alone, which ends the command in its own way
        )
    try:
        while process.poll() is None:
            check()
            time.sleep(POLL_SECONDS)
        return process.returncode
    finally:
        assert process.stdin is not None  # it was opened as a pipe
        process.stdin.close()
        process.wait()


def seconds_since(paths: Sequence[Path]) -> list[float]:
    """How long ago heartbeat files were touched, by the clock of their file system.

    The clocks of two machines may differ; those of two files in one folder do not. Files are opened, because a network
    file system then asks its server instead of its cache.

    Args:
        paths: files of one folder.

    Returns:
        Seconds for each; infinity where there is no such file.
    """
    if not paths:
        return []
    paths[0].parent.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=paths[0].parent, prefix=".clock.") as clock:
        os.utime(clock.fileno())
        now = os.fstat(clock.fileno()).st_mtime
    return [now - _touched(path) for path in paths]


def _touched(path: Path) -> float:
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return float("-inf")


# ---------------------------------------------------------------------------------------------- the supervisor itself


@dataclass
class Heartbeat:
    """A sign of life: a file that is touched again and again.

    Attributes:
        path: of the file.
        token: what the file holds while the work belongs to this worker.
        seconds: between touches.
    """

    path: Path
    token: str
    seconds: float
    _next: float = 0.0

    def touch(self) -> bool:
        """Touch the file if it is time; returns whether the work still belongs to this worker."""
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


def supervise(command: Sequence[str], heartbeat: Heartbeat, lock: int) -> int:
    """Run a command until it ends, its worker is gone, or another worker has taken over.

    Returns:
        Its exit code, 128 + N for signal N.
    """
    adopt_orphans()
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(lock,))
    try:
        while child.poll() is None:
            worker_is_gone = bool(select.select([sys.stdin], [], [], POLL_SECONDS)[0])
            if worker_is_gone or not heartbeat.touch():
                return 128 + signal.SIGTERM
        return child.returncode if child.returncode >= 0 else 128 - child.returncode
    finally:
        end_descendants()


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies, so that none escapes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants() -> None:
    """End all descendants: first with SIGTERM, after some seconds with SIGKILL."""
    deadline = time.monotonic() + GRACE_SECONDS
    asked: set[psutil.Process] = set()
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
    """Parse and supervise."""
    path, token, seconds, lock, *command = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    return supervise(command, Heartbeat(Path(path), token, float(seconds)), int(lock))


if __name__ == "__main__":
    sys.exit(main())
