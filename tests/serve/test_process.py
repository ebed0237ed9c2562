"""What clients may do to a service's connections before there is a request."""

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from cairn.serve import process

Client = Callable[[asyncio.StreamReader, asyncio.StreamWriter, asyncio.Event], Awaitable[None]]

DEADLINE_S = 30.0
HEAD = b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n"


def served(client: Client) -> None:
    """A client of a service that answers with the body, once the event is set."""

    async def main() -> None:
        ended = asyncio.Event()

        async def app(_: Any, receive: Any, send: Any) -> None:
            body, more = b"", True
            while more:
                message = await receive()
                body, more = body + message["body"], message["more_body"]
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": body, "more_body": True})
            await ended.wait()
            await send({"type": "http.response.body", "body": b"."})

        listening = process.listen("127.0.0.1", 0)
        http = process.Server(process.settings(app, 1, keep_alive_s=1))
        serving = asyncio.ensure_future(http.serve([listening]))
        await process.until_begun(http, serving)
        async with asyncio.timeout(DEADLINE_S):
            reader, writer = await asyncio.open_connection(*listening.getsockname())
            await client(reader, writer, ended)
            writer.close()
            http.should_exit = True
            await serving

    asyncio.run(main())


@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\nhos"])
@pytest.mark.parametrize("first", [b"", b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"])
def test_who_does_not_bring_a_head_is_hung_up_on(begun: bytes, first: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_HEAD_S", 0.2)

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ended: asyncio.Event) -> None:
        ended.set()
        writer.write(first)
        if first:
            await reader.readuntil(b"0\r\n\r\n")
        writer.write(begun)
        await reader.read()

    served(client)


@pytest.mark.parametrize("before", [b"GET / HTTP/1.1\r\n", b"GET /", HEAD + b"\r\n1;", HEAD + b"\r\n0\r\n"])
@pytest.mark.parametrize("more", [b"a: b\r\n", b"a"])
def test_a_head_has_an_end(before: bytes, more: bytes) -> None:
    """So have a body's extensions and trailers."""

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: asyncio.Event) -> None:
        writer.write(before)
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 16 << 20:
                writer.write(1000 * more)
                sent += 1000 * len(more)
                await writer.drain()
                await asyncio.sleep(0)
        assert sent < 16 << 20

    served(client)


def test_pieces_and_long_answers_are_no_heads_that_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_HEAD_S", 0.2)

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ended: asyncio.Event) -> None:
        for byte in HEAD + b"\r\n" + 20_000 * b"1\r\na\r\n" + b"0\r\n\r\n\r\n":
            writer.write(bytes([byte]))
            if byte == 0x0A:
                await writer.drain()
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(1)  # as long as an answer may take
        ended.set()
        assert (await reader.readuntil(b".\r\n"))[-3:] == b".\r\n"

    served(client)


#: Says so when it has begun, and then waits for what hears of no signal.
_STARTS = """
import time
from cairn.serve.indexer.parts import Parts

def start(*_):
    print("starts", flush=True)
    time.sleep(60)

Parts.start = start
from cairn.cli import main
main()
"""


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_a_service_that_still_starts_ends_at_once(by: signal.Signals) -> None:
    """And not only when the time is up that running requests have, as if something had gone wrong."""
    command = [sys.executable, "-c", _STARTS, "index", "--http-port", "0", "--no-rpc", "--set", "index.shutdown_s=25"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as service:
        assert service.stdout is not None
        assert service.stdout.readline() == "starts\n"
        began = time.monotonic()
        service.send_signal(by)
        _, complaint = service.communicate(timeout=DEADLINE_S)
    assert (service.returncode, complaint) == (130, "")
    assert time.monotonic() - began < 20
