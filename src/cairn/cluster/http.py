"""One GET, bounded in time and bytes: all that watching an engine needs."""

import asyncio
import ssl
from typing import Final, NamedTuple
from urllib.parse import SplitResult, urlsplit

from cairn.errors import InputError

_MAX_BODY: Final = 16 << 20
_MAX_LINE: Final = 64 << 10


class HttpError(Exception):
    """No answer, or none that can be used. refused: nobody listens there."""

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


class Answer(NamedTuple):
    """status: HTTP's. body: decoded of nothing. date: the header Date, as it came; "": there was none."""

    status: int
    body: bytes
    date: str


def parse_url(url: str) -> SplitResult:
    """Raises InputError for what is no address of a server."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) > 0
    except ValueError:
        usable = False
    if not usable or "@" in parts.netloc or parts.query or parts.fragment or not url.isascii() or not url.isprintable():
        raise InputError(f"{url[:200]!r}: must be an address such as http://10.0.0.1:8000")
    return parts


async def get(url: str, path: str, timeout_s: float, token: str | None = None) -> Answer:
    """GET url + path, from connecting to the last byte in `timeout_s`. Raises HttpError.

    HTTP/1.0 on a connection of its own: the body ends where the connection does, so there are no chunks to put
    together. token: a bearer's.
    """
    parts = parse_url(url)
    secure = parts.scheme == "https"
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(
                parts.hostname,
                parts.port or (443 if secure else 80),
                ssl=ssl.create_default_context() if secure else None,
                limit=_MAX_LINE,
            )
            try:
                bearer = f"Authorization: Bearer {token}\r\n" if token else ""
                head = f"GET {parts.path.rstrip('/')}{path} HTTP/1.0\r\nHost: {parts.netloc}\r\n{bearer}\r\n"
                writer.write(head.encode("ascii"))
                return await _read(reader)
            finally:
                writer.transport.abort()
    except ConnectionRefusedError:
        raise HttpError(f"{parts.netloc}: nobody listens there", refused=True) from None
    except TimeoutError:
        raise HttpError(f"{parts.netloc}: no answer in {timeout_s:g} s") from None
    except (OSError, ValueError, asyncio.IncompleteReadError) as error:
        raise HttpError(f"{parts.netloc}: {error}") from None


async def _read(reader: asyncio.StreamReader) -> Answer:
    words = (await reader.readline()).split(None, 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/") or not words[1].isdigit():
        raise ValueError("no answer in HTTP")
    date = b""
    while line := (await reader.readline()).strip():
        name, _, value = line.partition(b":")
        if name.lower() == b"date":
            date = value.strip()
    body = bytearray()
    while piece := await reader.read(_MAX_LINE):
        body += piece
        if len(body) > _MAX_BODY:
            raise ValueError(f"an answer of more than {_MAX_BODY} bytes")
    return Answer(int(words[1]), bytes(body), date.decode("latin-1"))
