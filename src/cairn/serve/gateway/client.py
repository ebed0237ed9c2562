"""A client's end of a request, over ASGI: its body, its leaving, and what it is sent as fast as it reads."""

import asyncio
from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec
from starlette.types import Receive, Scope, Send

from cairn.observe.access import may_pass
from cairn.observe.log import REQUEST_HEADER, request_id_of
from cairn.serve.base import RequestError
from cairn.serve.gateway.alarms import Alarms
from cairn.serve.gateway.base import Headers

#: For which nobody waits for a client's leaving, seconds. Many an answer is whole by then, and a task that waits is a
#: tenth of what such a request costs.
_WATCH_S: Final = 0.05

#: Of one hop only (RFC 9110, 7.6.1), or made anew by whoever sends.
_HOP: Final = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    b"upgrade".split()
)
#: Of requests, beside: the gateway's own affair with its client, or with the engine.
_OURS: Final = _HOP | frozenset(
    [REQUEST_HEADER, *b"host content-length authorization accept-encoding expect cookie".split()]
)
_FROM_ENGINES: Final = _HOP | {b"server", b"date", b"set-cookie", REQUEST_HEADER}


class Waits(NamedTuple):
    """For what all clients are waited for: their bodies to come, their leaving to matter, and what they are sent to be
    read.
    """

    loop: asyncio.AbstractEventLoop
    bodies: "Alarms[Client]"
    leaving: "Alarms[Client]"
    reading: "Alarms[Client]"

    @classmethod
    def of(cls, body_s: float, read_s: float) -> "Waits":
        """body_s: for a whole body. read_s: how long a client may read nothing at all."""
        bodies, leaving = Alarms(body_s, Client.is_late), Alarms(_WATCH_S, Client.wait)
        return cls(asyncio.get_running_loop(), bodies, leaving, Alarms(read_s, Client.leave))


class Client:
    """One request's client. `watch` once the body has been read; then the task is cancelled when the client leaves."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, waits: Waits) -> None:
        #: The headers as they came, what the address asks for, and what logs call the request.
        self.given: Headers = scope["headers"]
        self.query: bytes = scope["query_string"]
        self._receive, self._send, self._waits = receive, send, waits
        self._task = asyncio.current_task(waits.loop)
        self._watcher: asyncio.Task[None] | None = None
        self.left = self.started = self.ended = self._late = False
        self.status = 0
        self._named = dict(self.given)  # of several of one name the last
        self.id = request_id_of(self._named)
        self._id = REQUEST_HEADER, self.id.encode()

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What the engine is told."""
        kept = [one for one in self.given if one[0] not in _OURS]
        if b"connection" in self._named:
            named = [value for name, value in self.given if name == b"connection"]
            hops = {one.strip().lower() for value in named for one in value.split(b",")}
            kept = [one for one in kept if one[0] not in hops]
        kept.append(self._id)
        return kept

    def may_pass(self, keys: Sequence[str]) -> bool:
        """Whether it has one of these keys, if there are any."""
        if not keys:
            return True
        given = self._named.get(b"authorization")
        return any(may_pass(given, key) for key in keys)

    async def body(self, most: int) -> bytes:
        """Raises RequestError for one that is larger than `most`, or does not come in time."""
        told = self._named.get(b"content-length", b"")
        if told.isdigit() and int(told[:20]) > most:
            raise _too_large(most)
        pieces: list[bytes] = []
        size = 0
        self._waits.bodies.set(self)
        try:
            while True:
                message = await self._receive()
                if message["type"] != "http.request":
                    self.left = True
                    raise RequestError("the client has left")
                pieces.append(message.get("body", b""))
                size += len(pieces[-1])
                if size > most:
                    raise _too_large(most)
                if not message.get("more_body"):
                    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
        except asyncio.CancelledError:
            if not self._late:
                raise
            assert self._task is not None
            self._task.uncancel()
            raise RequestError(f"the body has not come within {self._waits.bodies.seconds:g} s", 408) from None
        finally:
            self._waits.bodies.cancel(self)

    def watch(self) -> None:
        """From now on the task that made this is cancelled soon after the client leaves (`left` tells)."""
        self._waits.leaving.set(self)

    def wait(self) -> None:
        """For its leaving."""
        self._watcher = asyncio.create_task(self._wait())

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self.ended:
            self.leave()

    def leave(self) -> None:
        """It has left, or does not read any more."""
        self.left = True
        self._cancel()

    def is_late(self) -> None:
        """Its body has not come in time."""
        self._late = True
        self._cancel()

    def _cancel(self) -> None:
        assert self._task is not None
        self._task.cancel()

    async def start(self, status: int, headers: Headers) -> None:
        """Sends the head."""
        self.started, self.status = True, status
        kept = [one for one in headers if one[0] not in _FROM_ENGINES]
        kept.append(self._id)
        await self._send({"type": "http.response.start", "status": status, "headers": kept})

    async def send(self, body: bytes, *, more: bool) -> None:
        """Sends a piece; waits as long as the client does not read. The request ends if it reads nothing for long."""
        self.ended = not more
        reading = self._waits.reading
        reading.set(self)
        try:
            await self._send({"type": "http.response.body", "body": body, "more_body": more})
        finally:
            reading.cancel(self)

    def said(self, _: object) -> dict[str, int]:
        """What it was told, for who traces."""
        return {"status": self.status}

    async def refuse(self, message: str, status: int, headers: Headers = ()) -> None:
        """Answers in OpenAI's form, if nothing has been sent."""
        if self.started or self.left:
            return
        body = error_body(message, status)
        head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *headers]
        await self.start(status, head)
        await self.send(body, more=False)

    def close(self) -> None:
        """It is over."""
        self._waits.leaving.cancel(self)
        if self._watcher is not None:
            self._watcher.cancel()


_KINDS: Final = {400: "invalid_request_error", 401: "authentication_error", 429: "rate_limit_error"}


def error_body(message: str, status: int) -> bytes:
    """As OpenAI's clients read it."""
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": None, "code": status}})


def _too_large(most: int) -> RequestError:
    return RequestError(f"the body is too large; at most {most} bytes are taken", 413)
