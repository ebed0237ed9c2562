"""Request bodies: bounded before they are read, decoded without a Python int for each token."""

import asyncio
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import numpy as np
from starlette.requests import ClientDisconnect, Request

from cairn.fleet.msgpack import parse_tokens
from cairn.serve.base import Bounds, RequestError, Tokens
from cairn.serve.token_text import cut_tokens

JSON: Final = "application/json"
MSGPACK: Final = "application/msgpack"
TOKENS: Final = "application/octet-stream"

_decode_msgpack = msgspec.msgpack.Decoder(dict[str, msgspec.Raw]).decode
_BINARY: Final = (0xC4, 0xC5, 0xC6)  # msgpack's bin 8, 16, 32

Fields = dict[str, Any]


class Bodies:
    """Reads bodies for one event loop: each within its bound, and all that are being read within theirs."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._held = 0

    async def fields(self, request: Request, *kinds: str) -> Fields:
        """What an object in JSON or msgpack says, by field; `token_ids` as an array [n]. kinds: those that are taken.

        Raises RequestError: 413 before more than the bound is in memory.
        """
        kind = _kind_of(request, kinds)
        body = await self._read(request)
        try:
            return _of_msgpack(body) if kind == MSGPACK else _of_json(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise RequestError(f"the body is no object in {kind}: {error}") from None
        except RecursionError:
            raise RequestError("the body is nested too deeply") from None

    async def tokens(self, request: Request) -> Tokens:
        """Bare token ids [n]. Raises RequestError as `fields` does."""
        _kind_of(request, (TOKENS,))
        return _of_bytes(await self._read(request))

    async def _read(self, request: Request) -> bytes:
        bounds, parts, size = self._bounds, list[bytes](), 0
        told = request.headers.get("content-length", "0")
        if told.isdigit() and int(told[:20]) > bounds.body:
            raise _too_large(bounds)
        try:
            async with asyncio.timeout(bounds.request):
                async for part in request.stream():
                    size += len(part)
                    self._held += len(part)
                    if size > bounds.body:
                        raise _too_large(bounds)
                    if self._held > bounds.bodies:
                        raise RequestError("too many large bodies come at once; try again later", 503)
                    parts.append(part)
        except TimeoutError:
            raise RequestError(f"the body has not come within {bounds.request:g} s", 408) from None
        except ClientDisconnect:
            raise RequestError("the client has left") from None
        finally:
            self._held -= size
        return b"".join(parts)


def _kind_of(request: Request, kinds: Sequence[str]) -> str:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in kinds:
        raise RequestError(f"content-type {kind[:100]!r}: must be {' or '.join(kinds)}", 415)
    return kind


def _too_large(bounds: Bounds) -> RequestError:
    return RequestError(f"the body is too large; at most {bounds.body} bytes are taken", 413)


def _of_json(body: bytes) -> Fields:
    rest, tokens = cut_tokens(body)
    fields = msgspec.json.decode(rest)
    if not isinstance(fields, dict):
        raise RequestError("the body must be an object")
    if tokens is not None:
        fields["token_ids"] = tokens
    return fields


def _of_msgpack(body: bytes) -> Fields:
    raw = _decode_msgpack(body)
    fields: Fields = {name: msgspec.msgpack.decode(value) for name, value in raw.items() if name != "token_ids"}
    if "token_ids" in raw:
        fields["token_ids"] = _of_packed(raw["token_ids"])
    return fields


def _of_packed(raw: msgspec.Raw) -> Tokens | None:
    """From a msgpack array of integers, or from binary data as in `TOKENS`."""
    first = memoryview(raw)[0]
    if first == 0xC0:
        return None
    if first in _BINARY:
        return _of_bytes(msgspec.msgpack.decode(raw, type=bytes))
    tokens = parse_tokens(raw)
    if tokens is None:
        raise RequestError("token_ids: must be binary data, or a list of integers in [0, 2**32)")
    return np.array(tokens, np.uint32)


def _of_bytes(body: bytes) -> Tokens:
    """A copy, as kernels are compiled anew for memory that cannot be written."""
    if len(body) % 4:
        raise RequestError(f"{len(body)} bytes of token ids: must be uint32, four bytes each")
    return np.array(np.frombuffer(body, "<u4"), np.uint32)
