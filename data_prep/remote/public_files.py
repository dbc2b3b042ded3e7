"""Downloading the files of public data sets into a folder, for data_prep/fetch.py.

An incomplete file is kept as `<name>.part`, and the version that it belongs to (the server's ETag) as
`<name>.part.etag`. The file gets its name when it is complete and its checksum is right.
"""

import errno
import hashlib
import html.parser
import http.client
import http.cookiejar
import os
import re
import shutil
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.common import locks
from data_prep.common.errors import BadInput, RunFailed
from data_prep.common.progress import Progress
from data_prep.remote.datasets import RemoteFile
from data_prep.remote.downloader import DiskError, Download, PartialFile, Retries, Unreachable, WrongContent
from data_prep.remote.http_transport import http_get
from data_prep.remote.transport import Answer, FileRefused

MEGABYTE = 10**6
LARGEST_PAGE = 2**20  # bytes that are read of an HTML page
DISK_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
LONGEST_SIGNATURE = 16  # bytes

# First bytes of files with these endings; a file that begins differently is a web page, a pointer, or damaged.
SIGNATURES = {
    ".h5": (b"\x89HDF",),
    ".nc": (b"\x89HDF", b"CDF"),
    ".mat": (b"MATLAB", b"\x89HDF"),
    ".zip": (b"PK",),
}


@dataclass(frozen=True)
class PublicFiles:
    """Downloads files of public data sets.

    Attributes:
        mirror: URL (http or https) of a folder with all files under their paths; None for the publishers' URLs.
        retries: failures in a row that are tolerated for a file.
        timeout: seconds without data after which a connection is given up.
        first_pause: seconds before the first retry; each further pause is twice as long.
        report: called with progress messages.
    """

    mirror: str | None = None
    retries: int = 5
    timeout: float = 60.0
    first_pause: float = 1.0
    report: Callable[[str], None] = print

    def __post_init__(self) -> None:
        if self.mirror is not None and not re.match(r"https?://[^/]", self.mirror):
            raise BadInput(f"--mirror must begin with http:// or https:// and name a server, not {self.mirror!r}")

    def fetch(self, file: RemoteFile, folder: Path) -> Path:
        """Download a file unless it exists, resuming an earlier download.

        Raises:
            BadInput: it cannot be written there, or another file of that name exists.
            RunFailed: it cannot be downloaded; the part that arrived is kept for the next attempt.
        """
        target = folder / file.path
        if target.exists():
            _check_existing(target, file)
            self.report(f"{target} already exists")
            return target
        try:
            with _open_part(target) as part:
                self._download(file, target, part)
        except (OSError, DiskError) as failure:
            error = failure.error if isinstance(failure, DiskError) else failure
            if error.errno in DISK_FULL:
                raise RunFailed(
                    f"no space left for {target}; the part that arrived is kept; free some space and run it again"
                ) from None
            raise BadInput(f"{target} cannot be written ({error.strerror or error}); choose another --out") from None
        return target

    def _download(self, file: RemoteFile, target: Path, part: PartialFile) -> None:
        url, part_path, browser = self._url(file), _part_path(target), _Browser()

        @contextmanager
        def request(start: int, etag: str | None) -> Iterator[Answer]:
            with http_get(urllib.request.Request(url), url, self.timeout, start, etag, browser.send) as answer:
                _check_space(answer, file, part_path.parent)
                yield replace(answer, blocks=_with_progress(answer, file.path))

        def fault(part: PartialFile) -> str | None:
            return _fault(part.beginning(LONGEST_SIGNATURE), part.hexdigest, file)

        def report(text: str) -> None:
            self.report(f"{file.path}: {text}")

        try:
            Download(request, part, fault, Retries(self.retries, self.first_pause), report=report).run()
        except Unreachable as error:
            raise RunFailed(
                f"{url}: {error} ({error.attempts} attempts failed in a row); the part that arrived is kept: run the "
                "command again later"
            ) from None
        except FileRefused as error:
            raise RunFailed(f"{error}; it may have moved (give another copy with --mirror)") from None
        except WrongContent as wrong:
            aside = target.with_name(target.name + ".unverified")
            part_path.rename(aside)
            raise RunFailed(f"{url}: {wrong}; it was kept as {aside}") from None
        part_path.rename(target)

    def _url(self, file: RemoteFile) -> str:
        if self.mirror is None:
            return file.url
        return f"{self.mirror.rstrip('/')}/{urllib.parse.quote(file.path)}"


def _part_path(target: Path) -> Path:
    return target.with_name(target.name + ".part")


@contextmanager
def _open_part(target: Path) -> Iterator[PartialFile]:
    """The part of a file that has arrived, locked against other processes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    path = _part_path(target)
    etag_path = path.with_name(path.name + ".etag")
    descriptor = locks.open_lock(path)
    try:
        if not locks.try_lock(descriptor):
            raise BadInput(f"{path} is being downloaded by another process; wait until it is done")
        part = PartialFile(descriptor, "sha1", etag_path)
        try:
            yield part
        finally:
            if part.size == 0:  # nothing to resume
                path.unlink(missing_ok=True)
            if not path.exists():
                etag_path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _check_existing(target: Path, file: RemoteFile) -> None:
    with target.open("rb") as content:
        beginning = content.read(LONGEST_SIGNATURE)
        content.seek(0)
        sha1 = hashlib.file_digest(content, "sha1").hexdigest() if file.sha1 else ""
    if fault := _fault(beginning, sha1, file):
        raise BadInput(f"{target} already exists, but {fault}; remove it to download it again")


def _fault(beginning: bytes, sha1: str, file: RemoteFile) -> str | None:
    """What is wrong with a complete file, or None."""
    ending = Path(file.path).suffix
    signatures = SIGNATURES.get(ending, ())
    if signatures and not beginning.startswith(signatures):
        return f"it is not an {ending} file (it begins with {beginning!r})"
    if file.sha1 and sha1 != file.sha1:
        return f"its sha1 is {sha1}, not {file.sha1} as published: it is damaged or another version"
    return None


def _check_space(answer: Answer, file: RemoteFile, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if answer.length is not None and answer.length > free:
        raise RunFailed(
            f"no space for {file.path}: it needs another {answer.length / 1e9:,.2f} GB, and {folder} has "
            f"{free / 1e9:,.2f} GB free"
        )


def _with_progress(answer: Answer, name: str) -> Iterator[bytes]:
    label = f"{name}, from {answer.start / MEGABYTE:,.0f} MB on" if answer.start else name
    megabytes = None if answer.length is None else -(-answer.length // MEGABYTE)
    arrived = 0
    with Progress(megabytes, label, "MB") as progress:
        for block in answer.blocks:
            yield block
            arrived += len(block)
            progress.advance(-(-arrived // MEGABYTE) - progress.done)


# ----------------------------------------------------------------------------------- pages instead of the file


class _Browser:
    """Sends requests, and confirms the page that Google Drive shows instead of a large file."""

    def __init__(self) -> None:
        cookies = urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar())
        self._opener = urllib.request.build_opener(cookies)

    def send(self, request: urllib.request.Request, timeout: float) -> http.client.HTTPResponse:
        """The server's answer that contains the file itself."""
        response = self._opener.open(request, timeout=timeout)
        if not _is_page(response):
            return response
        url = request.full_url
        with response:
            page = response.read(LARGEST_PAGE).decode("utf-8", "replace")
            confirmation = _Form.address(page)
            if confirmation is None:
                raise _page_instead_of_file(url, page)
            address = urllib.parse.urljoin(response.url, confirmation)
        if urllib.parse.urlsplit(address).scheme not in ("http", "https"):
            raise RunFailed(f"{url} answered with a page that leads to {address}, which is not a web address")
        response = self._opener.open(urllib.request.Request(address, headers=request.headers), timeout=timeout)
        if _is_page(response):
            with response:
                raise _page_instead_of_file(url, response.read(LARGEST_PAGE).decode("utf-8", "replace"))
        return response


def _is_page(response: http.client.HTTPResponse) -> bool:
    return response.headers.get_content_type() == "text/html"


def _page_instead_of_file(url: str, page: str) -> RunFailed:
    title = re.search(r"<title[^>]*>(.*?)</title>", page, re.DOTALL | re.IGNORECASE)
    shown = f" ({' '.join(title[1].split())[:80]!r})" if title else ""
    return RunFailed(
        f"{url} answered with a web page{shown} instead of the file; open it in a browser to see what it asks for, or "
        "download the file by hand"
    )


class _Form(html.parser.HTMLParser):
    """The form that Google Drive shows before a file that is too large for its virus scan: "download anyway"."""

    def __init__(self) -> None:
        super().__init__()
        self.action: str | None = None
        self.fields: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """See `HTMLParser`."""
        attributes = {name: value or "" for name, value in attrs}
        if tag == "form" and attributes.get("id") == "download-form":
            self.action = attributes.get("action")
        elif tag == "input" and self.action is not None and attributes.get("type") == "hidden":
            self.fields[attributes.get("name", "")] = attributes.get("value", "")

    @classmethod
    def address(cls, page: str) -> str | None:
        """The URL that submitting the form requests; None if the page has no such form."""
        form = cls()
        form.feed(page)
        if not form.action:
            return None
        if not form.fields:
            return form.action
        separator = "&" if "?" in form.action else "?"
        return f"{form.action}{separator}{urllib.parse.urlencode(form.fields)}"
