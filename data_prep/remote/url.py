"""The location of a shard folder: a local path, or a URL, which is never shown with its secrets."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import url2pathname

from data_prep.common.errors import BadInput

SIGNED = "SPIKETUNE_SIGNED_URL"
"""The environment variable that can hold a URL with its secrets, so that no command line has to."""


@dataclass(frozen=True)
class FolderUrl:
    """The URL of a shard folder.

    A user and a password before the host, and everything after a `?` such as a signature, belong to every file's URL.
    They are hidden wherever the URL is shown or written; `str` gives the URL without them.

    Args:
        text: as given by the user.
    """

    text: str = field(repr=False)

    @property
    def _split(self) -> SplitResult:
        return urlsplit(self.text, allow_fragments=False)

    @property
    def scheme(self) -> str:
        """The part before ://, in lower case."""
        return self._split.scheme

    @property
    def host(self) -> str:
        """The part between :// and the path, with user and password."""
        return self._split.netloc

    @property
    def path(self) -> str:
        """The path on the host."""
        return self._split.path

    @property
    def user(self) -> tuple[str, str] | None:
        """User and password, if the URL has them."""
        split = self._split
        return None if split.username is None else (unquote(split.username), unquote(split.password or ""))

    @property
    def has_secrets(self) -> bool:
        """Whether it has parts that must not be shown."""
        return "@" in self._split.netloc or bool(self._split.query)

    def __str__(self) -> str:
        return self._shown(self._split.path.rstrip("/"))

    def __truediv__(self, file: str) -> str:
        """The URL of one of the folder's files, without secrets."""
        return self._shown(f"{self._split.path.rstrip('/')}/{file}")

    def _shown(self, path: str) -> str:
        return self._split._replace(netloc=self._split.netloc.rpartition("@")[2], path=path, query="").geturl()

    def full_url(self, file: str, user: bool = True) -> str:
        """The URL of one of the folder's files, with its secrets; without user and password if `user` is False."""
        split = self._split
        netloc = split.netloc if user else split.netloc.rpartition("@")[2]
        return split._replace(netloc=netloc, path=f"{split.path.rstrip('/')}/{file}").geturl()

    def hide(self, message: str) -> str:
        """Another library's message with the URL's secrets masked."""
        split = self._split
        user, at, _ = split.netloc.rpartition("@")
        secrets = [user + at, user, split.query, *split.query.split("&"), split.password or ""]
        for secret in sorted(filter(None, secrets), key=len, reverse=True):
            message = message.replace(secret, "***").replace(unquote(secret), "***")
        return message


def is_url(location: object) -> bool:
    """Whether a text is a URL."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*:(:.+)?//", str(location)) is not None


def parse_location(location: Path | str | FolderUrl) -> Path | FolderUrl:
    """The location of a shard folder, as given by a user: a path, also for file://, or a URL.

    Raises:
        BadInput: a URL that no shard folder can have.
    """
    if isinstance(location, FolderUrl):
        return location
    if not is_url(location):
        return Path(location)
    url = FolderUrl(str(location))
    if "::" in url.text.partition("/")[0]:
        raise BadInput(
            f"{url.text.partition('/')[0]}...: chained URLs are not supported; give the shard folder's own URL"
        )
    if url.scheme == "file":
        return Path(url2pathname(url.path))
    if not url.host:
        raise BadInput(f"{url} has no host or bucket; a URL looks like https://HOST/FOLDER or s3://BUCKET/FOLDER")
    signed = FolderUrl(os.environ.get(SIGNED, ""))
    return signed if not url.has_secrets and str(signed) == str(url) else url


def public_location(location: Path | str | FolderUrl) -> str:
    """A location as it may be written to files: a URL without secrets, an absolute path."""
    location = parse_location(location)
    return str(location) if isinstance(location, FolderUrl) else str(location.resolve())


def without_secrets(words: Iterable[str]) -> list[str]:
    """The words of a command line without the secrets of URLs."""
    shown = []
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        shown.append(f"{option}{equals}{FolderUrl(value)}" if is_url(value) else word)
    return shown


def move_secrets_to_environment(location: str) -> str:
    """A location for the command lines of child processes, which anyone can read; they inherit its secrets."""
    url = parse_location(location)
    if isinstance(url, FolderUrl) and url.has_secrets:
        os.environ[SIGNED] = url.text
        return str(url)
    return location
