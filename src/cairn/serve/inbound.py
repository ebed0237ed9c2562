"""HTTP/1.1 from clients to an ASGI application: what uvicorn runs each connection with, in the place of its own.

uvicorn's takes heads without an end and waits for them for ever, also before there is any key; it stops reading at
64 KiB, several times for a long prompt; and what it does per request costs as much as choosing an engine. Here, as
there, httptools parses. HTTP/1.0 and upgrades are answered in HTTP/1.1 and the connection ends.
"""

import asyncio
import http
import logging
import math
import urllib.parse
from collections import deque
from collections.abc import Iterable
from enum import Enum, auto
from typing import Any, Final, cast

import httptools
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.server import ServerState

logger = logging.getLogger(__name__)

#: Bytes of a body that wait for whoever reads it, a connection: one with 131,072 token ids.
_WAITING: Final = 1 << 20
#: Bytes of a request's head, or between the pieces of its body; and seconds for a head to come.
_HEAD: Final = 64 << 10
_HEAD_S: Final = 30.0
#: For a client to read what it was sent before its connection was ended, seconds.
_LAST_S: Final = 30.0
#: Requests that wait for the answer to another: what one read may bring is not bounded otherwise.
_QUEUE: Final = 64

_LINES: Final = {code: b"HTTP/1.1 %d \r\n" % code for code in range(100, 600)} | {
    one.value: f"HTTP/1.1 {one.value} {one.phrase}\r\n".encode() for one in http.HTTPStatus
}
#: Answers that have no body, whatever their headers say.
_BODILESS: Final = frozenset((204, 304))
_ASGI: Final = {"version": "3.0", "spec_version": "2.3"}


class Connection(asyncio.Protocol):
    """A client's connection, by the interface that uvicorn's `http` option asks for. Requests that come before the last
    one is answered wait for it, and nothing is read behind them.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],  # noqa: ARG002 - of lifespans, which there are none of
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self.paused: asyncio.Event | None = None  # set once the client reads again, or has left; None: it reads
        self.headers: list[tuple[bytes, bytes]] = server_state.default_headers
        self._app, self._state = cast(ASGIApp, config.loaded_app), server_state
        self._keep_alive_s, self._most = config.timeout_keep_alive, config.limit_concurrency
        self._loop = _loop or asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._ends: dict[str, Any] = {}
        self._exchange: Exchange | None = None  # the one whose request is being read
        self._answering: Exchange | None = None
        self._queue: deque[Exchange] = deque()
        self._task: asyncio.Task[None] | None = None
        self._idle: asyncio.Future[None] | None = None  # for which that task waits
        self._until = math.inf  # when the client must have brought a head
        self._head_begun = False
        self._timer: asyncio.TimerHandle | None = None
        self._url = b""
        self._given: list[tuple[bytes, bytes]] = []
        self._unread = 0  # bytes that have brought nothing whole yet
        self._over = self._deaf = False  # it ends; what comes is not read any more

    # What the transport tells.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are none by their class
        self._state.connections.add(self)  # type: ignore[arg-type]  # uvicorn names its own classes
        server, client = transport.get_extra_info("sockname"), transport.get_extra_info("peername")
        self._ends = {
            "server": tuple(server[:2]) if isinstance(server, tuple) else None,
            "client": tuple(client[:2]) if isinstance(client, tuple) else None,
            "scheme": "https" if transport.get_extra_info("sslcontext") else "http",
        }
        self._expect_head(_HEAD_S)

    def connection_lost(self, _: Exception | None) -> None:
        self._over = True
        self._state.connections.discard(self)
        self._queue.clear()
        if self._timer is not None:
            self._timer.cancel()
        for one in (self._answering, self._exchange):
            if one is not None:
                one.leave()
        if self._idle is not None:
            self._idle.cancel()
        self.resume_writing()  # behind the others: who waits for the client's leaving may end who waits for its reading

    def data_received(self, data: bytes) -> None:
        if self._over or self._deaf:
            return
        self._unread += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._deaf = True
        except httptools.HttpParserError:
            self._deaf = self._exchange is None and self._answering is not None and not self._answering.keeps
            if not self._deaf:  # else it stands behind a last request, and is nobody's
                self.refuse("Invalid HTTP request received.")
            return
        if self._unread > _HEAD:
            self.refuse("The request's head is too large.")
        elif self._unread and self._answering is None:
            self._expect_head(_HEAD_S, begun=True)

    def pause_writing(self) -> None:
        self.paused = asyncio.Event()

    def resume_writing(self) -> None:
        if self.paused is not None:
            self.paused.set()
            self.paused = None

    # What the parser tells.

    def on_message_begin(self) -> None:
        self._url, self._given = b"", []

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._given.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        parser, version = self._parser, self._parser.get_http_version()
        url = self._url if self._url.startswith(b"/") else _origin_form(self._url)
        raw, _, query = url.partition(b"?")
        path = raw.decode("latin-1")
        self._unread, self._until, self._head_begun = 0, math.inf, False
        given, self._given = self._given, []  # what comes behind a body is no part of the head
        self._exchange = exchange = Exchange(
            self,
            {
                "type": "http",
                "asgi": _ASGI,
                "http_version": version,
                "method": parser.get_method().decode("ascii"),
                "path": urllib.parse.unquote(path) if "%" in path else path,
                "raw_path": raw,
                "query_string": query,
                "root_path": "",
                "headers": given,
                **self._ends,
            },
            keeps=version == "1.1" and parser.should_keep_alive() and not parser.should_upgrade(),
        )
        if self._answering is None:
            self._answer(exchange)
        elif len(self._queue) < _QUEUE:
            self._queue.append(exchange)
            self.read(False)
        else:
            self.close()

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        if self._exchange is not None:
            self._exchange.take(body)

    def on_message_complete(self) -> None:
        self._unread = 0
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.is_whole()

    # What exchanges ask for.

    def write(self, data: bytes) -> None:
        if self._transport is not None and not self._over:
            self._transport.write(data)

    def read(self, on: bool) -> None:
        """Goes on reading, or stops; not again behind requests that wait."""
        if self._transport is None or self._transport.is_closing():
            return
        if not on:
            self._transport.pause_reading()
        elif not self._queue:
            self._transport.resume_reading()

    def ended(self, exchange: "Exchange") -> None:
        """An answer is complete: the next request, if the connection goes on."""
        self._state.total_requests += 1
        self._answering = None
        if not exchange.keeps:
            self.close()
        elif self._queue:
            self._answer(self._queue.popleft())
            self.read(True)
        else:
            self.read(True)
            self._expect_head(self._keep_alive_s)

    def refuse(self, message: str) -> None:
        """Ends the connection, with an answer unless one has begun."""
        if self._answering is None or not self._answering.started:
            head = b"content-type: text/plain; charset=utf-8\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
            self.write(_LINES[400] + head % len(message) + message.encode())
        self.close()

    def close(self) -> None:
        """Ends the connection, once what was written has been read, or nobody has read it in time."""
        if self._over or self._transport is None:
            return
        self._over = True
        self._transport.close()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(_LAST_S, self._transport.abort)

    def shutdown(self) -> None:
        """The server ends: so does the connection, after the answer that is under way."""
        self._queue.clear()
        if self._answering is None:
            self.close()
        else:
            self._answering.keeps = False

    def _answer(self, exchange: "Exchange") -> None:
        self._answering = exchange
        if self._task is None:
            self._task = self._loop.create_task(self._serve())
            self._task.add_done_callback(self._state.tasks.discard)
        elif self._idle is not None:
            self._idle.set_result(None)
            self._idle = None

    async def _serve(self) -> None:
        """Answers one request after the other: a task for each costs twice what waking this one does."""
        most, state, task = self._most, self._state, self._task
        assert task is not None
        while not self._over:
            if self._answering is None:
                state.tasks.discard(task)  # the server's end waits for those in there
                self._idle = self._loop.create_future()
                await self._idle
            else:
                full = most is not None and max(len(state.connections), len(state.tasks)) >= most
                state.tasks.add(task)
                await self._answering.run(_too_many if full else self._app)

    def _expect_head(self, within_s: float, *, begun: bool = False) -> None:
        """The connection ends unless a whole head comes in time. begun: some of it has come; later pieces of it do not
        lengthen the wait. One timer for many waits: setting one, and cancelling it, costs as much as a system call.
        """
        if begun and self._head_begun:
            return
        self._head_begun, self._until = begun, (until := self._loop.time() + within_s)
        if self._timer is None or self._timer.when() > until:
            self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(self._until, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._loop.time() >= self._until:
            self.close()
        elif self._until < math.inf:
            self._set_timer()


class Exchange:
    """A request and its answer: ASGI's `receive` and `send`. started: whether the answer has begun. keeps: whether the
    connection goes on behind it.
    """

    def __init__(self, connection: Connection, scope: Scope, *, keeps: bool) -> None:
        self._connection, self._scope, self.keeps = connection, scope, keeps
        self._body: list[bytes] = []
        self._waiting = 0  # bytes of it
        self._whole = self._taken = False  # the request: is here, has been taken by the application
        self.started = self._complete = self._left = False
        self._head = b""  # of the answer, which goes with the first of its body: so ASGI has it, and one write is saved
        self._lacking = 0  # bytes of the answer, where its length was told
        self._frame = _Frame.LENGTH
        self._changed: asyncio.Event | None = None

    async def run(self, app: ASGIApp) -> None:
        """Lets the application answer. What it leaves unfinished ends the connection, so that the client sees it."""
        try:
            await app(self._scope, self.receive, self.send)
        except asyncio.CancelledError:
            await self._say_if_silent(503, "the service ends")
            raise
        except Exception:  # the application's last resort; the client hears of it, and the log
            logger.exception("a request failed: %s %s", self._scope["method"], self._scope["path"][:200])
            await self._say_if_silent(500, "Internal Server Error")
        finally:
            if not (self._complete or self._left):
                self._connection.close()

    async def receive(self) -> Message:
        while not (self._left or self._complete):
            if self._body or (self._whole and not self._taken):
                body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
                self._body.clear()
                if self._waiting > _WAITING:
                    self._connection.read(True)
                self._waiting, self._taken = 0, self._whole
                return {"type": "http.request", "body": body, "more_body": not self._whole}
            if self._changed is None:
                self._changed = asyncio.Event()
                self._ask_for_body()
            await self._changed.wait()
            self._changed.clear()
        return {"type": "http.disconnect"}

    def _ask_for_body(self) -> None:
        """Of a client that sends it when it is told to."""
        expects = any(name == b"expect" and value.lower() == b"100-continue" for name, value in self._scope["headers"])
        if expects and not (self._whole or self.started):
            self._connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    async def send(self, message: Message) -> None:
        """Waits while the client does not read."""
        connection = self._connection
        while connection.paused is not None:
            await connection.paused.wait()
        if self._left:
            return
        if self._complete or message["type"] != ("http.response.body" if self.started else "http.response.start"):
            raise RuntimeError(f"{message['type']}: no answer goes on so")
        if self.started:
            self._go_on(message.get("body", b""), more=message.get("more_body", False))
        else:
            self._begin(message["status"], message.get("headers", ()))

    def take(self, body: bytes) -> None:
        """More of the request. What nobody wants any more is read to its end, and dropped."""
        if self._complete or self._left:
            return
        self._body.append(body)
        self._waiting += len(body)
        if self._waiting > _WAITING:
            self._connection.read(False)
        self._wake()

    def is_whole(self) -> None:
        """All of the request is here."""
        self._whole = True
        self._wake()

    def leave(self) -> None:
        """The client has left."""
        self._left = True
        self._wake()

    def _wake(self) -> None:
        if self._changed is not None:
            self._changed.set()

    def _begin(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        lines, ends, closes, framed = [_LINES[status]], 2, False, False
        for name, value in (*self._connection.headers, *headers):
            if name == b"content-length":
                framed, self._lacking = True, int(value)
            elif name == b"connection":
                closes = b"close" in value.lower()
            lines += (name, b": ", value, b"\r\n")
            ends += 1
        if status in _BODILESS or self._scope["method"] == "HEAD":
            self._frame = _Frame.NONE
        elif not framed and self._scope["http_version"] == "1.1":
            self._frame = _Frame.CHUNKS
            lines.append(b"transfer-encoding: chunked\r\n")
            ends += 1
        elif not framed:
            self._frame = _Frame.CLOSE
        self.keeps = self.keeps and not closes and self._frame is not _Frame.CLOSE
        if not (self.keeps or closes):
            lines.append(b"connection: close\r\n")
            ends += 1
        lines.append(b"\r\n")
        self._head = b"".join(lines)
        if not self._head.count(b"\r") == self._head.count(b"\n") == ends:
            raise RuntimeError("a header of the answer has a line's end in it")
        self.started = True

    def _go_on(self, body: bytes, *, more: bool) -> None:
        if self._frame is _Frame.NONE:
            body = b""
        elif self._frame is _Frame.CHUNKS:
            body = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            if not more:
                body += b"0\r\n\r\n"
        elif self._frame is _Frame.LENGTH:
            self._lacking -= len(body)
            if self._lacking < 0 or (self._lacking and not more):
                raise RuntimeError(f"an answer that misses its content-length by {-self._lacking} bytes")
        if data := self._head + body:
            self._head = b""
            self._connection.write(data)
        if not more:
            self._complete = True
            self._wake()
            self._connection.ended(self)

    async def _say_if_silent(self, status: int, text: str) -> None:
        if not self.started:
            await _say(self.send, status, text)


class _Frame(Enum):
    """How a client knows where an answer ends."""

    LENGTH = auto()
    CHUNKS = auto()
    CLOSE = auto()
    NONE = auto()


async def _too_many(_: Scope, __: Receive, send: Send) -> None:
    await _say(send, 503, "too many connections")


async def _say(send: Send, status: int, text: str) -> None:
    length = str(len(text)).encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", length), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})


def _origin_form(url: bytes) -> bytes:
    """Of an address with its host, as proxies are sent it, the part behind; of what is none nothing."""
    try:
        parts = httptools.parse_url(url)
    except httptools.HttpParserInvalidURLError:
        return b""
    return (parts.path or b"/") + (b"?" + parts.query if parts.query else b"")
