"""How far down each page of a PDF that Chromium printed is filled."""

import re
import zlib
from collections.abc import Iterator

_TOKEN = re.compile(rb"\((?:\\.|[^)\\])*\)|<[^>]*>|\[[^\]]*\]|/[^\s/<>\[\]]+|[-+.\d]+|[A-Za-z*]+")
Matrix = tuple[float, ...]  # a b c d e f of the PDF standard


def filled_heights(pdf: bytes) -> list[float]:
    """For each page the share of its height, from the top, above its lowest line of text or figure."""
    objects = {int(number): body for number, body in re.findall(rb"(\d+) 0 obj\n(.*?)endobj", pdf, re.DOTALL)}
    pages = [body for body in objects.values() if b"/Type /Page\n" in body]
    return [_filled_height(page, _stream(objects[int(_found(rb"/Contents (\d+)", page))])) for page in pages]


def _found(pattern: bytes, text: bytes) -> bytes:
    match = re.search(pattern, text)
    assert match, pattern
    return match[1]


def _stream(body: bytes) -> bytes:
    return zlib.decompress(body[body.index(b"stream\n") + 7 : body.rindex(b"\nendstream")])


def _filled_height(page: bytes, content: bytes) -> float:
    height = float(_found(rb"/MediaBox \[\S+ \S+ \S+ ([\d.]+)\]", page))
    return 1 - min(_heights(content), default=height) / height


def _heights(content: bytes) -> Iterator[float]:
    """The vertical position of each line of text and each figure."""
    at: Matrix = (1, 0, 0, 1, 0, 0)
    outer: list[Matrix] = []
    numbers: list[float] = []
    for token in _TOKEN.findall(content):
        if re.fullmatch(rb"[-+]?[\d.]+", token):
            numbers.append(float(token))
            continue
        if token == b"q":
            outer.append(at)
        elif token == b"Q":
            at = outer.pop()
        elif token == b"cm":
            at = _within(at, numbers[-6:])
        elif token == b"Tm":
            yield _within(at, numbers[-6:])[5]
        elif token == b"Do":
            yield at[5]
        numbers = []


def _within(outer: Matrix, inner: list[float]) -> Matrix:
    """The product of two matrices."""
    a, b, c, d, e, f = inner
    p, q, r, s, t, u = outer
    return (a * p + b * r, a * q + b * s, c * p + d * r, c * q + d * s, e * p + f * r + t, e * q + f * s + u)
