"""The page's files, as they are sent: there is nothing to build, and nothing is loaded from elsewhere."""

from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Final
from urllib.parse import parse_qsl

from cairn.observe.http import Answer

#: The page, and what it draws. Relative to each other, so that they may stand behind a proxy's prefix.
PAGE: Final = "/dashboard/"
STATE: Final = "/api/v1/state"

_KINDS: Final = {"html": b"text/html", "css": b"text/css", "js": b"text/javascript", "svg": b"image/svg+xml"}
#: Scripts and styles of our own alone, data from here alone, in nobody's frame.
_POLICY: Final = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@cache
def page_files() -> dict[str, Answer]:
    """All files by path. They say nothing secret, so anybody may have them."""
    found = {PAGE + file.name: _read(file) for file in files(__package__).joinpath("static").iterdir()}
    there = Answer([(b"location", PAGE.strip("/").encode() + b"/")], b"", 307)
    return {PAGE.rstrip("/"): there, PAGE: found[PAGE + "index.html"], **found}


def since_of(query: bytes) -> int:
    """The number of the last sample that who asks for the state has; -1: none."""
    told = dict(parse_qsl(query[:100])).get(b"since", b"")
    return int(told) if told.isdigit() else -1


def _read(file: Traversable) -> Answer:
    body = file.read_bytes()
    kind = _KINDS[file.name.rpartition(".")[2]]
    headers = [
        (b"content-type", kind + b"; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"content-security-policy", _POLICY),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
    ]
    return Answer(headers, body)
