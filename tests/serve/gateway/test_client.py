"""A client whose body is awaited: it is late, or the request ends for another reason."""

import asyncio
from typing import Any

import pytest

from cairn.serve.base import RequestError
from cairn.serve.gateway.client import Client, Waits


async def _never() -> Any:
    await asyncio.Event().wait()


async def _body(within_s: float) -> bytes:
    waits = Waits.of(within_s, 60.0)
    return await Client({"headers": [], "query_string": b""}, _never, lambda _: _never(), waits).body(10)


def test_a_body_that_does_not_come_in_time_is_refused_and_the_request_goes_on() -> None:
    async def run() -> None:
        with pytest.raises(RequestError, match="has not come") as told:
            await _body(0.01)
        assert told.value.status == 408
        await asyncio.sleep(0)
        task = asyncio.current_task()
        assert task is not None
        assert not task.cancelling()

    asyncio.run(run())


def test_a_request_that_is_cancelled_while_its_body_comes_is_not_late() -> None:
    async def run() -> None:
        task = asyncio.create_task(_body(60.0))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


def test_a_client_that_reads_nothing_for_long_has_left_and_one_that_is_slow_has_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        loop, read, now = asyncio.get_running_loop(), asyncio.Event(), 1.0
        monkeypatch.setattr(loop, "time", lambda: now)

        async def later(seconds: float) -> None:
            nonlocal now
            now += seconds
            for _ in range(5):
                await asyncio.sleep(0)

        async def send(_: Any) -> None:
            await read.wait()
            read.clear()

        async def answer() -> None:
            clients.append(Client({"headers": [], "query_string": b""}, _never, send, Waits.of(60.0, 10.0)))
            while True:
                await clients[0].send(b"", more=True)

        clients: list[Client] = []
        task = asyncio.create_task(answer())
        for _ in range(5):  # pieces that take six seconds each
            await later(6.0)
            read.set()
            await later(0.0)
        left = []
        for seconds in (9.0, 1.1):
            await later(seconds)
            left.append(clients[0].left)
        assert left == [False, True]
        assert task.cancelled()
        clients[0].close()

    asyncio.run(run())
