"""What the transports of files behind URLs have in common: their interface and their errors.

An error that a retry may fix (a cut connection, a slow or busy server) is an OSError; anything else is a BadInput.
Nothing here retries: data_prep/remote/downloader.py does.
"""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from email.message import Message
from typing import Protocol

from data_prep.common.errors import BadInput

RETRIABLE_STATUSES = (408, 425, 429)  # of HTTP, and all from 500 on
NO_HEADERS = Message()

_DENIED = "cannot be read: permission denied; check the credentials"
_EXPLANATIONS = {
    401: _DENIED,
    403: _DENIED,
    404: "does not exist",
    407: _DENIED,
    410: "does not exist any more",
}


class FileRefused(BadInput):
    """The server refuses the file, and a retry would not help.

    Attributes:
        status: of HTTP, or its equivalent.
    """

    def __init__(self, url: str, status: int):
        self.status = status
        super().__init__(f"{url} {_EXPLANATIONS.get(status, 'cannot be read')} (HTTP {status})")


class RangeRefused(OSError):
    """The file does not have the requested bytes: those that were fetched earlier belong to another file.

    Attributes:
        size: bytes of the file, if the server states it.
    """

    def __init__(self, message: str, size: int | None = None):
        super().__init__(message)
        self.size = size


class ServerBusy(OSError):
    """The server is busy.

    Attributes:
        pause: seconds to wait, as the server asks; 0 if it does not.
    """

    def __init__(self, message: str, pause: float):
        super().__init__(message)
        self.pause = pause


@dataclass(frozen=True)
class Answer:
    """The server's answer: a file, or the rest of it, as it arrives.

    Attributes:
        blocks: the bytes.
        start: position of the first byte in the file: the requested one, or 0.
        length: bytes to come, if the server states it.
        etag: version of the file, for later requests; None if the server gives none.
    """

    blocks: Iterator[bytes]
    start: int
    length: int | None = None
    etag: str | None = None


class Transport(Protocol):
    """Requests files of one folder."""

    def open(self, file: str, start: int = 0, size: int | None = None) -> AbstractContextManager[Answer]:
        """Ask for a file.

        Args:
            file: its name.
            start: bytes to skip, if the server supports it.
            size: of the whole file, if known.

        Raises:
            BadInput: it does not exist or must not be read.
            OSError: a retry may succeed; also raised by `Answer.blocks`.
        """
        ...


def refusal(url: str, status: int, headers: Message = NO_HEADERS) -> BadInput | OSError:
    """The error for the file at `url` that an HTTP status and its headers stand for."""
    if status == 416:
        size = re.match(r"bytes \*/(\d+)", headers.get("Content-Range", ""))
        return RangeRefused("no such bytes (HTTP 416)", int(size[1]) if size else None)
    if status in RETRIABLE_STATUSES or status >= 500:
        pause = headers.get("Retry-After", "")
        return ServerBusy(f"HTTP {status}", float(pause) if pause.isdigit() else 0.0)
    return FileRefused(url, status)
