"""Downloads of public files survive every network failure that a local server can imitate."""

import hashlib
import http.server
import os
import re
import resource
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
from helpers import assert_refused, run_command, run_here, succeed_here

from data_prep.common.errors import BadInput, RunFailed
from data_prep.common.progress import Progress
from data_prep.pack import parse_options
from data_prep.remote import datasets
from data_prep.remote.datasets import DATASETS, Dataset, RemoteFile
from data_prep.remote.public_files import PublicFiles

DATA = b"\x89HDF\r\n\x1a\n" + np.random.default_rng(0).bytes(300_000)
SHA1 = hashlib.sha1(DATA).hexdigest()
ETAG = '"first"'


class Play(http.server.BaseHTTPRequestHandler):
    """Answers each request by the next scene of `server.scenes`; after the last one, as a good server."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.requests.append((self.path, dict(self.headers)))
        scenes = self.server.scenes
        (scenes.pop(0) if scenes else well)(self)
        self.close_connection = True

    def log_message(self, *_):
        pass


def well(self, content=DATA, etag=ETAG, ignore_range=False, cut=None, pause=0.0, pieces=1):
    """Send the file, or the range that was asked for; `cut` ends the connection after so many bytes."""
    start, condition = 0, self.headers.get("If-Range")
    asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
    if asked and not ignore_range and condition in (None, etag):
        start = int(asked.group(1))
    if start >= len(content):
        self.send_response(416)
        self.send_header("Content-Range", f"bytes */{len(content)}")
        self.send_header("Content-Length", "0")
        self.end_headers()
        return
    self.send_response(206 if start else 200)
    if start:
        self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
    self.send_header("Content-Length", str(len(content) - start))
    self.send_header("Content-Type", "application/octet-stream")
    if etag:
        self.send_header("ETag", etag)
    self.end_headers()
    body = content[start:cut]
    for piece in range(pieces):
        self.wfile.write(body[piece * len(body) // pieces : (piece + 1) * len(body) // pieces])
        self.wfile.flush()
        time.sleep(pause)


def scene(**how):
    return lambda handler: well(handler, **how)


def refusal(code, **headers):
    def answer(handler):
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def page(text):
    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Type", "text/html; charset=utf-8")
        handler.send_header("Content-Length", str(len(text.encode())))
        handler.end_headers()
        handler.wfile.write(text.encode())

    return answer


@pytest.fixture
def server():
    site = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Play)
    site.daemon_threads, site.scenes, site.requests = True, [], []
    site.url = f"http://127.0.0.1:{site.server_address[1]}"
    thread = threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield site
    site.shutdown()
    site.server_close()


@pytest.fixture
def reports():
    return []


@pytest.fixture
def download(server, tmp_path, reports):
    """Download IT.h5 from the server; returns the path."""

    def run(sha1=SHA1, name="IT.h5", **settings):
        settings = {"first_pause": 0.01, "timeout": 5.0, "retries": 3} | settings
        files = PublicFiles(report=reports.append, **settings)
        return files.fetch(RemoteFile(f"{server.url}/{name}", name, sha1), tmp_path)

    return run


def left(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def ranges(server):
    return [headers.get("Range") for _, headers in server.requests]


# ---- success -------------------------------------------------------------------------------------------------------


def test_a_file_arrives_and_leaves_nothing_else(download, tmp_path):
    assert download().read_bytes() == DATA
    assert left(tmp_path) == ["IT.h5"]


def test_an_existing_file_is_not_downloaded_again(download, server, reports):
    download()
    download()
    assert len(server.requests) == 1
    assert "already exists" in reports[-1]


def test_without_a_checksum_the_kind_of_file_is_checked(download):
    assert download(sha1=None).read_bytes() == DATA


def test_from_a_mirror_under_the_files_own_path(server, tmp_path):
    file = RemoteFile("https://example.invalid/x/raw", "monkeyF/_logs/IT.h5", SHA1)
    target = PublicFiles(mirror=f"{server.url}/copies/").fetch(file, tmp_path)
    assert target == tmp_path / "monkeyF" / "_logs" / "IT.h5"
    assert server.requests[0][0] == "/copies/monkeyF/_logs/IT.h5"


# ---- connections that break ----------------------------------------------------------------------------------------


def test_a_cut_connection_is_resumed(download, server, reports):
    server.scenes = [scene(cut=100_000), scene(cut=250_000)]
    assert download().read_bytes() == DATA
    assert ranges(server) == [None, "bytes=100000-", "bytes=250000-"]
    assert server.requests[1][1]["If-Range"] == ETAG
    assert "cut after 100,000 of" in reports[0]


def test_a_later_call_resumes_too(download, server, tmp_path):
    server.scenes = [scene(cut=120_000)]
    with pytest.raises(RunFailed, match="the part that arrived is kept"):
        download(retries=0)
    assert left(tmp_path) == ["IT.h5.part", "IT.h5.part.etag"]
    assert download().read_bytes() == DATA
    assert ranges(server) == [None, "bytes=120000-"]
    assert left(tmp_path) == ["IT.h5"]


def test_progress_allows_new_failures(download, server):
    """Each attempt gets further than the one before: only failures in a row without progress count."""
    server.scenes = [scene(cut=k * 50_000) for k in range(1, 6)]
    assert download(retries=1).read_bytes() == DATA


def test_a_server_that_ignores_ranges_is_read_from_the_beginning(download, server):
    server.scenes = [scene(cut=100_000), scene(ignore_range=True)]
    assert download().read_bytes() == DATA


def test_a_file_that_changed_meanwhile_is_not_joined_to_the_old_one(download, server):
    new = DATA[:8] + DATA[:7:-1]
    server.scenes = [scene(cut=100_000), scene(content=new, etag='"second"')]
    assert download(sha1=hashlib.sha1(new).hexdigest()).read_bytes() == new


def test_parts_of_different_files_are_noticed_by_the_checksum(download, server, tmp_path, reports):
    """Without an ETag nothing else can tell."""
    (tmp_path / "IT.h5.part").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(1000))
    assert download().read_bytes() == DATA
    assert ranges(server) == ["bytes=1008-", None]
    assert "downloading the whole file again" in reports[0]


def test_a_complete_part_only_gets_its_name(download, server, tmp_path):
    (tmp_path / "IT.h5.part").write_bytes(DATA)
    assert download().read_bytes() == DATA
    assert len(server.requests) == 1


def test_a_part_that_is_too_long_is_discarded(download, tmp_path):
    (tmp_path / "IT.h5.part").write_bytes(DATA + b"more")
    assert download().read_bytes() == DATA


# ---- servers in trouble --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [500, 503, 429])
def test_a_busy_server_is_asked_again(download, server, code, reports):
    server.scenes = [refusal(code), refusal(code, Retry_After="0")]
    assert download().read_bytes() == DATA
    assert str(code) in reports[0]


def test_pauses_grow_and_heed_the_server(download, server, monkeypatch):
    pauses = []
    monkeypatch.setattr("data_prep.remote.downloader.time.sleep", pauses.append)
    monkeypatch.setattr("data_prep.remote.downloader.random.uniform", lambda low, high: high)
    server.scenes = [refusal(503), refusal(503), refusal(503, Retry_After="7"), refusal(503, Retry_After="9999")]
    download(first_pause=1.0, retries=5)
    assert [pause for pause in pauses if pause] == [1, 2, 7, 60]


def test_it_gives_up_in_the_end(download, server):
    server.scenes = [refusal(503)] * 10
    with pytest.raises(RunFailed, match=r"503 \(3 attempts failed in a row"):
        download(retries=2)
    assert len(server.requests) == 3


@pytest.mark.parametrize("code", [403, 404, 410])
def test_a_missing_file_is_not_requested_again(download, server, tmp_path, code):
    server.scenes = [refusal(code)] * 3
    with pytest.raises(RunFailed, match=rf"{code}.*--mirror"):
        download()
    assert len(server.requests) == 1
    assert left(tmp_path) == []


def test_a_silent_server_is_given_up_and_asked_again(download, server, reports):
    server.scenes = [lambda handler: time.sleep(1.0), scene(cut=200_000, pause=1.0)]
    assert download(timeout=0.3).read_bytes() == DATA
    assert "no answer in time" in reports[0]


def test_a_slow_but_steady_server_is_waited_for(download, server):
    server.scenes = [scene(pieces=8, pause=0.1)]
    assert download(timeout=0.5).read_bytes() == DATA
    assert len(server.requests) == 1


def test_a_server_that_cannot_be_reached(tmp_path):
    file = RemoteFile("http://127.0.0.1:9/x.h5", "x.h5")
    with pytest.raises(RunFailed, match="refused"):
        PublicFiles(retries=1, first_pause=0.01, report=lambda _: None).fetch(file, tmp_path)


# ---- the answer is not the file ------------------------------------------------------------------------------------


def test_a_wrong_checksum_is_refused_and_the_file_put_aside(download, tmp_path):
    with pytest.raises(RunFailed, match=rf"{SHA1}, not {'0' * 40}"):
        download(sha1="0" * 40)
    assert left(tmp_path) == ["IT.h5.unverified"]


def test_another_file_of_that_name_is_left_alone(download, server, tmp_path):
    (tmp_path / "IT.h5").write_bytes(b"mine")
    with pytest.raises(BadInput, match="already exists"):
        download()
    assert (tmp_path / "IT.h5").read_bytes() == b"mine"
    assert server.requests == []


def test_a_web_page_instead_of_the_file_is_noticed(download, server, tmp_path):
    server.scenes = [page("<html><head><title>Quota\n exceeded</title></head></html>")]
    with pytest.raises(RunFailed, match=r"web page.*Quota exceeded"):
        download(sha1=None)
    assert left(tmp_path) == []


def test_a_page_that_calls_itself_data_is_noticed(download, server):
    server.scenes = [scene(content=b"<!DOCTYPE html><html>sign in</html>")]
    with pytest.raises(RunFailed, match=r"not an \.h5 file"):
        download(sha1=None)


def test_the_confirmation_page_for_large_files_is_confirmed(download, server):
    form = (
        '<html><title>Virus scan warning</title><form id="download-form" action="/download" method="get">'
        '<input type="submit" value="Download anyway"/><input type="hidden" name="id" value="a b">'
        '<input type="hidden" name="confirm" value="t"></form></html>'
    )
    server.scenes = [page(form), scene(cut=100_000), page(form)]
    assert download(sha1=None).read_bytes() == DATA
    paths = [path for path, _ in server.requests]
    assert paths == ["/IT.h5", "/download?id=a+b&confirm=t"] * 2
    assert ranges(server)[-1] == "bytes=100000-"


def test_a_page_that_leads_to_a_local_file_is_not_followed(download, server):
    server.scenes = [page('<form id="download-form" action="file:///etc/hostname"></form>')]
    with pytest.raises(RunFailed, match="not a web address"):
        download(sha1=None)


# ---- the disk ------------------------------------------------------------------------------------------------------


def test_a_full_disk_keeps_what_arrived(server, tmp_path):
    """A limit on the file size stands in for the full disk: writing fails in the same way."""
    command = ["data_prep/fetch.py", "it-course", "--out", tmp_path, "--mirror", server.url]
    limited = run_command(command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    assert limited.returncode == 1
    assert "no space left" in limited.stderr
    assert "Traceback" not in limited.stderr
    part = tmp_path / "IT_data.h5.part"
    assert part.stat().st_size == 100_000
    done = run_command(command)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "IT_data.h5").read_bytes() == DATA
    assert ranges(server)[-1] == "bytes=100000-"


def test_too_little_space_is_noticed_first(download, monkeypatch):
    monkeypatch.setattr("data_prep.remote.public_files.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(RunFailed, match=r"no space for IT\.h5"):
        download()


def test_a_folder_that_cannot_be_written_is_refused(download, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="--out"):
        PublicFiles().fetch(RemoteFile("http://127.0.0.1:9/x", "x"), tmp_path / "file")


@contextmanager
def _download_under_way(server, download):
    started = threading.Event()

    def slow(handler):
        started.set()
        well(handler, pieces=4, pause=0.2)

    server.scenes = [slow]
    thread = threading.Thread(target=download)
    thread.start()
    started.wait(5)
    yield
    thread.join()


def test_two_downloads_of_a_file_do_not_mix(download, server, tmp_path):
    with _download_under_way(server, download), pytest.raises(BadInput, match="another process"):
        download()
    assert (tmp_path / "IT.h5").read_bytes() == DATA


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command_cites_and_says_how_to_continue(server, tmp_path, monkeypatch):
    files = tuple(RemoteFile("https://example.invalid/", name, SHA1) for name in ("a.nc", "b"))
    known = DATASETS["majaj2015"]
    dataset = Dataset(known.title, known.citation, known.licence, files, known.pack, note="Images are elsewhere.")
    monkeypatch.setitem(datasets.DATASETS, "majaj2015", dataset)
    out = tmp_path / "with space"
    done = succeed_here("data_prep/fetch.py", "majaj2015", "--out", out, "--mirror", server.url)
    for words in ("doi:10.1523/JNEUROSCI.5181-14.2015", "licence", "Images are elsewhere."):
        assert words in done.stdout
    assert f"data_prep/pack.py brainio '{out}'/assy_dicarlo" in done.stdout
    assert done.stdout.endswith(" --out data/majaj2015\n")
    assert left(out) == ["a.nc", "b"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["majaj2014", "--out", "x"], "majaj2015"),
        (["tvsd"], "--out"),
        (["tvsd", "--out", "x", "--mirror", "file:///etc"], "--mirror"),
        (["tvsd", "--out", "x", "--retries", "-1"], "retries"),
    ],
)
def test_bad_options_are_refused(words, complaint):
    assert_refused(run_here("data_prep/fetch.py", *words), complaint)


@pytest.mark.parametrize("dataset", DATASETS.values(), ids=DATASETS)
def test_the_catalogue_is_well_formed(dataset):
    assert dataset.citation
    assert dataset.licence
    paths = {f"x/{file.path}" for file in dataset.files}
    for name, words in dataset.pack.items():
        words = [*words.format(folder="x").split(), "--out", f"data/{name}"]
        packing = parse_options(words)
        assert str(packing.source.source) in paths
        assert paths >= {word for word in words if word.startswith("x/")}
    for file in dataset.files:
        assert file.url.startswith("https://")
        assert file.sha1 is None or re.fullmatch(r"[0-9a-f]{40}", file.sha1)
        assert not os.path.isabs(file.path)
        assert ".." not in file.path
    assert len({file.path for file in dataset.files}) == len(dataset.files)


def test_downloads_of_unknown_length_are_counted_in_a_log(capsys, monkeypatch):
    monkeypatch.setattr(Progress, "SECONDS_BETWEEN_LINES", -1.0)
    with Progress(None, "IT.h5", "MB") as progress:
        progress.advance(3)
    assert re.match(r"IT.h5: 3 MB, [\d,]+/s\n", capsys.readouterr().err)
