"""Files behind http and https URLs, requested with the standard library alone."""

import base64
import http.client
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from data_prep.common.errors import BadInput
from data_prep.remote.transport import Answer, refusal
from data_prep.remote.url import FolderUrl

BLOCK = 2**20
SLOWEST = 1024  # bytes a second; a connection that delivers less counts as cut


class HttpTransport:
    """Files of a web server; follows redirects and uses the proxies of the environment."""

    def __init__(self, url: FolderUrl, timeout: float):
        self._url, self._timeout = url, timeout

    def open(self, file: str, start: int = 0, size: int | None = None) -> AbstractContextManager[Answer]:
        """See `Transport`."""
        return http_get(self.request(file), self._url / file, self._timeout, start)

    def request(self, file: str) -> urllib.request.Request:
        """The request for one of the folder's files, with the user's credentials."""
        request = urllib.request.Request(self._url.full_url(file, user=False))
        if self._url.user is not None:
            credentials = base64.b64encode(":".join(self._url.user).encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {credentials}")  # not sent along a redirect
        return request


def _urlopen(request: urllib.request.Request, timeout: float) -> http.client.HTTPResponse:
    return urllib.request.urlopen(request, timeout=timeout)


@contextmanager
def http_get(
    request: urllib.request.Request,
    url: str,
    timeout: float,
    start: int = 0,
    etag: str | None = None,
    send: Callable[[urllib.request.Request, float], http.client.HTTPResponse] = _urlopen,
) -> Iterator[Answer]:
    """Ask a web server for a file from byte `start` on; a server without range requests sends everything.

    Args:
        request: without a range.
        url: of the file, for messages.
        timeout: seconds without data after which the connection is given up.
        start: bytes to skip.
        etag: version of the file that these bytes belong to; of another version, everything is sent.
        send: performs the request.

    Raises:
        BadInput, OSError: as `Transport.open`.
    """
    request.add_header("User-Agent", "spiketune")
    if start:
        request.add_header("Range", f"bytes={start}-")
        if etag:
            request.add_header("If-Range", etag)
    with network_errors(url):
        response = send(request, timeout)
    with response:
        partial = response.status == http.client.PARTIAL_CONTENT
        surplus = start - _first_byte(response, start) if partial else 0
        tag = response.headers.get("ETag")
        yield Answer(
            blocks=_without_first(surplus, _blocks(response, url, timeout)),
            start=start if partial else 0,
            length=response.length,
            etag=tag if tag and not tag.startswith("W/") else None,  # a weak tag does not identify bytes
        )


@contextmanager
def network_errors(url: str) -> Iterator[None]:
    """Turn the block's errors into those that `Transport.open` documents. The block must not use the disk."""
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        raise refusal(url, error.code, error.headers) from None
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
    """Notices a connection that is too slow: the socket's time-out alone would wait forever for a byte now and then."""

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
    if announced is not None and arrived < announced:  # http.client takes a cut connection for the end of the file
        raise ConnectionResetError(f"the connection was cut after {arrived:,} of {announced:,} bytes")


def _without_first(surplus: int, blocks: Iterator[bytes]) -> Iterator[bytes]:
    for block in blocks:
        if len(block) > surplus:
            yield block[surplus:]
        surplus = max(surplus - len(block), 0)


def _first_byte(response: http.client.HTTPResponse, requested: int) -> int:
    """The position of a partial answer's first byte; servers may start earlier than requested."""
    unit, _, span = response.headers.get("Content-Range", f"bytes {requested}-").partition(" ")
    first = span.partition("-")[0]
    if unit != "bytes" or not first.isdigit() or int(first) > requested:
        raise OSError(f"the server sent another range than bytes {requested}-")
    return int(first)
