"""One request on its way through failures, in one process: engines that follow a script, and the real scheduler."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from cairn.cluster import Instance
from cairn.cluster.directory import Joined
from cairn.cluster.directory import Member as Reported
from cairn.config.schema import Serve
from cairn.plan.role import Role
from cairn.plan.schedule import RoundRobin, SloAware
from cairn.plan.schedule.base import Ask, Scheduler, Send
from cairn.serve.base import RequestError
from cairn.serve.gateway.asked import COMPLETIONS, Asked, edited
from cairn.serve.gateway.base import Prompt
from cairn.serve.gateway.client import Client, Waits
from cairn.serve.gateway.dispatch import Dispatch
from cairn.serve.gateway.members import Members
from cairn.serve.gateway.metrics import GatewayMetrics
from cairn.serve.gateway.models import Models
from cairn.serve.gateway.relay import Relay
from cairn.serve.gateway.sse import DONE, encode, payloads
from tests.serve.gateway.test_http1 import request_of

TEXT = " one two three four five six"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class Known:
    """A `Prompts`: nobody holds anything."""

    async def look(self, asked: Asked) -> Prompt:
        return Prompt(100, {})

    def sent(self, prompt: Prompt, instance: str) -> None: ...

    def forget(self, instance: str) -> None: ...


def word(text: str, index: int = 0, end: str | None = None) -> bytes:
    return encode({"id": "a", "choices": [{"index": index, "text": text, "finish_reason": end}]})


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def going_on(body: dict[str, Any]) -> list[bytes]:
    """The events of an engine that says `TEXT` after the prompt "P"."""
    rest = TEXT[len(body["prompt"].removeprefix("P")) :].split(" ")[1:]
    return [*(word(f" {one}") for one in rest), word("", end="stop"), DONE]


@asynccontextmanager
async def engine(
    dies_after: Sequence[bytes] | None = None, dying: Callable[[], None] = lambda: None
) -> AsyncIterator[str]:
    """Answers with `going_on`, or with these events and the end of the connection, just before which it calls."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, _, body = (await request_of(reader)).partition(b"\r\n\r\n")
        events = going_on(json.loads(body)) if dies_after is None else dies_after
        writer.write(HEAD + b"".join(map(chunk, events)) + (b"0\r\n\r\n" if dies_after is None else b""))
        await writer.drain()
        dying()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


class Passage:
    """A relay with a client that keeps what it is sent."""

    def __init__(self, scheduler: Scheduler, **engines: str) -> None:
        config = Serve()
        self.members, self.sent, self.status, self.whole = Members(config), b"", 0, False
        for name, url in engines.items():
            self.members._hear(Joined(Reported(Instance(name=name, incarnation="1", http=url, model="m"))))
        self.dispatch = Dispatch(self.members, scheduler, config, lambda: None)
        self.metrics = GatewayMetrics(self.members)
        self._relay = Relay(self.members, self.dispatch, Known(), config, self.metrics)

    def drain(self, name: str, drains: bool) -> None:
        self.members.drain(self.members.members[name], drains)

    def learn(self) -> None:
        """The scheduler sees many prompts, each computed within 60 ms."""
        scheduler, views = self.dispatch.scheduler, [member.view for member in self.members.members.values()]
        for i in range(40):
            ask, now = Ask(id=f"past {i}", prompt_tokens=80 + 10 * (i % 7), arrived=float(i)), float(i)
            choice = scheduler.choose(ask, views, now)
            assert isinstance(choice, Send)
            scheduler.sent(ask, choice, now)
            scheduler.first_token(ask, now + 0.05 + 0.001 * (i % 7))
            scheduler.finished(ask, now + 0.3, 10)

    async def carry(self, **fields: Any) -> None:
        body = {"model": "m", "prompt": "P", "stream": True, "temperature": 0, "max_tokens": 50} | fields
        asked = Asked(COMPLETIONS, json.dumps(body).replace("Infinity", "1e999").encode())
        client = Client({"headers": [], "query_string": b""}, self._nothing, self._take, Waits.of(60.0, 60.0))
        await self._relay.carry(asked, client)

    async def _nothing(self) -> Any:
        raise AssertionError

    async def _take(self, message: Any) -> None:
        self.status = message.get("status", self.status)
        self.sent += message.get("body", b"")
        self.whole = not message.get("more_body", True)


def said(data: bytes) -> str:
    return "".join(event["choices"][0]["text"] for event in payloads(data))


def test_a_stream_is_gone_on_with_however_long_ago_its_request_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time that the SLO gives a first token is long over when an engine dies in the midst of an answer."""
    clock = SimpleNamespace(offset=0.0)
    clock.monotonic = lambda: time.monotonic() + clock.offset
    for module in ("dispatch", "relay"):
        monkeypatch.setattr(f"cairn.serve.gateway.{module}.time", clock)

    async def main() -> None:
        def a_minute_later() -> None:
            clock.offset = 60.0
            passage.drain("b", False)

        async with engine([word(" one"), word(" two")], a_minute_later) as dying, engine() as other:
            passage = Passage(SloAware(), a=dying, b=other)
            passage.learn()
            passage.drain("b", True)
            await passage.carry()
            assert said(passage.sent) == TEXT
            assert passage.sent.endswith(DONE)

    asyncio.run(main())


@pytest.mark.parametrize("streams", [True, False])
def test_what_tells_no_first_token_is_soon_no_queue(streams: bool) -> None:
    """A stream that another engine goes on with, and an answer that comes at once."""
    begun = [word(" one"), word(" two"), word(" three")]
    rest = [word(" four five"), word(" six", end="stop"), DONE]
    scheduler, decoding = SloAware(), []

    async def main() -> None:
        def look() -> None:
            ledger, view = scheduler._ledger, passage.members.members["b"].view
            slots = ledger.slots([view])
            ledger.estimates(Ask(id="later", prompt_tokens=100, arrived=0.0), slots, time.monotonic() + 60)
            decoding.append(ledger._books["decoding"][slots].tolist())

        def only_b() -> None:
            passage.drain("a", True)
            passage.drain("b", False)

        async with engine(begun, only_b) as dying, engine([word(" three"), *rest], look) as other:
            passage = Passage(scheduler, a=dying, b=other)
            passage.learn()
            passage.drain("b", True)
            if not streams:
                only_b()
            await passage.carry(stream=streams)

    asyncio.run(main())
    assert decoding == [[1]]


@pytest.mark.parametrize("limit", [2**63 - 1, 10**19, 10**30])
def test_no_limit_of_a_client_is_too_large_for_the_scheduler(limit: int) -> None:
    async def main() -> None:
        async with engine() as one:
            passage = Passage(SloAware(), a=one)
            await passage.carry(max_tokens=limit)
            assert said(passage.sent) == TEXT
            ledger = passage.dispatch.scheduler._ledger  # type: ignore[attr-defined]
            assert not ledger._flights
            assert not ledger._books["requests"].any()

    asyncio.run(main())


@pytest.mark.parametrize("asked", [{"n": 2}, {"prompt": ["P", "Q"]}, {"prompt": [[1], [2]]}])
def test_the_end_of_one_choice_is_not_the_end_of_all(asked: dict[str, Any]) -> None:
    """An engine dies when one of two choices has ended: the other is cut off, and the client is told."""

    async def main() -> None:
        async with engine([word(" one"), word(" uno", 1), word("", 0, "stop")]) as dying, engine() as other:
            passage = Passage(RoundRobin(), a=dying, b=other)
            passage.drain("b", True)
            await passage.carry(**asked)
            *_, last = payloads(passage.sent)
            assert "the answer ends here" in last["error"]["message"]

    asyncio.run(main())


@pytest.mark.parametrize("asked", [{}, {"prompt": [1, 2]}, {"prompt": ["P"]}, {"n": 1, "tools": [{}]}])
def test_an_answer_that_has_ended_is_whole_without_its_last_line(asked: dict[str, Any]) -> None:
    async def main() -> None:
        async with engine([word(" one"), word("", 0, "stop")]) as dying:
            passage = Passage(RoundRobin(), a=dying)
            await passage.carry(**asked)
            assert passage.sent == word(" one") + word("", 0, "stop") + DONE

    asyncio.run(main())


@pytest.mark.parametrize("ends", [False, True])
def test_who_asks_for_what_only_engines_can_read_is_told_of_the_end(ends: bool) -> None:
    """Python reads 1e999 as infinite; we refuse it, and so cannot tell whether another engine could go on."""

    async def main() -> None:
        begun = [word(" one"), *([word("", 0, "stop")] if ends else [])]
        async with engine(begun) as dying, engine() as other:
            passage = Passage(RoundRobin(), a=dying, b=other)
            passage.drain("b", True)
            await passage.carry(seed=float("inf"))
            assert passage.sent.startswith(b"".join(begun))
            assert passage.sent.endswith(DONE)
            assert "the answer ends here" in [*payloads(passage.sent)][-1]["error"]["message"]

    asyncio.run(main())


def test_a_very_large_answer_that_is_no_stream_ends_before_its_end_where_the_engine_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No words of ours in its JSON, and no sign that it is whole."""
    monkeypatch.setattr("cairn.serve.gateway.relay._HELD", 1 << 10)
    begun = b'{"choices": [{"text": "' + b"x" * (1 << 12)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        head = HEAD.replace(b"text/event-stream", b"application/json")
        writer.write(head + chunk(begun))
        await writer.drain()
        writer.close()

    async def main() -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            passage = Passage(RoundRobin(), a=url)
            await passage.carry(stream=False)
            assert (passage.status, passage.sent, passage.whole) == (200, begun, False)

    asyncio.run(main())


def test_a_prefill_that_is_answered_with_anything_costs_only_time() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        body = b'{"kv_transfer_params": {"a": "\xff"}}'
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        await writer.drain()
        writer.close()

    async def main() -> None:
        async with engine() as decoding, await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            passage = Passage(RoundRobin(), a=url, b=decoding)
            for name, role in (("a", Role.PREFILL), ("b", Role.DECODE)):
                passage.members.members[name].view.role = role
            await passage.carry()
            assert said(passage.sent) == TEXT
            failed = 'cairn_serve_engine_failures_total{instance="a",reason="protocol"} 1.0'
            assert failed in passage.metrics.exposition().decode()

    asyncio.run(main())


def test_a_client_that_cannot_spell_is_not_the_fault_of_who_prefills() -> None:
    with pytest.raises(RequestError, match="no object in JSON"):
        edited(b'{"\xff": 1}', {"max_tokens": 1})


def test_an_engine_that_lists_what_is_no_text_serves_nothing_by_name() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = b'{"data": [{"id": "\xff"}]}'
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        await writer.drain()
        writer.close()

    async def main() -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            assert (await Models(Passage(RoundRobin(), a=url).members).every())["data"] == []

    asyncio.run(main())


def test_an_engine_that_stalls_in_its_list_of_models_keeps_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cairn.serve.gateway.models._ASK_S", 0.2)

    async def main() -> None:
        left = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{")
            with contextlib.suppress(ConnectionError):
                assert not await reader.read()
            left.set()
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            passage = Passage(RoundRobin(), a=url)
            assert await Models(passage.members).every() == {"object": "list", "data": []}
            async with asyncio.timeout(30):
                await left.wait()

    asyncio.run(main())
