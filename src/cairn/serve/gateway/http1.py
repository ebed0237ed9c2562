"""HTTP/1.1 to engines: keep-alive connections in a pool, bodies as they come, and reading that can be stopped.

A client of our own, as those there are cost more than a request may (docs/serve.md has the figures).
"""

import asyncio
import ssl
from typing import Any, Final, cast

import httptools

from cairn.cluster.http import parse_url
from cairn.errors import InputError
from cairn.serve.gateway.base import Headers, UpstreamError

#: Bytes of a body that wait for their reader before the connection is not read any more.
_WAITING: Final = 256 << 10
#: Bytes that may come without a body's: of a head, of trailers.
_HEAD: Final = 64 << 10
#: Connections kept for later, by engine.
_IDLE: Final = 256


class Reply:
    """An `Answer`: one use of a connection, which goes back to its pool at the end and may then be another's."""

    __slots__ = ("_connection", "headers", "status")

    def __init__(self, connection: "Connection") -> None:
        self.status = connection.status
        self.headers: Headers = connection.headers
        self._connection: Connection | None = connection

    async def read(self, timeout_s: float) -> bytes:
        if self._connection is None:
            return b""
        data = await self._connection.read(timeout_s)
        if not data:
            self._connection = None
        return data

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Connection(asyncio.Protocol):
    """One connection, for one request at a time: `ask`, then `read` to the end."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.done = True
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._pool: Pool | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._patience_s = self._until = 0.0
        self._timer: asyncio.TimerHandle | None = None  # of the wait that is over first; later ones set it anew
        self._body: list[bytes] = []
        self._waiting = self._bare = 0
        self._complete = self._paused = self._to_the_end = self._keeps = False
        self._failure: UpstreamError | None = None

    @property
    def usable(self) -> bool:
        """Whether another request can be sent."""
        return self._failure is None and self.done

    async def ask(self, pool: "Pool", data: bytes, timeout_s: float) -> Reply:
        """Sends a whole request and waits for the answer's head."""
        assert self._transport is not None
        self.status, self.headers = 0, []
        self.done = self._complete = self._to_the_end = False
        self._bare = self._waiting = 0  # what nobody has read of the last answer is gone
        self._pool = pool
        self._transport.write(data)
        try:
            while not self.status:
                await self._change(timeout_s)
        except BaseException:
            self.close()
            raise
        return Reply(self)

    async def read(self, timeout_s: float) -> bytes:
        while not self._body and not self._complete:
            await self._change(timeout_s)
        if not self._body:
            self._finish()
            return b""
        data = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body.clear()
        self._waiting = 0
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return data

    def close(self) -> None:
        """Ends the request, and with it the connection unless all of the answer is here."""
        if self._complete:
            self._body.clear()
            return self._finish()
        self.done = True
        self._fail("closed", "the connection was given up")
        return self.abandon()

    def abandon(self) -> None:
        """Ends the connection."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are none by their class

    def connection_lost(self, error: Exception | None) -> None:
        if self._to_the_end and error is None and not self._complete:
            self._complete = True
            self._wake()
        if self._timer is not None:
            self._timer.cancel()
        self._fail("closed", "the engine ended the connection")

    def data_received(self, data: bytes) -> None:
        if self.done:
            return self._protocol("an answer that nobody asked for")
        self._bare += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            return self._protocol(f"no answer in HTTP: {error}")
        if self._bare > _HEAD and not self._complete:
            return self._protocol("an answer's head, or trailers, that do not end")
        if self._waiting > _WAITING and not self._paused and not self._complete:
            assert self._transport is not None
            self._paused = True
            self._transport.pause_reading()
        return self._wake()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.status:  # what comes behind a body is no part of the head
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            self.headers = []
            return
        self.status = status
        heads = dict(self.headers)
        framed = b"content-length" in heads or b"transfer-encoding" in heads
        self._to_the_end = not framed and status not in (204, 304)

    def on_body(self, body: bytes) -> None:
        self._body.append(body)
        self._waiting += len(body)
        self._bare = 0

    def on_message_complete(self) -> None:
        self._complete, self._keeps = self.status != 0, self._parser.should_keep_alive()

    def _finish(self) -> None:
        """Back to the pool, where the engine keeps the connection."""
        if self.done:
            return
        self.done = True
        if self._pool is not None and self._failure is None and not self._to_the_end and self._keeps:
            self._pool.give_back(self)
        else:
            self.abandon()

    def _change(self, timeout_s: float) -> "asyncio.Future[None]":
        """Comes with whatever comes next. Raises UpstreamError where nothing will."""
        if self._failure is not None:
            raise self._failure
        self._waiter = self._loop.create_future()
        self._patience_s, self._until = timeout_s, self._loop.time() + timeout_s
        if self._timer is None or self._timer.when() > self._until:
            self._look_at_the_end()
        return self._waiter

    def _look_at_the_end(self) -> None:
        """A timer for many waits: setting one, and cancelling it, costs as much as a system call."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(self._until, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._waiter is not None and self._loop.time() >= self._until:
            self._fail("timeout", f"nothing came for {self._patience_s:g} s")
        elif self._waiter is not None:
            self._look_at_the_end()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _fail(self, reason: str, message: str) -> None:
        if self._failure is None:
            self._failure = UpstreamError(reason, message)
        if self._pool is not None:
            self._pool.forget(self)
        self._wake()

    def _protocol(self, message: str) -> None:
        self._fail("protocol", message)
        self.abandon()


class Pool:
    """An engine's connections: an `Upstream`. One that was idle may have been closed at its other end just now, so a
    request on it that is not answered at all is sent once more, on a new one.
    """

    def __init__(self, url: str, connect_s: float, token: str | None = None) -> None:
        """token: the engine's API key. Raises InputError for what is no address."""
        parts = parse_url(url)
        if not parts.hostname:
            raise InputError(f"{url[:200]!r}: must be an address such as http://10.0.0.1:8000")
        self._host, self._port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._connect_s = connect_s
        self._prefix = parts.path.rstrip("/").encode()
        bearer = f"authorization: Bearer {token}\r\n" if token else ""
        self._fixed = f" HTTP/1.1\r\nhost: {parts.netloc}\r\n{bearer}".encode()
        self._idle: list[Connection] = []
        self._closed = False

    async def post(self, path: bytes, headers: Headers, body: bytes, timeout_s: float) -> Reply:
        lines = [b"POST ", self._prefix, path, self._fixed]
        for name, value in headers:
            lines += (name, b": ", value, b"\r\n")
        lines += (b"content-length: %d\r\n\r\n" % len(body), body)
        return await self._ask(b"".join(lines), timeout_s)

    async def get(self, path: bytes, timeout_s: float) -> Reply:
        """Asks without a body."""
        return await self._ask(b"".join((b"GET ", self._prefix, path, self._fixed, b"\r\n")), timeout_s)

    async def _ask(self, data: bytes, timeout_s: float) -> Reply:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                try:
                    return await connection.ask(self, data, timeout_s)
                except UpstreamError as error:
                    if error.reason != "closed" or connection.status:
                        raise
                    break
        return await (await self._connect()).ask(self, data, timeout_s)

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_s):
                more: dict[str, Any] = {"ssl": self._ssl} if self._ssl else {}
                _, connection = await loop.create_connection(Connection, self._host, self._port, **more)
                return connection
        except TimeoutError:
            raise UpstreamError("timeout", f"no connection in {self._connect_s:g} s") from None
        except OSError as error:
            raise UpstreamError("refused", f"no connection: {error}") from None

    def give_back(self, connection: Connection) -> None:
        if self._closed or len(self._idle) >= _IDLE:
            connection.abandon()
        else:
            self._idle.append(connection)

    def forget(self, connection: Connection) -> None:
        if connection in self._idle:
            self._idle.remove(connection)

    def close(self) -> None:
        self._closed = True
        for connection in [*self._idle]:
            connection.abandon()
        self._idle.clear()
