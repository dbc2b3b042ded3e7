"""A local web server that imitates faulty networks: cut connections, wrong bytes, delays, refusals."""

import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Web:
    """What the server serves, and the faults it imitates.

    Attributes:
        folder: the files to serve.
        faults: by file, what happens to its next requests, one after the other: ("cut", BYTES), ("wrong",),
            ("slow", SECONDS) before the answer, ("drip", SECONDS) between single bytes, ("status", CODE), ("html",);
            None for no fault.
        always: by file, the fault of every request.
        ranges: whether it supports range requests.
        wanted: user and password as "user:password", and a query, that every request must have.
        pace: seconds per 4 KiB.
        asked: (file, Range header) of all requests.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.faults: dict[str, deque] = defaultdict(deque)
        self.always: dict[str, tuple] = {}
        self.ranges = True
        self.authorization: str | None = None
        self.query = ""
        self.pace = 0.0
        self.asked: list[tuple[str, str | None]] = []
        self.url = ""

    def times(self) -> Counter:
        """Number of requests for each tar."""
        return Counter(file for file, _ in self.asked if file.endswith(".tar"))


@contextmanager
def serve(folder: Path) -> Iterator[Web]:
    """Serve a folder while the block runs."""
    web = Web(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            path, _, query = self.path.partition("?")
            file = path.rpartition("/")[2]
            requested_range = self.headers.get("Range")
            web.asked.append((file, requested_range))
            if self.headers.get("Authorization") != web.authorization or query != web.query:
                return self.refuse(403)
            fault, *how = (web.faults[file].popleft() if web.faults[file] else web.always.get(file)) or ("none",)
            if fault == "status":
                return self.refuse(how[0])
            if not (web.folder / file).is_file():
                return self.refuse(404)
            if fault == "slow":
                time.sleep(how[0])
            return self.answer(file, requested_range, fault, *how)

        def refuse(self, code: int):
            self.send_response(code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def answer(self, file: str, requested_range: str | None, fault: str, *how):
            content = (web.folder / file).read_bytes()
            if fault == "wrong":
                content = content[: len(content) // 2] + bytes(len(content) - len(content) // 2)
            if fault == "html":
                content = b"<html>sign in</html>"
            start = int(requested_range.removeprefix("bytes=").rstrip("-")) if requested_range and web.ranges else 0
            if start >= len(content):
                return self.refuse(416)
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.close_connection = True
            with suppress(OSError):  # the client hung up
                self.send(content[start : start + how[0] if fault == "cut" else None], fault, *how)

        def send(self, content: bytes, fault: str, *how):
            if fault == "drip":
                for offset in range(len(content)):
                    self.wfile.write(content[offset : offset + 1])
                    time.sleep(how[0])
            elif web.pace:
                for offset in range(0, len(content), 4096):
                    self.wfile.write(content[offset : offset + 4096])
                    time.sleep(web.pace)
            else:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    web.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
