"""Which processes hold a file without a name, so that others can open it: one small file lists them.

The kernel frees such a file when the last process that has it open ends, in whatever way. A process that starts later
opens it through /proc/PID/fd/FD of one that has it open.
"""

import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_prep.common import locks

KEY_BYTES = 64  # at the start of every listed file, to recognise it


class Holders:
    """The list of the processes that have caches open, as lines "KEY PID FD"; its file stays locked meanwhile.

    Args:
        path: of the file.
        file: its descriptor; None where it cannot be used, and nothing is shared.
    """

    def __init__(self, path: Path, file: int | None):
        self._path, self._file = path, file
        text = b"" if file is None else os.pread(file, os.fstat(file).st_size, 0)
        # A process that was killed while it wrote the list may have left half a line.
        lines = re.findall(rb"^([0-9a-f]{64}) ([0-9]+) ([0-9]+)\n", text, re.MULTILINE)
        self._lines = [(key.decode(), int(pid), int(descriptor)) for key, pid, descriptor in lines]

    def open(self, key: str) -> int | None:
        """A new descriptor of the cache of these images; None where no process has it open."""
        for name, pid, descriptor in self._lines:
            if name == key and (ours := _open_of(key, pid, descriptor)) is not None:
                return ours
        return None

    def add(self, key: str, descriptor: int) -> None:
        """List this process."""
        self._write([*self._valid_lines(), (key, os.getpid(), descriptor)])

    def remove(self, pid: int, descriptor: int) -> None:
        """Remove a process from the list."""
        self._write([line for line in self._valid_lines() if line[1:] != (pid, descriptor)])

    def _valid_lines(self) -> Iterator[tuple[str, int, int]]:
        """The lines that are still true: a process that was killed could not remove its own."""
        for line in self._lines:
            if (ours := _open_of(*line)) is not None:
                os.close(ours)
                yield line

    def _write(self, lines: list[tuple[str, int, int]]) -> None:
        if self._file is None:
            return
        if not lines:
            self._path.unlink()
            return
        text = "".join(f"{key} {pid} {descriptor}\n" for key, pid, descriptor in lines).encode()
        with suppress(OSError):  # a full file system; the only consequence is that nothing more is shared
            os.pwrite(self._file, text, 0)
            os.ftruncate(self._file, len(text))


def _open_of(key: str, pid: int, descriptor: int) -> int | None:
    """Open another process's descriptor if it still is the cache of these images."""
    path = f"/proc/{pid}/fd/{descriptor}"
    with suppress(OSError):
        if stat.S_ISREG(os.stat(path).st_mode):  # the number may have been reused, for a pipe for instance
            ours = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            if os.pread(ours, KEY_BYTES, 0) == key.encode():
                return ours
            os.close(ours)
    return None


@contextmanager
def listed_holders() -> Iterator[Holders]:
    """Lock the list, which is created when it is needed and removed with its last line."""
    path = _list_path()
    file = _locked(path)
    try:
        yield Holders(path, file)
    finally:
        if file is not None:
            os.close(file)


def _list_path() -> Path:
    memory = Path("/dev/shm")  # of this machine alone; a temporary folder may be on a network
    folder = memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    return folder / f"spiketune-{os.getuid()}.holders"


def _locked(path: Path) -> int | None:
    """Open and lock a file of this user; None where it belongs to another user, and nothing can be shared."""
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError:
            return None
        locks.lock(file)
        is_ours = os.fstat(file).st_uid == os.getuid()
        with suppress(FileNotFoundError):
            if is_ours and os.path.samestat(os.fstat(file), path.stat()):
                return file
        os.close(file)  # removed by another process while we waited for the lock
        if not is_ours:
            return None
