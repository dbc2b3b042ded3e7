"""The secrets of a URL are used and never shown."""

import base64

import pytest
from remote_shards import fetch, opened

from data_prep.common.errors import BadInput
from data_prep.remote.http_transport import HttpTransport
from data_prep.remote.url import (
    SIGNED,
    FolderUrl,
    move_secrets_to_environment,
    parse_location,
    public_location,
    without_secrets,
)


def test_secrets_are_sent_and_never_shown(web, packed, cache):
    web.authorization = f"Basic {base64.b64encode(b'me:pass/word').decode()}"
    web.query = "signature=hush&expires=1"
    url = web.url.replace("://", "://me:pass%2Fword@") + "/?signature=hush&expires=1"
    shards = opened(url, cache)
    assert fetch(shards) == (packed / "train-000000.tar").read_bytes()
    web.query = "another"
    assert repr(shards.folder) == "FolderUrl()"
    for thing in (
        str(shards.folder),
        shards.folder / "x.tar",
        public_location(url),
        *without_secrets([url, f"--data={url}"]),
    ):
        assert web.url in thing
        assert not any(secret in thing for secret in ("me:", "pass", "hush"))
    with pytest.raises(BadInput, match="permission denied") as caught:
        fetch(shards, 1)
    assert "hush" not in str(caught.value)
    assert FolderUrl(url).hide(f"cannot read {url}/x: hush?") == f"cannot read {FolderUrl(url).hide(url)}/x: hush?"
    assert "hush" not in FolderUrl(url).hide(url)
    assert "word" not in FolderUrl(url).hide(url)


def test_child_processes_inherit_secrets(monkeypatch):
    secret = "https://me:word@host/folder?signature=hush"
    monkeypatch.setenv(SIGNED, "")
    shown = move_secrets_to_environment(secret)
    assert shown == "https://host/folder"
    assert parse_location(shown).text == secret
    assert parse_location("https://host/other").text == "https://host/other"
    assert move_secrets_to_environment("some/folder") == "some/folder"


def test_secrets_do_not_follow_redirects(packed, cache):
    request = HttpTransport(FolderUrl("https://me:word@host/folder"), 1).request("a.tar")
    assert request.full_url == "https://host/folder/a.tar"
    assert "Authorization" in request.unredirected_hdrs
    assert "Authorization" not in request.headers
