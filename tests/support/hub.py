"""A local stand-in for the Hugging Face hub: it serves the files of repositories, as the hub's client asks for them."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def serve_hub(files: dict[str, bytes]) -> Iterator[str]:
    """Serve files by their paths, such as "timm/NAME/resolve/main/model.safetensors"; yields the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self._answer(with_content=False)

        def do_GET(self):
            self._answer(with_content=True)

        def _answer(self, with_content: bool) -> None:
            content = files.get(self.path.lstrip("/").split("?")[0])
            self.send_response(200 if content is not None else 404)
            if content is None:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", str(len(content or b"")))
            self.send_header("ETag", f'"{hashlib.sha256(content or b"").hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()
            if with_content and content:
                self.wfile.write(content)

        def log_message(self, *words) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
