"""Where a shard folder is: a folder of this machine, or a URL, which is never shown with the secrets in it."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import url2pathname

from data_prep.common.errors import BadInput

SIGNED = "SPIKETUNE_SIGNED_URL"
"""The variable of the environment that may hold a URL with its secrets, so that no command line has to."""


@dataclass(frozen=True)
class FolderUrl:
    """The URL of a shard folder.

    A user and a password before the host and everything behind a `?` (a signature, say) belong to every file's URL and
    are hidden wherever the URL is shown or recorded; `str` gives what may be shown.

    Args:
        text: as the user gave it.
    """

    text: str = field(repr=False)

    @property
    def _parts(self) -> SplitResult:
        return urlsplit(self.text, allow_fragments=False)

    @property
    def scheme(self) -> str:
        """What stands before the ://, in lower case."""
        return self._parts.scheme

    @property
    def user(self) -> tuple[str, str] | None:
        """User and password, where the URL has them."""
        parts = self._parts
        return None if parts.username is None else (unquote(parts.username), unquote(parts.password or ""))

    @property
    def has_secrets(self) -> bool:
        """Whether something of it must not be shown."""
        return "@" in self._parts.netloc or bool(self._parts.query)

    def __str__(self) -> str:
        return self._shown(self._parts.path.rstrip("/"))

    def __truediv__(self, file: str) -> str:
        """The URL of one of the folder's files, as it may be shown."""
        return self._shown(f"{self._parts.path.rstrip('/')}/{file}")

    def _shown(self, path: str) -> str:
        return self._parts._replace(netloc=self._parts.netloc.rpartition("@")[2], path=path, query="").geturl()

    def of(self, file: str, user: bool = True) -> str:
        """The URL of one of the folder's files, with its secrets; without user and password where `user` is False."""
        parts = self._parts
        netloc = parts.netloc if user else parts.netloc.rpartition("@")[2]
        return parts._replace(netloc=netloc, path=f"{parts.path.rstrip('/')}/{file}").geturl()

    def hide(self, message: str) -> str:
        """A message of somebody else's without the URL's secrets."""
        parts = self._parts
        user, at, _ = parts.netloc.rpartition("@")
        secrets = [user + at, user, parts.query, *parts.query.split("&"), parts.password or ""]
        for secret in sorted(filter(None, secrets), key=len, reverse=True):
            message = message.replace(secret, "***").replace(unquote(secret), "***")
        return message


def is_url(place: object) -> bool:
    """Whether a text is a URL."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*:(:.+)?//", str(place)) is not None


def parse_location(place: Path | str | FolderUrl) -> Path | FolderUrl:
    """What a user gave for a shard folder, as a path or as a URL; of file:// as a path.

    Raises:
        BadInput: a URL that no shard folder can have.
    """
    if isinstance(place, FolderUrl) or not is_url(place):
        return place if isinstance(place, FolderUrl) else Path(place)
    url = FolderUrl(str(place))
    if "::" in url.text.partition("/")[0]:
        raise BadInput(f"{url.text.partition('/')[0]}...: chained URLs are not read; give the shard folder's own URL")
    if url.scheme == "file":
        return Path(url2pathname(url._parts.path))
    if not url._parts.netloc:
        raise BadInput(f"{url}: names no host or bucket; a URL looks like https://HOST/FOLDER or s3://BUCKET/FOLDER")
    signed = FolderUrl(os.environ.get(SIGNED, ""))
    return signed if not url.has_secrets and str(signed) == str(url) else url


def recorded(place: Path | str | FolderUrl) -> str:
    """A place as it may be written down: a URL without secrets, a path in full."""
    place = parse_location(place)
    return str(place) if isinstance(place, FolderUrl) else str(place.resolve())


def without_secrets(words: Iterable[str]) -> list[str]:
    """The words of a command line, with URLs as they may be written down."""
    shown = []
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        shown.append(f"{option}{equals}{FolderUrl(value)}" if is_url(value) else word)
    return shown


def passed_on(place: str) -> str:
    """A place for the command lines of processes to start, which everybody can read: they inherit the secrets."""
    found = parse_location(place)
    if isinstance(found, FolderUrl) and found.has_secrets:
        os.environ[SIGNED] = found.text
        return str(found)
    return place
