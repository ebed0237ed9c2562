"""HTTP/1.1 from clients: what an application is told of a request, what a client gets of its answer, and what clients
may do to a connection before and behind that.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.serve import inbound, process

Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter
App = Callable[[Any, Any, Any], Awaitable[None]]

DEADLINE_S = 30.0
HEAD = b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n"
GET = b"GET /%d HTTP/1.1\r\nhost: a\r\n\r\n"


@contextlib.asynccontextmanager
async def service(app: App, grace_s: float = 1, keep_alive_s: int = 1) -> AsyncIterator[tuple[process.Server, Any]]:
    """Serves until its end, which it waits for; and its address."""
    listening = process.listen("127.0.0.1", 0)
    http = process.Server(process.settings(app, grace_s, keep_alive_s=keep_alive_s))
    serving = asyncio.ensure_future(http.serve([listening]))
    await process.until_begun(http, serving)
    async with asyncio.timeout(DEADLINE_S):
        yield http, listening.getsockname()
        http.should_exit = True
        await serving


def served(app: App, client: Callable[[Reader, Writer], Awaitable[None]], keep_alive_s: int = 1) -> None:
    """A client of an application, over a socket."""

    async def main() -> None:
        async with service(app, keep_alive_s=keep_alive_s) as (_, address):
            reader, writer = await asyncio.open_connection(*address)
            await client(reader, writer)
            writer.close()

    asyncio.run(main())


async def body_of(receive: Any) -> bytes:
    body, more = bytearray(), True
    while more:
        message = await receive()
        body += message["body"]
        more = message["more_body"]
    return bytes(body)


async def answer(send: Any, body: bytes, headers: Sequence[tuple[bytes, bytes]] = (), status: int = 200) -> None:
    length = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers or length})
    await send({"type": "http.response.body", "body": body})


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with what it was told."""
    told = {name: scope[name] for name in ("method", "path", "http_version", "type", "scheme")}
    told |= {"query": scope["query_string"].decode(), "raw": scope["raw_path"].decode()}
    told |= {"headers": [[name.decode(), value.decode()] for name, value in scope["headers"]]}
    await answer(send, json.dumps(told | {"body": (await body_of(receive)).decode()}).encode())


async def read(reader: Reader) -> tuple[int, dict[str, str], bytes]:
    """One answer: status, headers, body."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    first, *lines = head.rstrip().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    body = b""
    if headers.get("transfer-encoding") == "chunked":
        while size := int(await reader.readline(), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
    elif "content-length" in headers:
        body = await reader.readexactly(int(headers["content-length"]))
    return int(first.split()[1]), headers, body


def asks(app: App, request: bytes) -> tuple[tuple[int, dict[str, str], bytes], bool]:
    """The answer to a request, and whether the connection ended behind it."""
    found = []

    async def client(reader: Reader, writer: Writer) -> None:
        writer.write(request)
        found.append(await read(reader))
        writer.write(GET % 0)
        found.append(await reader.read(1) == b"")

    served(app, client)
    return found[0], found[1]


@pytest.mark.parametrize(
    ("line", "path", "raw", "query"),
    [
        (b"GET /a/b?c=d&e HTTP/1.1", "/a/b", "/a/b", "c=d&e"),
        (b"GET /a%20b%C3%BC?c=%20 HTTP/1.1", "/a bü", "/a%20b%C3%BC", "c=%20"),
        (b"GET http://other:80/a?b HTTP/1.1", "/a", "/a", "b"),
        (b"GET http://other HTTP/1.1", "/", "/", ""),
        (b"OPTIONS * HTTP/1.1", "*", "*", ""),
    ],
)
def test_an_application_is_told_what_was_asked(line: bytes, path: str, raw: str, query: str) -> None:
    (status, _, body), ended = asks(echo, line + b"\r\nHost: a\r\nX-Y:  z\r\n\r\n")
    told = json.loads(body)
    assert (status, ended) == (200, False)
    assert (told["path"], told["raw"], told["query"], told["type"], told["scheme"]) == (
        path,
        raw,
        query,
        "http",
        "http",
    )
    assert told["headers"] == [["host", "a"], ["x-y", "z"]]
    assert told["method"] == line.split()[0].decode()


def test_requests_that_come_together_are_answered_in_turn() -> None:
    begun: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        begun.append(scope["path"])
        await asyncio.sleep(0)
        await echo(scope, receive, send)

    async def client(reader: Reader, writer: Writer) -> None:
        post = b"POST /p HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nabc"
        writer.write(GET % 1 + post + GET % 2)
        paths = [json.loads((await read(reader))[2]) for _ in range(3)]
        assert [one["path"] for one in paths] == ["/1", "/p", "/2"] == begun
        assert paths[1]["body"] == "abc"
        writer.write(GET % 3)
        assert json.loads((await read(reader))[2])["path"] == "/3"

    served(app, client)


bodies = st.lists(st.tuples(st.booleans(), st.binary(max_size=40)), min_size=1, max_size=6)


@settings(max_examples=20)
@given(bodies, st.lists(st.integers(1, 60), max_size=30))
def test_requests_are_the_same_however_their_bytes_come(asked: list[tuple[bool, bytes]], cuts: list[int]) -> None:
    sent = b""
    for i, (chunked, body) in enumerate(asked):
        head = b"POST /%d HTTP/1.1\r\nhost: a\r\n" % i
        if chunked:
            pieces = [body[:7], body[7:]]
            framed = b"".join(b"%x\r\n%b\r\n" % (len(one), one) for one in pieces if one) + b"0\r\n\r\n"
            sent += head + b"transfer-encoding: chunked\r\n\r\n" + framed
        else:
            sent += head + b"content-length: %d\r\n\r\n%b" % (len(body), body)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = await body_of(receive)
        await answer(send, scope["path"].encode() + b" " + body)

    async def client(reader: Reader, writer: Writer) -> None:
        rest = sent
        for size in cuts:
            writer.write(rest[:size])
            await writer.drain()
            await asyncio.sleep(0)  # the server has its turn
            rest = rest[size:]
        writer.write(rest)
        told = [(await read(reader))[2] for _ in asked]
        assert told == [b"/%d %b" % (i, body) for i, (_, body) in enumerate(asked)]

    served(app, client)


def test_requests_that_nobody_waits_for_the_answers_of_are_bounded() -> None:
    async def app(_: Any, __: Any, ___: Any) -> None:
        await asyncio.Event().wait()

    async def client(reader: Reader, writer: Writer) -> None:
        writer.write(GET % 1 * 1000)
        await reader.read()  # to its end

    served(app, client)


@pytest.mark.parametrize(
    ("request_", "ends"),
    [
        (b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n", True),
        (b"GET / HTTP/1.0\r\nhost: a\r\n\r\n", True),
        (b"GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n", True),
        (b"GET / HTTP/1.1\r\nhost: a\r\n\r\n", False),
    ],
)
def test_who_wants_no_second_answer_gets_none(request_: bytes, ends: bool) -> None:
    (status, headers, body), ended = asks(echo, request_)
    assert (status, ended) == (200, ends)
    assert (headers.get("connection") == "close") == ends
    assert json.loads(body)["path"] == "/"


def test_an_answer_is_framed_as_its_client_can_read_it() -> None:
    async def app(scope: Any, _: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204 if scope["path"] == "/204" else 200})
        for part in (b"ab", b"", b"cd"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body"})

    (_, headers, body), ended = asks(app, GET % 1)
    assert (headers["transfer-encoding"], body, ended) == ("chunked", b"abcd", False)
    (status, headers, body), ended = asks(app, GET % 204)
    assert (status, "transfer-encoding" in headers, body, ended) == (204, False, b"", False)
    (_, headers, body), ended = asks(app, b"HEAD / HTTP/1.1\r\nhost: a\r\n\r\n")
    assert ("transfer-encoding" in headers, body, ended) == (False, b"", False)

    async def old(reader: Reader, writer: Writer) -> None:
        writer.write(b"GET / HTTP/1.0\r\n\r\n")
        head, _, rest = (await reader.read()).partition(b"\r\n\r\n")
        assert b"connection: close" in head
        assert b"transfer-encoding" not in head
        assert rest == b"abcd"

    served(app, old)


def test_a_client_is_told_to_send_its_body_once_that_is_wanted() -> None:
    async def client(reader: Reader, writer: Writer) -> None:
        writer.write(b"POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"ab")
        assert json.loads((await read(reader))[2])["body"] == "ab"

    served(echo, client)

    async def refuses(_: Any, __: Any, send: Any) -> None:
        await answer(send, b"no", [(b"content-length", b"2"), (b"connection", b"close")], 413)

    request = b"POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n"
    (status, _, body), ended = asks(refuses, request)
    assert (status, body, ended) == (413, b"no", True)


def test_a_body_that_nobody_reads_is_not_taken_off_the_wire_and_one_that_nobody_wants_is_dropped() -> None:
    taken = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/late":
            await taken.wait()
            assert len(await body_of(receive)) == 16 << 20
        await answer(send, b"ok")

    async def client(reader: Reader, writer: Writer) -> None:
        size = 16 << 20
        writer.write(b"POST /late HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % size + bytes(size))
        left = [-1, size]
        while left[-1] != left[-2]:  # until sockets hold what they can
            await asyncio.sleep(0.1)
            left.append(writer.transport.get_write_buffer_size())
        assert left[-1] > 8 << 20
        taken.set()
        assert (await read(reader))[0] == 200
        writer.write(b"POST /now HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % size + bytes(size) + GET % 1)
        assert [(await read(reader))[2] for _ in range(2)] == [b"ok", b"ok"]

    served(app, client, keep_alive_s=30)


def test_an_application_hears_that_its_client_has_left_and_writes_to_nobody() -> None:
    heard: list[str] = []
    over = asyncio.Event()

    async def app(_: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        while True:
            heard.append((await receive())["type"])
            if heard[-1] == "http.disconnect":
                break
        await send({"type": "http.response.body", "body": b"to nobody", "more_body": True})
        over.set()

    async def client(reader: Reader, writer: Writer) -> None:
        writer.write(GET % 1)
        await reader.readline()
        writer.transport.abort()
        await over.wait()

    served(app, client)
    assert heard == ["http.request", "http.disconnect"]


def test_an_application_waits_for_a_client_that_does_not_read_and_is_let_go_when_it_leaves() -> None:
    sent, over = 0, asyncio.Event()

    async def app(_: Any, __: Any, send: Any) -> None:
        nonlocal sent
        await send({"type": "http.response.start", "status": 200})
        while sent < 1 << 30:
            before = sent
            sent += 1 << 20
            await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})
            if over.is_set() and sent > before + (8 << 20):
                break
        over.set()

    async def client(reader: Reader, writer: Writer) -> None:
        writer.transport.pause_reading()
        writer.write(GET % 1)
        sizes = [-1, 0]
        while sizes[-1] != sizes[-2] or not sent:  # until it waits
            sizes.append(sent)
            await asyncio.sleep(0.1)
        assert sent < 256 << 20
        writer.transport.abort()
        await over.wait()  # as nothing is in its way

    served(app, client)


@pytest.mark.parametrize("begun", [False, True])
def test_an_application_that_fails_is_logged_and_its_client_hears_of_it(
    begun: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def app(_: Any, __: Any, send: Any) -> None:
        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
            await send({"type": "http.response.body", "body": b"abc", "more_body": True})
        raise ValueError("as told")

    async def client(reader: Reader, writer: Writer) -> None:
        writer.write(GET % 1)
        whole = await reader.read()
        assert whole.startswith(b"HTTP/1.1 200 OK\r\n" if begun else b"HTTP/1.1 500 Internal Server Error\r\n")
        assert whole.endswith(b"\r\n\r\nabc" if begun else b"Internal Server Error")

    with caplog.at_level(logging.ERROR, "cairn"):
        served(app, client)
    assert ["a request failed: GET /1" in one.getMessage() for one in caplog.records] == [True]


@pytest.mark.parametrize(
    ("headers", "parts"),
    [
        ([(b"content-length", b"2")], [b"abc"]),
        ([(b"content-length", b"4")], [b"abc"]),
        ([(b"x", b"a\r\nset-cookie: b")], [b"abc"]),
        ([(b"x\n", b"a")], [b"abc"]),
    ],
)
def test_an_answer_that_is_none_is_not_sent(
    headers: list[tuple[bytes, bytes]], parts: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    async def app(_: Any, __: Any, send: Any) -> None:
        await answer(send, b"".join(parts), headers)

    async def client(reader: Reader, writer: Writer) -> None:
        writer.write(GET % 1)
        whole = await reader.read()
        assert b"set-cookie" not in whole
        assert b"abc" not in whole

    with caplog.at_level(logging.CRITICAL, "cairn"):
        served(app, client)


@pytest.mark.parametrize("data", [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nbad header\r\n\r\n", b"\x16\x03\x01\r\n"])
def test_what_is_no_http_is_refused(data: bytes) -> None:
    (status, headers, _), ended = asks(echo, data)
    assert (status, headers["connection"], ended) == (400, "close", True)


def test_the_bound_on_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_CONNECTIONS", 1)
    (status, _, body), ended = asks(echo, GET % 1)
    assert (status, body, ended) == (503, b"too many connections", True)


def test_a_request_that_is_still_served_at_the_end_is_told_so() -> None:
    async def app(_: Any, __: Any, ___: Any) -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        async with service(app) as (http, address):
            reader, writer = await asyncio.open_connection(*address)
            idle, _ = await asyncio.open_connection(*address)
            writer.write(GET % 1)
            while not http.server_state.tasks:
                await asyncio.sleep(0)
            http.should_exit = True
            assert await idle.read() == b""  # at once
            assert (await read(reader))[0] == 503  # when its time is up
            assert await reader.read() == b""

    asyncio.run(main())


def test_an_answer_that_is_under_way_at_the_end_is_the_last_of_its_connection() -> None:
    async def main() -> None:
        ending = asyncio.Event()
        async with service(patient(ending), grace_s=20, keep_alive_s=25) as (http, address):
            idle, _ = await asyncio.open_connection(*address)
            reader, writer = await asyncio.open_connection(*address)
            writer.write(GET % 1)
            await reader.readuntil(b"\r\n\r\n")
            http.should_exit = True
            assert await idle.read() == b""  # the end has begun
            ending.set()
            assert (await reader.read()).endswith(b".\r\n0\r\n\r\n")

    begun = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - begun < 15, "it waits for nobody who is idle"


def test_who_never_reads_a_last_answer_does_not_keep_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbound, "_LAST_S", 0.2)

    async def app(_: Any, __: Any, send: Any) -> None:
        size = 64 << 20
        await answer(send, bytes(size), [(b"content-length", b"%d" % size), (b"connection", b"close")])

    async def main() -> None:
        async with service(app) as (http, address):
            _, writer = await asyncio.open_connection(*address)
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(GET % 1)
            while not http.server_state.connections:
                await asyncio.sleep(0)
            while http.server_state.connections:  # or the deadline ends it
                await asyncio.sleep(0.01)

    asyncio.run(main())


def test_what_stands_behind_a_body_is_no_header() -> None:
    request = HEAD + b"\r\n1\r\na\r\n0\r\nauthorization: Bearer b\r\n\r\n"
    (status, _, body), _ = asks(echo, request)
    assert (status, json.loads(body)["body"]) == (200, "a")
    assert [name for name, _ in json.loads(body)["headers"]] == ["host", "transfer-encoding"]


def patient(ended: asyncio.Event) -> App:
    """An application that answers with the body, and a word more once the event is set."""

    async def app(_: Any, receive: Any, send: Any) -> None:
        body = await body_of(receive)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        await ended.wait()
        await send({"type": "http.response.body", "body": b"."})

    return app


@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\nhos"])
@pytest.mark.parametrize("first", [b"", b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"])
def test_who_does_not_bring_a_head_is_hung_up_on(begun: bytes, first: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbound, "_HEAD_S", 0.2)

    ended = asyncio.Event()

    async def client(reader: Reader, writer: Writer) -> None:
        ended.set()
        writer.write(first)
        if first:
            await reader.readuntil(b"0\r\n\r\n")
        writer.write(begun)
        await reader.read()

    served(patient(ended), client)


def test_a_head_that_comes_bit_by_bit_gets_no_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbound, "_HEAD_S", 0.3)

    async def client(reader: Reader, writer: Writer) -> None:
        ended = asyncio.ensure_future(reader.read())
        writer.write(b"GET / HTTP/1.1\r\n")
        while not ended.done():
            with contextlib.suppress(ConnectionError):
                writer.write(b"a: b\r\n")
                await writer.drain()
            await asyncio.wait([ended], timeout=0.1)

    served(echo, client)


@pytest.mark.parametrize("before", [b"GET / HTTP/1.1\r\n", b"GET /", HEAD + b"\r\n1;", HEAD + b"\r\n0\r\n"])
@pytest.mark.parametrize("more", [b"a: b\r\n", b"a"])
def test_a_head_has_an_end(before: bytes, more: bytes) -> None:
    """So have a body's extensions and trailers."""

    ended = asyncio.Event()

    async def client(_: Reader, writer: Writer) -> None:
        writer.write(before)
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 16 << 20:
                writer.write(1000 * more)
                sent += 1000 * len(more)
                await writer.drain()
                await asyncio.sleep(0)
        assert sent < 16 << 20

    served(patient(ended), client)


def test_pieces_and_long_answers_are_no_heads_that_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbound, "_HEAD_S", 0.2)

    ended = asyncio.Event()

    async def client(reader: Reader, writer: Writer) -> None:
        for byte in HEAD + b"\r\n" + 20_000 * b"1\r\na\r\n" + b"0\r\n\r\n\r\n":
            writer.write(bytes([byte]))
            if byte == 0x0A:
                await writer.drain()
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(1)  # as long as an answer may take
        ended.set()
        assert (await reader.readuntil(b".\r\n"))[-3:] == b".\r\n"

    served(patient(ended), client)
