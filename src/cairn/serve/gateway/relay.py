"""One request from its engine's choice to its answer's end, through the failures on its way."""

import re
import time
from collections.abc import Awaitable, Mapping
from typing import Final

import msgspec

from cairn.config.schema import Serve
from cairn.observe.trace import onward, spanned
from cairn.serve.base import RequestError
from cairn.serve.dashboard.traffic import BEGINNING, Recent
from cairn.serve.gateway import sse
from cairn.serve.gateway.asked import Asked
from cairn.serve.gateway.base import Answer, Prompt, Prompts, UpstreamError
from cairn.serve.gateway.client import Client, error_body
from cairn.serve.gateway.continuation import Continuation, DivergedError
from cairn.serve.gateway.disaggregation import prefilled
from cairn.serve.gateway.dispatch import Dispatch, Placed
from cairn.serve.gateway.members import Flight, Members
from cairn.serve.gateway.metrics import GatewayMetrics

#: Bytes of an answer that is no stream which are held back until all of it is here, so that it can be asked for again.
_HELD: Final = 8 << 20
#: Where an answer tells its usage: near its end.
_TAIL: Final = 2048
_NOTHING: Final[Mapping[str, int]] = {}
_USAGE: Final = re.compile(rb'"completion_tokens"\s*:\s*(\d{1,9})')


class Relay:
    """Sends requests to engines and their answers to clients. For one event loop."""

    def __init__(
        self, members: Members, dispatch: Dispatch, prompts: Prompts, config: Serve, metrics: GatewayMetrics
    ) -> None:
        self.members, self.dispatch, self.prompts = members, dispatch, prompts
        self.config, self.metrics = config, metrics

    def carry(self, asked: Asked, client: Client) -> Awaitable[None]:
        """Serves one request. Raises RequestError if nothing has been sent; later a stream ends
        with an event that tells, and any other answer before its end."""
        work, below = self._carry(asked, client), client.given
        return spanned("cairn.serve", work, client.said, below, path=asked.path, model=asked.model)

    async def _carry(self, asked: Asked, client: Client) -> None:
        prompt = await spanned("cairn.score", self.prompts.look(asked), _scored)
        await _Passage(self, asked, client, prompt).run()


def _scored(prompt: Prompt) -> dict[str, int]:
    return {"prompt_tokens": prompt.tokens, "holders": len(prompt.held)}


def _scheduled(placed: Placed) -> dict[str, str]:
    return {"instance": placed.member.name}


class _Passage:
    """One request on its way."""

    def __init__(self, relay: Relay, asked: Asked, client: Client, prompt: Prompt) -> None:
        self._relay, self._config, self._metrics = relay, relay.config, relay.metrics
        self._asked, self._client, self._prompt = asked, client, prompt
        self._headers, self._path = client.headers(), asked.path.encode()
        self._ask = relay.dispatch.ask(asked, prompt)
        self._arrived = self._ask.arrived
        self._tried: list[str] = []
        self._tokens, self._served = 0, ""
        self._first = self._latest = 0.0
        self._events = False  # whether the answer is a stream of events
        self._continuation: Continuation | None = None
        self._transcript: sse.Transcript | None = None
        resume = self._config.resume
        if asked.streams and (resume == "all" or (resume == "greedy" and asked.greedy)):
            self._transcript = sse.Transcript()

    async def run(self) -> None:
        attempts, failure, dispatch = self._config.attempts, None, self._relay.dispatch
        for attempt in range(1, attempts + 1):
            try:
                place = dispatch.place(self._ask, self._asked.model, self._tried)
                placed = await spanned("cairn.schedule", place, _scheduled)
                await self._attempt(placed, last=attempt == attempts)
                break
            except UpstreamError as error:
                failure = error
                if not self._goes_on(last=attempt == attempts):
                    return await self._give_up(error)
                # Time that a dead engine took is not held against it: for the scheduler it comes now. Who goes on with
                # a stream computes more than the prompt, so its first token would teach the wrong thing.
                streams = self._asked.streams and self._continuation is None
                self._ask = msgspec.structs.replace(self._ask, arrived=time.monotonic(), streams=streams)
            except (RequestError, DivergedError) as error:
                if not self._client.started:
                    if failure is not None:  # nobody else is left, whatever the words
                        return await self._give_up(failure)
                    raise
                return await self._give_up(UpstreamError("resume", str(error)))
        self._count()
        return None

    def _count(self) -> None:
        prompt, served, first = self._prompt, self._served, self._first
        self._metrics.timed(self._arrived, first, self._latest, self._tokens)
        traffic, ttft_s = self._metrics.traffic, first - self._arrived if first else None
        if traffic.answered_at(served, prompt.tokens, prompt.held.get(served, _NOTHING), ttft_s):
            traffic.remember(Recent(*self._asked.beginning(BEGINNING), prompt.tokens, prompt.held, served))

    async def _attempt(self, placed: Placed, *, last: bool) -> None:
        scheduler, member = self._relay.dispatch.scheduler, placed.member
        scheduler.sent(self._ask, placed.choice, time.monotonic())
        ended = False
        try:
            with Flight(self._relay.members, member, self._prompt) as flight:
                self._relay.prompts.sent(self._prompt, member.name)
                await spanned("cairn.engine", self._exchange(placed, flight, last=last), instance=member.name)
            ended, self._served = True, member.name
            member.succeeded()
        except UpstreamError as error:
            self._tried.append(member.name)
            self._metrics.failed(member.name, error.reason)
            if error.reason != "status":
                member.failed(time.monotonic())
            raise
        finally:
            if ended:
                scheduler.finished(self._ask, time.monotonic(), self._tokens)
            else:
                scheduler.failed(self._ask, time.monotonic())

    async def _exchange(self, placed: Placed, flight: Flight, *, last: bool) -> None:
        headers = onward(self._headers)
        body = self._continuation.body() if self._continuation else self._asked.body
        if placed.prefill is not None:
            body = await prefilled(self._relay, self._asked, placed.prefill, self._prompt, headers, body)
        config = self._config
        patience_s = config.first_token_s if self._asked.streams else config.answer_s
        answer = await placed.member.pool.post(self._path, headers, body, patience_s)
        try:
            if (answer.status >= 500 or answer.status == 429) and not last:
                raise UpstreamError("status", f"{placed.member.name} answered {answer.status}")
            if _is_stream(answer):
                await self._pass_stream(answer, flight)
            elif self._client.started:
                raise UpstreamError("status", f"{placed.member.name} answered {answer.status} instead of going on")
            else:
                await self._pass_whole(answer)
        finally:
            answer.close()

    async def _pass_whole(self, answer: Answer) -> None:
        """Sends nothing before all of it is here, unless it is very large."""
        pieces: list[bytes] = []
        client, size = self._client, 0
        while data := await answer.read(self._config.answer_s):
            pieces.append(data)
            size += len(data)
            if size > _HELD:
                if not client.started:
                    await client.start(answer.status, answer.headers)
                await client.send(b"".join(pieces), more=True)
                pieces.clear()
                size = 0
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        usage = _USAGE.search(body, max(0, len(body) - _TAIL))
        self._tokens = int(usage[1]) if usage else 0
        self._latest = time.monotonic()
        if not client.started:
            await client.start(answer.status, answer.headers)
        await client.send(body, more=False)

    async def _pass_stream(self, answer: Answer, flight: Flight) -> None:
        events, patience_s = sse.Events(), self._config.first_token_s
        self._events = True
        while data := await answer.read(patience_s):
            whole = events.take(data)
            if not whole:
                continue
            if sse.failed(whole):
                if before := sse.before_failure(whole):
                    await self._send(answer, before)
                raise EngineFailedError(whole[len(before) :])
            if not self._latest:
                self._first = time.monotonic()
                self._relay.dispatch.scheduler.first_token(self._ask, self._first)
            flight.first_token()
            patience_s = self._config.idle_s
            await self._send(answer, whole)
        if events.rest:
            await self._send(answer, events.rest)
        if not self._client.started:
            await self._client.start(answer.status, answer.headers)
        await self._client.send(b"", more=False)

    async def _send(self, answer: Answer, events: bytes) -> None:
        self._latest = time.monotonic()
        if self._continuation is not None:
            events = self._continuation.rewritten(events)
            if not events:
                return
        self._tokens += events.count(b"\n\n")
        if self._transcript is not None:
            self._transcript.add(events)
        if not self._client.started:
            await self._client.start(answer.status, answer.headers)
        await self._client.send(events, more=True)

    def _goes_on(self, *, last: bool) -> bool:
        """Whether another attempt follows; makes what it needs."""
        if last:
            return False
        if not self._client.started:
            self._metrics.retried.add()
            return True
        if self._transcript is None:
            return False
        self._transcript.read()
        if self._transcript.finished or not self._transcript.plain or not self._asked.resumable():
            return False
        self._continuation = Continuation(self._asked, self._transcript)
        self._metrics.resumed.add()
        return True

    async def _give_up(self, error: UpstreamError) -> None:
        """Nobody goes on: says so, in the way that is still open."""
        client = self._client
        if not client.started:
            raise RequestError(f"{len(self._tried)} engines have failed this request; the last: {error}", 502)
        self._metrics.broken.add()
        if not self._events:
            return None  # no words can be put in; a connection that ends before the body does says it
        if self._transcript is not None and self._transcript.finished and self._asked.single():
            return await client.send(sse.DONE, more=False)
        words = error.words if isinstance(error, EngineFailedError) else b""
        told = words or b"data: " + error_body(f"the answer ends here: {error}", 502) + b"\n\n" + sse.DONE
        return await client.send(told, more=False)


class EngineFailedError(UpstreamError):
    """The engine itself says that it cannot go on. words: the event, and what follows."""

    def __init__(self, words: bytes) -> None:
        super().__init__("engine", "the engine failed")
        self.words = words


def _is_stream(answer: Answer) -> bool:
    for name, value in answer.headers:
        if name == b"content-type":
            return value.startswith(b"text/event-stream")
    return False
