"""Downloading a file over HTTP so that it is there whole or not at all, and a broken download goes on.

What has come so far lies in `<name>.part`, and the version of the file that it is a part of (the server's ETag) in
`<name>.part.etag`; the file gets its name when all of it is there and its checksum is right.
"""

import errno
import hashlib
import html.parser
import http.client
import http.cookiejar
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from data_prep.common import locks
from data_prep.common.errors import BadInput, RunFailed
from data_prep.common.progress import Progress
from data_prep.remote.datasets import RemoteFile

BLOCK = 2**20  # bytes
MEGABYTE = 10**6
LONGEST_PAUSE = 60.0  # seconds between two tries
LARGEST_PAGE = 2**20  # bytes that are read of an HTML page
NO_SPACE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)

# How files begin that end in these; anything else under that name is a page, a pointer or damaged.
BEGINNINGS = {
    ".h5": (b"\x89HDF",),
    ".nc": (b"\x89HDF", b"CDF"),
    ".mat": (b"MATLAB", b"\x89HDF"),
    ".zip": (b"PK",),
}


class _Later(Exception):
    """It did not work this time and may work the next; `pause` is how long the server asks to wait, in seconds."""

    def __init__(self, reason: str, pause: float = 0.0):
        super().__init__(reason)
        self.pause = pause


@dataclass
class Downloader:
    """Downloads files, one at a time.

    Attributes:
        mirror: an http(s) folder to take all files from, under their paths; None for where they were published.
        retries: how many times in a row a file may fail to come on.
        timeout: seconds of silence after which a connection is given up.
        first_pause: seconds before the first new try; each further one waits twice as long.
        say: where to tell what happens.
    """

    mirror: str | None = None
    retries: int = 5
    timeout: float = 60.0
    first_pause: float = 1.0
    say: Callable[[str], None] = print

    def __post_init__(self) -> None:
        if self.mirror is not None and not re.match(r"https?://[^/]", self.mirror):
            raise BadInput(f"--mirror must begin with http:// or https:// and name a server, not {self.mirror!r}")
        cookies = urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar())
        self._opener = urllib.request.build_opener(cookies)
        self._opener.addheaders = [("User-Agent", "spiketune-fetch")]

    def fetch(self, file: RemoteFile, folder: Path) -> Path:
        """Download a file unless it is there, going on where an earlier try ended.

        Raises:
            BadInput: it cannot be written there, or a file of that name is there that is another one.
            RunFailed: it cannot be had; what came of it stays for the next try.
        """
        target = folder / file.path
        if target.exists():
            _check_existing(target, file)
            self.say(f"{target} is there already")
            return target
        try:
            with _part_of(target) as part:
                self._download(file, part, target)
        except OSError as error:
            if error.errno in NO_SPACE:
                raise RunFailed(
                    f"no space left for {target}; what has come stays, so make room and run it again"
                ) from None
            raise BadInput(f"{target} cannot be written ({error.strerror or error}); choose another --out") from None
        return target

    # --- one file

    def _download(self, file: RemoteFile, part: "_Part", target: Path) -> None:
        self._until_whole(file, part)
        fault = _fault(part.path, file)
        if fault and part.joined:
            self.say(f"{file.path}: {fault}; it was put together from parts, so it is downloaded anew")
            part.restart()
            self._until_whole(file, part)
            fault = _fault(part.path, file)
        if fault:
            part.finish(aside := target.with_name(target.name + ".unverified"))
            raise RunFailed(f"{self._url(file)}: {fault}; it was put aside as {aside}")
        part.finish(target)

    def _until_whole(self, file: RemoteFile, part: "_Part") -> None:
        failures = 0
        while True:
            before = part.size
            try:
                self._once(self._url(file), part, file.path)
                return
            except _Later as trouble:
                failures = failures + 1 if part.size <= before else 1
                if failures > self.retries:
                    raise RunFailed(
                        f"{self._url(file)}: {trouble}, {failures} times in a row; what has come stays, "
                        "so run it again later"
                    ) from None
                pause = min(max(self.first_pause * 2 ** (failures - 1), trouble.pause), LONGEST_PAUSE)
                self.say(f"{file.path}: {trouble}; trying again in {pause:g} s")
                time.sleep(pause)

    def _once(self, url: str, part: "_Part", name: str) -> None:
        """One request for what is missing; raises _Later where another may do better."""
        with self._open(url, part) as answer:
            if answer.status == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                if _whole_size(answer) != part.size:
                    part.restart()
                    raise _Later("what was there does not belong to the file that the server has now")
                return
            if answer.status != http.client.PARTIAL_CONTENT:
                part.restart()  # the server ignores Range, or has another version by now
            elif _range_start(answer) != part.size:
                part.restart()
                raise _Later("the server sent another part than the one that was asked for")
            else:
                part.joined = True
            part.belongs_to(answer.headers.get("ETag"))
            self._receive(answer, part, name)

    def _open(self, url: str, part: "_Part", confirmed: bool = False) -> http.client.HTTPResponse:
        request = urllib.request.Request(url)
        if part.size:
            request.add_header("Range", f"bytes={part.size}-")
            if part.etag:
                request.add_header("If-Range", part.etag)
        with _network_trouble():
            try:
                answer = self._opener.open(request, timeout=self.timeout)
            except urllib.error.HTTPError as error:
                answer = _refusal(error, url)
        if answer.headers.get_content_type() != "text/html":
            return answer
        with answer, _network_trouble():
            page = answer.read(LARGEST_PAGE).decode("utf-8", "replace")
            form = _Form.of(page)
            if form is None or confirmed:
                raise RunFailed(
                    f"{url} answered with a web page{_title(page)} instead of the file; open it in a browser to see "
                    "what it asks for, and put the file where it belongs by hand"
                )
            confirmation = urllib.parse.urljoin(answer.url, form)
        if urllib.parse.urlsplit(confirmation).scheme not in ("http", "https"):
            raise RunFailed(f"{url} answered with a page that leads to {confirmation}, which is no web address")
        return self._open(confirmation, part, confirmed=True)

    def _receive(self, answer: http.client.HTTPResponse, part: "_Part", name: str) -> None:
        missing = int(length) if (length := answer.headers.get("Content-Length", "")).isdigit() else None
        if missing is not None and missing > (free := shutil.disk_usage(part.path.parent).free):
            raise RunFailed(
                f"no space for {name}: {missing / 1e9:,.2f} GB are still to come, {free / 1e9:,.2f} GB are free in "
                f"{part.path.parent}"
            )
        label = name if not part.size else f"{name}, from {part.size / MEGABYTE:,.0f} MB on"
        came = 0
        with Progress(None if missing is None else -(-missing // MEGABYTE), label, "MB") as progress:
            while block := _block(answer):
                part.append(block)
                came += len(block)
                progress.advance(-(-came // MEGABYTE) - progress.done)
        if missing is not None and came < missing:
            raise _Later(f"the connection ended {(missing - came) / MEGABYTE:,.1f} MB too early")

    def _url(self, file: RemoteFile) -> str:
        if self.mirror is None:
            return file.url
        return f"{self.mirror.rstrip('/')}/{urllib.parse.quote(file.path)}"


# -------------------------------------------------------------------------------------------------- what has come


class _Part:
    """What has come of a file, open for more; nobody else can be at it."""

    def __init__(self, path: Path, file: IO[bytes]):
        self.path, self._file = path, file
        self._etag_path = path.with_name(path.name + ".etag")
        self.size = file.seek(0, 2)
        self.joined = False  # from several answers
        self.etag = self._etag_path.read_text() if self.size and self._etag_path.exists() else None

    def append(self, block: bytes) -> None:
        """Write and count what came. Unbuffered, so that a full disk is noticed here and not when closing."""
        view = memoryview(block)
        while view:
            written = self._file.write(view)
            self.size += written
            view = view[written:]

    def belongs_to(self, etag: str | None) -> None:
        """Remember the version of the file; a weak ETag ("W/...") does not tell bytes apart."""
        self.etag = etag if etag and not etag.startswith("W/") else None
        if self.etag:
            self._etag_path.write_text(self.etag)
        else:
            self._etag_path.unlink(missing_ok=True)

    def restart(self) -> None:
        """Throw away what has come."""
        self._file.seek(0)
        self._file.truncate()
        self.size, self.etag, self.joined = 0, None, False
        self._etag_path.unlink(missing_ok=True)

    def finish(self, target: Path) -> None:
        """Give the file its name."""
        self._etag_path.unlink(missing_ok=True)
        self.path.rename(target)


@contextmanager
def _part_of(target: Path) -> Iterator[_Part]:
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.with_name(target.name + ".part")
    with path.open("ab", buffering=0) as file:
        if not locks.try_lock(file.fileno()):
            raise BadInput(f"{path} is being downloaded by another process; wait for it")
        part = _Part(path, file)
        try:
            yield part
        finally:
            if part.size == 0:  # nothing to go on with
                part.restart()
                path.unlink(missing_ok=True)


def _check_existing(target: Path, file: RemoteFile) -> None:
    if fault := _fault(target, file):
        raise BadInput(f"{target} is there already, but {fault}; remove it to download it again")


def _fault(path: Path, file: RemoteFile) -> str | None:
    """What is wrong with a whole file, or None."""
    with path.open("rb") as content:
        begins = content.read(16)
        known = BEGINNINGS.get(Path(file.path).suffix, ())
        if known and not begins.startswith(known):
            return f"it is no {Path(file.path).suffix} file (it begins with {begins!r})"
        content.seek(0)
        if file.sha1 and (found := hashlib.file_digest(content, "sha1").hexdigest()) != file.sha1:
            return f"its sha1 is {found}, not {file.sha1} as published: it is damaged or another version"
    return None


# ------------------------------------------------------------------------------------------------------- answers


def _block(answer: http.client.HTTPResponse) -> bytes:
    """What has arrived, without waiting for more; b"" at the end."""
    with _network_trouble():
        return answer.read1(BLOCK)


@contextmanager
def _network_trouble() -> Iterator[None]:
    """What a network does to a connection is worth another try. No disk may be touched in the block."""
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        text = "no answer in time" if isinstance(reason, TimeoutError) else str(reason) or type(reason).__name__
        raise _Later(text) from None


def _refusal(error: urllib.error.HTTPError, url: str) -> http.client.HTTPResponse:
    """An answer other than success: 416 is one to look at, some are worth another try, the others are final."""
    if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
        return error
    with error:
        if error.code >= 500 or error.code in (http.client.REQUEST_TIMEOUT, http.client.TOO_MANY_REQUESTS):
            asked = error.headers.get("Retry-After", "")
            raise _Later(f"the server answered {error.code} {error.reason}", float(asked) if asked.isdigit() else 0.0)
        raise RunFailed(
            f"{url}: the server answered {error.code} {error.reason}; the file may have moved (a copy of it elsewhere "
            "can be named with --mirror)"
        )


def _range_start(answer: http.client.HTTPResponse) -> int | None:
    found = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
    return int(found.group(1)) if found else None


def _whole_size(answer: http.client.HTTPResponse) -> int | None:
    found = re.match(r"bytes \*/(\d+)", answer.headers.get("Content-Range", ""))
    return int(found.group(1)) if found else None


class _Form(html.parser.HTMLParser):
    """The form that Google Drive shows before a file that is too large for its virus scan: "download anyway"."""

    def __init__(self) -> None:
        super().__init__()
        self.action: str | None = None
        self.fields: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        if tag == "form" and found.get("id") == "download-form":
            self.action = found.get("action")
        elif tag == "input" and self.action is not None and found.get("type") == "hidden":
            self.fields[found.get("name", "")] = found.get("value", "")

    @classmethod
    def of(cls, page: str) -> str | None:
        """The address that sending the form asks for; None where there is no such form."""
        form = cls()
        form.feed(page)
        if not form.action:
            return None
        joint = "&" if "?" in form.action else "?"
        return form.action + (joint + urllib.parse.urlencode(form.fields) if form.fields else "")


def _title(page: str) -> str:
    found = re.search(r"<title[^>]*>(.*?)</title>", page, re.DOTALL | re.IGNORECASE)
    return f" ({' '.join(found.group(1).split())[:80]!r})" if found else ""
