"""Downloading one file: resume after a cut connection, retry with growing pauses, verify when complete."""

import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_prep.common.errors import BadInput
from data_prep.remote.transport import Answer, RangeRefused, ServerBusy

LONGEST_PAUSE = 60.0  # seconds between two attempts

Request = Callable[[int, str | None], AbstractContextManager[Answer]]
"""Requests a file from a byte on, in a version (ETag) if that is known; raises as `Transport.open` does."""


@dataclass(frozen=True)
class Retries:
    """When to try again.

    Attributes:
        limit: number of failures in a row to tolerate.
        first_pause: seconds before the second attempt; each further pause is twice as long.
        worthwhile: bytes that an attempt must fetch to reset the count of failures.
        wrong_limit: number of complete downloads with wrong content to tolerate.
    """

    limit: int
    first_pause: float
    worthwhile: int = 1
    wrong_limit: int = 0


class Unreachable(OSError):
    """Too many attempts failed. The message is that of the last error.

    Attributes:
        attempts: number of failed attempts in a row.
    """

    def __init__(self, error: OSError, attempts: int):
        super().__init__(error.strerror or str(error) or type(error).__name__)
        self.attempts = attempts


class WrongContent(Exception):
    """The download is complete but is not the expected file. The message says why."""


class Cancelled(Exception):
    """The file is no longer needed."""


class DiskError(Exception):
    """The disk failed, not the network.

    Attributes:
        error: of the operating system.
    """

    def __init__(self, error: OSError):
        super().__init__(str(error))
        self.error = error


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(error) from None


class PartialFile:
    """The part of a file that has arrived, hashed on arrival.

    Args:
        descriptor: of a file open for reading and writing, which may hold the beginning of an earlier download.
        algorithm: of the hash, for hashlib.
        etag_path: file that records the version the bytes belong to, for later processes; None to record none.

    Attributes:
        size: bytes that have arrived.
        etag: version of the file that they belong to, if known.
        is_joined: whether they came from more than one answer, and so perhaps from different files.
    """

    def __init__(self, descriptor: int, algorithm: str, etag_path: Path | None = None):
        self._descriptor, self._algorithm, self._etag_path = descriptor, algorithm, etag_path
        self._hash, self.size = hashlib.new(algorithm), 0
        while block := os.pread(descriptor, 2**20, self.size):
            self._hash.update(block)
            self.size += len(block)
        self.is_joined = self.size > 0
        self.etag: str | None = None
        if self.size and etag_path is not None and etag_path.exists():
            self.etag = etag_path.read_text()

    @property
    def hexdigest(self) -> str:
        """Hash of the bytes that have arrived, in hexadecimal digits."""
        return self._hash.hexdigest()

    def beginning(self, count: int) -> bytes:
        """The first bytes."""
        return os.pread(self._descriptor, count, 0)

    def append(self, block: bytes) -> None:
        """Add bytes.

        Raises:
            DiskError: they cannot be written.
        """
        rest = memoryview(block)
        with _disk_errors():
            while rest:
                written = os.pwrite(self._descriptor, rest, self.size)
                self._hash.update(rest[:written])
                self.size += written
                rest = rest[written:]

    def restart(self) -> None:
        """Discard the bytes that have arrived."""
        with _disk_errors():
            os.ftruncate(self._descriptor, 0)
        self._hash, self.size, self.is_joined = hashlib.new(self._algorithm), 0, False
        self.remember_etag(None)

    def remember_etag(self, etag: str | None) -> None:
        """Record the version of the file that the bytes belong to."""
        self.etag = etag
        if self._etag_path is None:
            return
        with _disk_errors():
            if etag:
                self._etag_path.write_text(etag)
            else:
                self._etag_path.unlink(missing_ok=True)


class _Attempts:
    """Counts failures in a row, and pauses between attempts."""

    def __init__(self, retries: Retries, report: Callable[[str], None]):
        self._retries, self._report, self._failures = retries, report, 0

    def failed(self, error: OSError, progress: int = 0) -> None:
        """Pause after a failure, for a random time so that not all processes retry at once.

        Args:
            error: that ended the attempt.
            progress: bytes that the attempt fetched nevertheless.

        Raises:
            Unreachable: too many attempts failed in a row.
        """
        self._failures = 1 if progress >= self._retries.worthwhile else self._failures + 1
        failure = Unreachable(error, self._failures)
        if self._failures > self._retries.limit:
            raise failure from None
        pause = self._retries.first_pause * 2 ** (self._failures - 1) * random.uniform(0.5, 1)
        if isinstance(error, ServerBusy):
            pause = max(pause, error.pause)
        pause = min(pause, LONGEST_PAUSE)
        self._report(f"{failure}; trying again in {pause:.2g} s")
        time.sleep(pause)


def _ignore(_: str) -> None:
    pass


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Download:
    """One file to download.

    Attributes:
        request: requests it.
        part: receives it, from where an earlier download ended.
        fault: returns the fault of a complete download, None if it is right.
        retries: when to try again.
        size: of the whole file in bytes, if known.
        report: called with the reason for each retry.
        cancelled: returns whether the file is no longer needed.
    """

    request: Request
    part: PartialFile
    fault: Callable[[PartialFile], str | None]
    retries: Retries
    size: int | None = None
    report: Callable[[str], None] = _ignore
    cancelled: Callable[[], bool] = _never

    def run(self) -> None:
        """Fetch the rest of the file, and check it.

        Raises:
            WrongContent: it is complete but wrong.
            Unreachable: too many attempts failed in a row.
            DiskError: the disk is full.
            Cancelled: it is no longer needed.
            BadInput: the server refuses it.
        """
        wrong = 0
        while True:
            fault = self._complete() or self.fault(self.part)
            if fault is None:
                return
            # Bytes from several answers may belong to different files; those from one answer are what the server has.
            try_again = wrong < self.retries.wrong_limit or (wrong == 0 and self.part.is_joined)
            if not try_again:
                raise WrongContent(fault)
            wrong += 1
            self.report(f"{fault}; downloading the whole file again")
            self.part.restart()

    def _complete(self) -> str | None:
        """Fetch until the server has no more, or sends more than expected.

        Returns:
            A fault if the earlier bytes cannot belong to the server's file, else None.
        """
        attempts = _Attempts(self.retries, self.report)
        while True:
            before = self.part.size
            try:
                self._request_rest()
                return None
            except RangeRefused as error:
                if error.size == self.part.size:  # nothing is missing
                    return None
                return "what arrived earlier does not belong to the file that the server has now"
            except OSError as error:
                attempts.failed(error, self.part.size - before)

    def _request_rest(self) -> None:
        if self.cancelled():
            raise Cancelled
        if self.size is not None and self.part.size >= self.size:
            return
        with self.request(self.part.size, self.part.etag) as answer:
            if answer.start == 0 and self.part.size:  # the server has no ranges, or by now another version of the file
                self.part.restart()
            self.part.is_joined = self.part.size > 0
            self.part.remember_etag(answer.etag)
            for block in answer.blocks:
                if self.cancelled():
                    raise Cancelled
                self.part.append(block)
                if self.size is not None and self.part.size > self.size:
                    return


def read_small_file(request: Request, url: str, largest: int, retries: Retries) -> bytes:
    """Download a file of unknown size and content into memory.

    Args:
        request: requests it.
        url: of it, for messages.
        largest: size limit in bytes.
        retries: when to try again.

    Raises:
        BadInput: it is larger, or the server refuses it.
        Unreachable: too many attempts failed in a row.
    """
    attempts = _Attempts(retries, _ignore)
    while True:
        content = bytearray()
        try:
            with request(0, None) as answer:
                for block in answer.blocks:
                    content += block
                    if len(content) > largest:
                        raise BadInput(f"{url} has more than {largest:,} bytes, too many for such a file")
            return bytes(content)
        except OSError as error:
            attempts.failed(error)
