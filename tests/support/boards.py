"""Run TensorBoard on a folder and query its API."""

import json
import urllib.request
from contextlib import contextmanager
from urllib.parse import urlencode

from tensorboard import program


@contextmanager
def tensorboard_on(folder):
    """Run TensorBoard on a folder; yields a function that queries its API."""
    server = program.TensorBoard()
    server.configure(argv=[None, "--logdir", str(folder), "--port", "0", "--load_fast", "false"])
    url = server.launch()

    def ask(path: str, **query) -> object:
        with urllib.request.urlopen(f"{url}data/{path}?{urlencode(query)}", timeout=30) as answer:
            content = answer.read()
        return json.loads(content) if answer.headers["Content-Type"].startswith("application/json") else content

    ask.url = url
    yield ask
