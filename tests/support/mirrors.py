"""A mirror of a public recording on this machine, which fetch.py is told to use."""

import functools
import hashlib
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from make_field_files import make_cowley2023

from data_prep.remote import datasets


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, and logs nothing."""

    def log_message(self, *_):
        pass


@contextmanager
def cowley_mirror(folder: Path, monkeypatch: pytest.MonkeyPatch, images: int) -> Iterator[str]:
    """Serve one small session; the catalogue lists its files alone, with their checksums.

    Args:
        folder: for the files.
        monkeypatch: changes the catalogue.
        images: of the session.

    Yields:
        the URL for --mirror.
    """
    make_cowley2023(folder, n=images)
    known = datasets.DATASETS["cowley2023"]
    files = tuple(
        replace(file, url="https://example.invalid/", sha1=hashlib.sha1((folder / file.path).read_bytes()).hexdigest())
        for file in known.files
        if "210325" in file.path
    )
    assert len(files) == 3
    monkeypatch.setitem(datasets.DATASETS, "cowley2023", replace(known, files=files))
    handler = functools.partial(_QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
