"""The client to engines, against servers that answer in every legal way, and in others."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.serve.gateway.base import UpstreamError
from cairn.serve.gateway.http1 import Connection, Pool

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

DEADLINE_S = 30.0


@asynccontextmanager
async def serving(script: Script) -> AsyncIterator[tuple[Pool, list[int]]]:
    """A server that runs the script on each connection, and a counter of those."""
    connections: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(1)
        try:
            await script(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        pool = Pool(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/base", 5.0)
        yield pool, connections
        pool.close()


async def request_of(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    size = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
    return head + await reader.readexactly(size)


async def all_of(pool: Pool, body: bytes = b"{}", timeout_s: float = DEADLINE_S) -> tuple[int, bytes]:
    answer = await pool.post(b"/v1", [(b"x-a", b"b")], body, timeout_s)
    found = b""
    while data := await answer.read(timeout_s):
        found += data
    answer.close()
    return answer.status, found


def answers_with(pieces: Sequence[bytes], *, keep: bool) -> Script:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await request_of(reader)
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            if not keep:
                return

    return script


def chunked(body: bytes, places: list[int]) -> bytes:
    ends = [0, *sorted({place % len(body) for place in places} - {0}), len(body)] if body else [0]
    chunks = [body[one:other] for one, other in pairwise(ends)]
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


@settings(deadline=None, max_examples=30)
@given(
    body=st.binary(max_size=3000),
    places=st.lists(st.integers(0, 5000), max_size=6),
    framing=st.sampled_from(["length", "chunks", "end", "interim"]),
)
def test_any_answer_comes_whole_however_it_is_cut(body: bytes, places: list[int], framing: str) -> None:
    head = b"HTTP/1.1 201 Fine\r\nX-One: 1\r\n"
    wire = {
        "length": head + b"content-length: %d\r\n\r\n" % len(body) + body,
        "chunks": head + b"transfer-encoding: chunked\r\n\r\n" + chunked(body, places),
        "end": head + b"\r\n" + body,
        "interim": b"HTTP/1.1 100 Continue\r\n\r\n" + head + b"content-length: %d\r\n\r\n" % len(body) + body,
    }[framing]
    ends = [0, *sorted(place % (len(wire) + 1) for place in places), len(wire)]
    pieces = [wire[one:other] for one, other in pairwise(ends)]

    async def main() -> None:
        async with asyncio.timeout(DEADLINE_S), serving(answers_with(pieces, keep=framing != "end")) as (pool, made):
            for _ in range(3):
                assert await all_of(pool) == (201, body)
            assert len(made) == (3 if framing == "end" else 1)

    asyncio.run(main())


def test_trailers_are_no_headers() -> None:
    wire = b"HTTP/1.1 200 OK\r\nX-One: 1\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\nX-Late: 2\r\n\r\n"

    async def main() -> None:
        async with asyncio.timeout(DEADLINE_S), serving(answers_with([wire], keep=True)) as (pool, made):
            for _ in range(2):
                answer = await pool.post(b"/v1", [], b"{}", DEADLINE_S)
                while await answer.read(DEADLINE_S):
                    pass
                assert answer.headers == [(b"x-one", b"1"), (b"transfer-encoding", b"chunked")]
            assert len(made) == 1

    asyncio.run(main())


@pytest.mark.parametrize(
    "begun",
    [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n"],
    ids=["head", "trailers"],
)
def test_a_head_or_trailers_without_end_end_the_answer(begun: bytes) -> None:
    """Each line is something new, so no deadline ever passes."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        writer.write(begun)
        while not writer.is_closing():
            writer.write(b"X-More: and more\r\n" * 50)
            await writer.drain()
            await asyncio.sleep(0)

    async def main() -> None:
        async with asyncio.timeout(DEADLINE_S), serving(script) as (pool, _):
            with pytest.raises(UpstreamError, match="do not end"):
                await all_of(pool)

    asyncio.run(main())


def test_the_request_is_what_was_asked_for() -> None:
    got: list[bytes] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.append(await request_of(reader))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

    async def main() -> None:
        async with serving(script) as (pool, _):
            assert await all_of(pool, b'{"a":1}') == (200, b"")

    asyncio.run(main())
    line, *_ = got[0].split(b"\r\n")
    assert line == b"POST /base/v1 HTTP/1.1"
    assert got[0].endswith(b'x-a: b\r\ncontent-length: 7\r\n\r\n{"a":1}')


def test_a_connection_that_was_closed_while_idle_is_no_failure() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        await writer.drain()
        await request_of(reader)  # and closes without a word: the second request has come on a dying connection

    async def main() -> None:
        async with asyncio.timeout(DEADLINE_S), serving(script) as (pool, made):
            assert [await all_of(pool), await all_of(pool)] == [(200, b"ok")] * 2
            assert len(made) == 2

    asyncio.run(main())


@pytest.mark.parametrize(
    ("wire", "reason"),
    [
        (b"", "closed"),
        (b"HTTP/1.1 200 OK\r\ncontent-le", "closed"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nshort", "closed"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nshort\r\n", "closed"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "protocol"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", "protocol"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * (1 << 20), "protocol"),
    ],
)
def test_what_is_no_whole_answer_is_a_failure(wire: bytes, reason: str) -> None:
    async def main() -> None:
        async with asyncio.timeout(DEADLINE_S), serving(answers_with([wire], keep=False)) as (pool, _):
            with pytest.raises(UpstreamError) as caught:
                await all_of(pool)
            assert caught.value.reason == reason

    asyncio.run(main())


def test_silence_ends_at_the_deadline() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        await reader.read()  # until the other end gives up

    async def main() -> None:
        async with asyncio.timeout(DEADLINE_S), serving(script) as (pool, _):
            with pytest.raises(UpstreamError, match="nothing came") as caught:
                await all_of(pool, timeout_s=0.05)
            assert caught.value.reason == "timeout"

    asyncio.run(main())


def test_nobody_there() -> None:
    async def main() -> None:
        with pytest.raises(UpstreamError) as caught:
            await all_of(Pool("http://127.0.0.1:9", 5.0))
        assert caught.value.reason == "refused"

    asyncio.run(main())


def test_closing_one_answer_leaves_the_next_alone() -> None:
    """The handle of an answer that has ended does not touch the connection, which serves another by then."""

    async def main() -> None:
        wire = [b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n", b"ok"]
        async with asyncio.timeout(DEADLINE_S), serving(answers_with(wire, keep=True)) as (pool, made):
            first = await pool.post(b"/v1", [], b"", DEADLINE_S)
            while await first.read(DEADLINE_S):
                pass
            second = await pool.post(b"/v1", [], b"", DEADLINE_S)
            first.close()
            assert await second.read(DEADLINE_S) == b"ok"
            assert len(made) == 1

    asyncio.run(main())


class _Flow(asyncio.Transport):
    """A connection's other side: told to stop and to go on."""

    stopped = False

    def write(self, data: object) -> None: ...

    def abort(self) -> None: ...

    def pause_reading(self) -> None:
        self.stopped = True

    def resume_reading(self) -> None:
        self.stopped = False


def test_an_answer_that_was_left_unread_does_not_stop_the_next_one() -> None:
    """All of a large answer is there when its client leaves; the next one's head comes before its body."""

    async def main() -> None:
        loop, pool = asyncio.get_running_loop(), Pool("http://127.0.0.1:1", 5.0)
        flow, connection = _Flow(), Connection()
        connection.connection_made(flow)
        head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n"
        loop.call_soon(connection.data_received, head % 300_000 + bytes(300_000))
        (await connection.ask(pool, b"", DEADLINE_S)).close()
        assert connection.usable
        loop.call_soon(connection.data_received, head % 2)
        answer = await connection.ask(pool, b"", DEADLINE_S)
        assert not flow.stopped
        loop.call_soon(connection.data_received, b"ok")
        assert await answer.read(DEADLINE_S) == b"ok"

    asyncio.run(main())
