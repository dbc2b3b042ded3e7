"""Reading files behind a URL: http(s) with the standard library alone, everything else through fsspec's drivers.

What is worth asking for again is an OSError (a cut connection, a slow answer, a server that is busy); what is not, a
`BadInput`. Nothing here tries again: that is `data_prep/shards/remote_files.py`'s.
"""

import base64
import http.client
import queue
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from data_prep.common.errors import BadInput
from data_prep.remote.url import FolderUrl

BLOCK = 2**20
PART = 2**22  # of a file that fsspec is asked for at a time: what is lost when a connection is cut
SLOWEST = 1024  # bytes a second; a connection that brings less is as good as cut
INDIRECT = (  # fsspec's drivers that read what a file tells them to, or through another program or driver
    *("reference", "generic", "dask", "jupyter", "jlab", "git", "zip", "tar", "libarchive", "dir", "cached"),
    *("blockcache", "filecache", "simplecache", "asyncwrapper", "local", "data"),
)
WORTH_ASKING_AGAIN = (408, 425, 429)


class RangeRefused(OSError):
    """The file has no such bytes: what was fetched before is not of this file."""


class Transport(Protocol):
    """Reads the files of a folder."""

    def read(self, file: str, start: int, size: int | None) -> Iterator[bytes]:
        """The bytes of a file from `start` on, block by block.

        Args:
            file: its name.
            start: bytes to leave out; as many as the server can be told to.
            size: of the whole file, where it is known.

        Raises:
            BadInput: it is not there, or may not be read.
            OSError: something that may go better another time.
        """
        ...


def transport(url: FolderUrl, timeout: float) -> Transport:
    """How the files behind a URL are read.

    Args:
        url: of the folder.
        timeout: seconds after which a silent connection is given up.

    Raises:
        BadInput: nobody knows how, or a package is missing for it.
    """
    return HttpTransport(url, timeout) if url.scheme in ("http", "https") else FsspecTransport(url, timeout)


def refusal(url: FolderUrl, file: str, status: int) -> BadInput | OSError:
    """What an HTTP status says of a file."""
    if status in (404, 410):
        return BadInput(
            f"{url / file} is not there (HTTP {status}); a URL must be that of a shard folder of data_prep/pack.py, as "
            "tars that others wrote are read on this machine only"
        )
    if status in (401, 403, 407):
        return BadInput(f"{url / file}: no permission to read it (HTTP {status}); are the credentials right?")
    if status == 416:
        return RangeRefused("no such bytes (HTTP 416)")
    if status in WORTH_ASKING_AGAIN or status >= 500:
        return OSError(f"HTTP {status}")
    return BadInput(f"{url / file} cannot be read (HTTP {status})")


# ------------------------------------------------------------------------------------------------------------- http


class _Pace:
    """Notices when too little arrives: a time-out of the socket alone would wait for a byte now and then for ever."""

    def __init__(self, timeout: float):
        self._timeout = timeout
        self._since, self._bytes = time.monotonic(), 0

    def check(self, size: int) -> None:
        """Count `size` bytes that have arrived."""
        self._bytes += size
        if time.monotonic() - self._since > self._timeout:
            if self._bytes < SLOWEST * self._timeout:
                raise TimeoutError(f"{self._bytes:,} bytes in {self._timeout:g} s")
            self._since, self._bytes = time.monotonic(), 0


class HttpTransport:
    """Files of a web server; redirections and the proxies of the environment are followed."""

    def __init__(self, url: FolderUrl, timeout: float):
        self._url, self._timeout = url, timeout

    def read(self, file: str, start: int, size: int | None) -> Iterator[bytes]:
        """See `Transport`; a server that knows no ranges sends everything, and the beginning is dropped."""
        try:
            with urllib.request.urlopen(self._request(file, start), timeout=self._timeout) as answer:
                drop = start if answer.status != 206 else start - _first_byte(answer, start)
                for block in self._blocks(answer):
                    if len(block) > drop:
                        yield block[drop:]
                    drop = max(drop - len(block), 0)
        except urllib.error.HTTPError as error:
            error.close()
            raise refusal(self._url, file, error.code) from None
        except ssl.SSLError as error:
            raise self._of_ssl(file, error) from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLError):
                raise self._of_ssl(file, error.reason) from None
            raise OSError(str(getattr(error.reason, "strerror", None) or error.reason)) from None
        except http.client.HTTPException as error:
            raise OSError(f"the connection broke off ({type(error).__name__})") from None

    def _of_ssl(self, file: str, error: ssl.SSLError) -> BadInput | OSError:
        if isinstance(error, ssl.SSLCertVerificationError):
            return BadInput(f"{self._url / file}: the server's certificate is not trusted ({error.verify_message})")
        return OSError(f"TLS: {error.reason}")

    def _request(self, file: str, start: int) -> urllib.request.Request:
        request = urllib.request.Request(self._url.of(file, user=False))
        request.add_header("User-Agent", "spiketune")
        if start:
            request.add_header("Range", f"bytes={start}-")
        if self._url.user is not None:
            words = base64.b64encode(":".join(self._url.user).encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {words}")  # not for where we are sent to
        return request

    def _blocks(self, answer: http.client.HTTPResponse) -> Iterator[bytes]:
        announced, arrived, pace = answer.length, 0, _Pace(self._timeout)
        while block := answer.read1(BLOCK):
            arrived += len(block)
            pace.check(len(block))
            yield block
        if announced is not None and arrived < announced:  # which http.client takes for the end of the file
            raise ConnectionResetError(f"the connection was cut after {arrived:,} of {announced:,} bytes")


def _first_byte(answer: http.client.HTTPResponse, asked: int) -> int:
    """The byte that a partial answer begins with, which servers are allowed to choose."""
    unit, _, rest = answer.headers.get("Content-Range", f"bytes {asked}-").partition(" ")
    first = rest.partition("-")[0]
    if unit != "bytes" or not first.isdigit() or int(first) > asked:
        raise OSError(f"the server answered with another range than bytes {asked}-")
    return int(first)


# ----------------------------------------------------------------------------------------------------------- fsspec


class FsspecTransport:
    """Files of whatever fsspec has a driver for; the drivers find credentials in their own places."""

    def __init__(self, url: FolderUrl, timeout: float):
        self._url, self._timeout = url, timeout
        _check_driver(url)

    def read(self, file: str, start: int, size: int | None) -> Iterator[bytes]:
        """See `Transport`; without a size the file comes in one part."""
        if size is None:
            yield self._part(file)[start:]
            return
        for first in range(start, size, PART):
            end = min(first + PART, size)
            part = self._part(file, start=first, end=end)
            if len(part) != end - first:
                raise RangeRefused(f"{len(part):,} bytes in place of {end - first:,}")
            yield part

    def _part(self, file: str, **where: int) -> bytes:
        from fsspec.core import url_to_fs

        def read() -> bytes:
            system, path = url_to_fs(self._url.of(file))
            return system.cat_file(path, **where)

        try:
            return _within(self._timeout, read)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise refusal(self._url, file, 404) from None
        except Exception as error:  # every driver has its own
            raise self._meant(file, error) from None

    def _meant(self, file: str, error: Exception) -> BadInput | OSError:
        status = _status(error)
        if isinstance(error, PermissionError) or "credential" in type(error).__name__.lower():
            status = 403
        if isinstance(error, ImportError):
            return _missing(self._url, error)
        if status is not None and status >= 400:
            return refusal(self._url, file, status)
        return OSError(self._url.hide(f"{type(error).__name__}: {error}"))


def _status(error: Exception) -> int | None:
    """The HTTP status in an exception of aiohttp, requests, httpx or a driver of its own."""
    answer = getattr(error, "response", None)
    found = (getattr(error, "status", None), getattr(error, "code", None), getattr(answer, "status_code", None))
    return next((int(value) for value in found if str(value).isdigit()), None)


def _check_driver(url: FolderUrl) -> None:
    from fsspec.registry import get_filesystem_class

    try:
        if url.scheme in INDIRECT:
            raise ValueError
        get_filesystem_class(url.scheme)
    except ValueError:
        raise BadInput(
            f"{url}: {url.scheme}:// is not known; there are https, s3, gs, hf and what fsspec reads"
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


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """What a call returns or raises; it is left alone in its thread when it takes too long.

    Raises:
        TimeoutError: it took longer.
    """
    done: queue.SimpleQueue = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((call(), None))
        except Exception as error:
            done.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        value, error = done.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer in {seconds:g} s") from None
    if error is not None:
        raise error
    return value
