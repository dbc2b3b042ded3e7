"""Requests for files behind URLs: http(s) with the standard library alone, everything else through fsspec's drivers.

A failure that another attempt may mend (a cut connection, a slow or busy server) is an OSError; anything else is a
BadInput. Nothing here tries again: data_prep/remote/downloader.py does.
"""

import base64
import http.client
import queue
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from data_prep.common.errors import BadInput
from data_prep.remote.url import FolderUrl

BLOCK = 2**20
PART = 2**22  # bytes that fsspec is asked for at a time: what is lost when a connection is cut
SLOWEST = 1024  # bytes a second; a connection that delivers less counts as cut
INDIRECT = (  # fsspec's drivers that read what a file tells them to, or through another program or driver
    "asyncwrapper",
    "blockcache",
    "cached",
    "dask",
    "data",
    "dir",
    "filecache",
    "generic",
    "git",
    "jlab",
    "jupyter",
    "libarchive",
    "local",
    "reference",
    "simplecache",
    "tar",
    "zip",
)
WORTH_ANOTHER_ATTEMPT = (408, 425, 429)  # and all from 500 on


class FileRefused(BadInput):
    """The server does not hand out the file, now or later.

    Attributes:
        status: of HTTP, or its equivalent.
    """

    def __init__(self, url: str, status: int):
        self.status = status
        explanations = {404: "does not exist", 410: "does not exist any more"}
        explanations |= dict.fromkeys((401, 403, 407), "cannot be read: permission denied; check the credentials")
        super().__init__(f"{url} {explanations.get(status, 'cannot be read')} (HTTP {status})")


class RangeRefused(OSError):
    """The file does not have the bytes that were asked for: what was fetched before belongs to another file.

    Attributes:
        size: bytes of the file, where the server says.
    """

    def __init__(self, message: str, size: int | None = None):
        super().__init__(message)
        self.size = size


class ServerBusy(OSError):
    """The server is busy and says for how long.

    Attributes:
        pause: seconds to wait.
    """

    def __init__(self, message: str, pause: float):
        super().__init__(message)
        self.pause = pause


@dataclass(frozen=True)
class Answer:
    """A file, or the rest of it, on its way.

    Attributes:
        blocks: the bytes.
        start: position in the file of the first of them: the one that was asked for, or 0.
        length: bytes that are to come, where the server says.
        etag: version of the file by which a later request can refer to it; None where there is none.
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
            start: bytes to leave out, if the server can do that.
            size: of the whole file, where it is known.

        Raises:
            BadInput: it does not exist or may not be read.
            OSError: another attempt may succeed; also raised by `Answer.blocks`.
        """
        ...


def transport(url: FolderUrl, timeout: float) -> Transport:
    """The transport for a URL.

    Args:
        url: of the folder.
        timeout: seconds after which a silent connection is given up.

    Raises:
        BadInput: the scheme is unknown, or a package for it is missing.
    """
    return HttpTransport(url, timeout) if url.scheme in ("http", "https") else FsspecTransport(url, timeout)


def refusal(url: str, status: int) -> BadInput | OSError:
    """The error that an HTTP status means for the file at `url`."""
    if status == 416:
        return RangeRefused("no such bytes (HTTP 416)")
    if status in WORTH_ANOTHER_ATTEMPT or status >= 500:
        return OSError(f"HTTP {status}")
    return FileRefused(url, status)


# ------------------------------------------------------------------------------------------------------------- http


class HttpTransport:
    """Files of a web server; redirections and the proxies of the environment are followed."""

    def __init__(self, url: FolderUrl, timeout: float):
        self._url, self._timeout = url, timeout

    def open(self, file: str, start: int = 0, size: int | None = None) -> AbstractContextManager[Answer]:
        """See `Transport`."""
        return http_get(self.request(file), self._url / file, self._timeout, start)

    def request(self, file: str) -> urllib.request.Request:
        """The request for one of the folder's files, with the user's credentials."""
        request = urllib.request.Request(self._url.of(file, user=False))
        if self._url.user is not None:
            credentials = base64.b64encode(":".join(self._url.user).encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {credentials}")  # not for where a redirect leads
        return request


@contextmanager
def http_get(
    request: urllib.request.Request,
    url: str,
    timeout: float,
    start: int = 0,
    etag: str | None = None,
    send: Callable[[urllib.request.Request, float], http.client.HTTPResponse] | None = None,
) -> Iterator[Answer]:
    """Ask a web server for a file from byte `start` on; a server that knows no ranges sends everything.

    Args:
        request: without a range.
        url: of the file, for messages.
        timeout: seconds after which a silent connection is given up.
        start: bytes to leave out.
        etag: version of the file that these belong to; of any other, everything is sent.
        send: performs the request; by default urllib.

    Raises:
        BadInput, OSError: as `Transport.open`.
    """
    request.add_header("User-Agent", "spiketune")
    if start:
        request.add_header("Range", f"bytes={start}-")
        if etag:
            request.add_header("If-Range", etag)
    with network_errors(url):
        response = (send or _urlopen)(request, timeout)
    with response:
        partial = response.status == http.client.PARTIAL_CONTENT
        surplus = start - _first_byte(response, start) if partial else 0
        tag = response.headers.get("ETag")
        yield Answer(
            blocks=_without_first(surplus, _blocks(response, url, timeout)),
            start=start if partial else 0,
            length=response.length,
            etag=tag if tag and not tag.startswith("W/") else None,  # a weak one does not identify bytes
        )


def _urlopen(request: urllib.request.Request, timeout: float) -> http.client.HTTPResponse:
    return urllib.request.urlopen(request, timeout=timeout)


@contextmanager
def network_errors(url: str) -> Iterator[None]:
    """Turn errors of the block into those that `Transport.open` documents. The block must not touch a disk."""
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            size = re.match(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
            raise RangeRefused("no such bytes (HTTP 416)", int(size[1]) if size else None) from None
        pause = error.headers.get("Retry-After", "")
        failure = refusal(url, error.code)
        if isinstance(failure, OSError) and pause.isdigit():
            failure = ServerBusy(str(failure), float(pause))
        raise failure from None
    except ssl.SSLError as error:
        raise _tls_failure(url, error) from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLError):
            raise _tls_failure(url, error.reason) from None
        if isinstance(error.reason, TimeoutError):
            raise TimeoutError("no answer in time") from None
        raise OSError(str(getattr(error.reason, "strerror", None) or error.reason)) from None
    except TimeoutError:
        raise TimeoutError("no answer in time") from None
    except http.client.HTTPException as error:
        raise OSError(f"the connection broke ({type(error).__name__})") from None


def _tls_failure(url: str, error: ssl.SSLError) -> BadInput | OSError:
    if isinstance(error, ssl.SSLCertVerificationError):
        return BadInput(f"{url}: the server's certificate is not trusted ({error.verify_message})")
    return OSError(f"TLS: {error.reason}")


class _Pace:
    """Notices when too little arrives: the socket's time-out alone would wait forever for a byte now and then."""

    def __init__(self, timeout: float):
        self._timeout = timeout
        self._since, self._bytes = time.monotonic(), 0

    def check(self, size: int) -> None:
        """Count `size` bytes that have arrived."""
        self._bytes += size
        if time.monotonic() - self._since > self._timeout:
            if self._bytes < SLOWEST * self._timeout:
                raise OSError(f"only {self._bytes:,} bytes in {self._timeout:g} s")
            self._since, self._bytes = time.monotonic(), 0


def _blocks(response: http.client.HTTPResponse, url: str, timeout: float) -> Iterator[bytes]:
    announced, arrived, pace = response.length, 0, _Pace(timeout)
    while True:
        with network_errors(url):
            block = response.read1(BLOCK)
        if not block:
            break
        arrived += len(block)
        pace.check(len(block))
        yield block
    if announced is not None and arrived < announced:  # http.client takes this for the end of the file
        raise ConnectionResetError(f"the connection was cut after {arrived:,} of {announced:,} bytes")


def _without_first(surplus: int, blocks: Iterator[bytes]) -> Iterator[bytes]:
    for block in blocks:
        if len(block) > surplus:
            yield block[surplus:]
        surplus = max(surplus - len(block), 0)


def _first_byte(response: http.client.HTTPResponse, requested: int) -> int:
    """The byte that a partial answer begins with; servers may choose an earlier one than was asked for."""
    unit, _, span = response.headers.get("Content-Range", f"bytes {requested}-").partition(" ")
    first = span.partition("-")[0]
    if unit != "bytes" or not first.isdigit() or int(first) > requested:
        raise OSError(f"the server answered with another range than bytes {requested}-")
    return int(first)


# ----------------------------------------------------------------------------------------------------------- fsspec


class FsspecTransport:
    """Files of whatever fsspec has a driver for; the drivers find credentials in their own places."""

    def __init__(self, url: FolderUrl, timeout: float):
        self._url, self._timeout = url, timeout
        _check_driver(url)

    @contextmanager
    def open(self, file: str, start: int = 0, size: int | None = None) -> Iterator[Answer]:
        """See `Transport`; without a size the file comes in one block."""
        if size is None:
            yield Answer(iter([self._read(file, start, None)]), start)
        else:
            yield Answer(self._parts(file, start, size), start, size - start)

    def _parts(self, file: str, start: int, size: int) -> Iterator[bytes]:
        for first in range(start, size, PART):
            end = min(first + PART, size)
            part = self._read(file, first, end)
            if len(part) != end - first:
                raise RangeRefused(f"{len(part):,} bytes in place of {end - first:,}")
            yield part

    def _read(self, file: str, start: int, end: int | None) -> bytes:
        from fsspec.core import url_to_fs

        def read() -> bytes:
            system, path = url_to_fs(self._url.of(file))
            return system.cat_file(path, start=start or None, end=end)

        try:
            return _within(self._timeout, read)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise FileRefused(self._url / file, 404) from None
        except Exception as error:  # every driver has its own
            raise self._failure(file, error) from None

    def _failure(self, file: str, error: Exception) -> BadInput | OSError:
        status = _status(error)
        if isinstance(error, PermissionError) or "credential" in type(error).__name__.lower():
            status = 403
        if isinstance(error, ImportError):
            return _missing(self._url, error)
        if status is not None and status >= 400:
            return refusal(self._url / file, status)
        return OSError(self._url.hide(f"{type(error).__name__}: {error}"))


def _status(error: Exception) -> int | None:
    """The HTTP status in an exception of aiohttp, requests, httpx or a driver of its own."""
    response = getattr(error, "response", None)
    candidates = (getattr(error, "status", None), getattr(error, "code", None), getattr(response, "status_code", None))
    return next((int(value) for value in map(str, candidates) if value.isdigit()), None)


def _check_driver(url: FolderUrl) -> None:
    from fsspec.registry import get_filesystem_class

    try:
        if url.scheme in INDIRECT:
            raise ValueError
        get_filesystem_class(url.scheme)
    except ValueError:
        raise BadInput(
            f"{url}: {url.scheme}:// is not known; use https, s3, gs, hf or another scheme that fsspec reads"
        ) from None
    except ImportError as error:
        raise _missing(url, error) from None


def _missing(url: FolderUrl, error: ImportError) -> BadInput:
    from fsspec.registry import known_implementations

    package = (
        known_implementations[url.scheme]["class"].partition(".")[0] if url.scheme in known_implementations else ""
    )
    if package in ("", "fsspec"):  # a driver of fsspec's own, which needs another package
        package = getattr(error.__cause__ or error, "name", None) or str(error)
    return BadInput(f"{url}: {url.scheme}:// needs the package {package}: pip install {package}")


def _within(seconds: float, call: Callable[[], bytes]) -> bytes:
    """What a call returns or raises; when it takes too long it is left alone in its thread.

    Raises:
        TimeoutError: it took longer.
    """
    results: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put(call())
        except Exception as error:
            results.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        result = results.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer in {seconds:g} s") from None
    if isinstance(result, Exception):
        raise result
    return result
