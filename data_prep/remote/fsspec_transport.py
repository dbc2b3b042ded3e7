"""Files behind all other URLs (s3, gs, hf ...), read through fsspec's drivers."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from data_prep.common.errors import BadInput
from data_prep.remote.transport import Answer, FileRefused, RangeRefused, refusal
from data_prep.remote.url import FolderUrl

PART = 2**22  # bytes to read at a time; as much is lost when a connection is cut
INDIRECT = (  # fsspec's drivers that follow references in a file, or go through another program or driver
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


class FsspecTransport:
    """Files of a store that fsspec has a driver for; each driver finds its credentials in its own way."""

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
                raise RangeRefused(f"{len(part):,} bytes instead of {end - first:,}")
            yield part

    def _read(self, file: str, start: int, end: int | None) -> bytes:
        from fsspec.core import url_to_fs

        def read() -> bytes:
            system, path = url_to_fs(self._url.full_url(file))
            return system.cat_file(path, start=start or None, end=end)

        try:
            return _within(self._timeout, read)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise FileRefused(self._url / file, 404) from None
        except Exception as error:  # every driver has its own exceptions
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
    """The HTTP status in an exception of aiohttp, requests, httpx or a driver."""
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

    driver = known_implementations.get(url.scheme, {}).get("class", "")
    package = driver.partition(".")[0]
    if package in ("", "fsspec"):  # one of fsspec's own drivers, which needs another package
        package = getattr(error.__cause__ or error, "name", None) or str(error)
    return BadInput(f"{url}: {url.scheme}:// needs the package {package}: pip install {package}")


def _within(seconds: float, call: Callable[[], bytes]) -> bytes:
    """The result or exception of a call; a call that takes too long is abandoned in its thread.

    Raises:
        TimeoutError: it took longer than `seconds`.
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
