"""Many chats at a time through `cairn serve`, beside what the best cache could have spared them."""

import asyncio
import json
import random
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import httpx
import numpy as np

from tests.vllm.service.stack import BLOCK, ids

TOKENS, IN_FLIGHT, SYSTEMS = 4, 4, 4
#: Every so many questions one is answered as a stream.
STREAMED = 5
ANSWER_S = 240.0


class Best:
    """One cache without a limit, which has at once what was answered. hit: of what it would have hit, how much was."""

    def __init__(self) -> None:
        self._prefixes: set[bytes] = set()
        self.possible = self.hit = 0

    def held(self, prompt: Sequence[int]) -> int:
        most = (len(prompt) - 1) // BLOCK * BLOCK  # the last token is always computed
        return next((end for end in range(most, 0, -BLOCK) if _bytes(prompt[:end]) in self._prefixes), 0)

    def answered(self, prompt: Sequence[int], answer: Sequence[int], held: int, hit: int) -> None:
        """held: what it had of the prompt when it was asked."""
        tokens = [*prompt, *answer]
        self._prefixes |= {_bytes(tokens[:end]) for end in range(BLOCK, len(tokens), BLOCK)}
        self.possible += held
        self.hit += min(hit, held)


class Answered(NamedTuple):
    """asked, at: when, by the clock that only goes on; asked: for the first time."""

    prompt: list[int]
    tokens: list[int]
    asked: float
    at: float


class Chats:
    """Conversations that share system prompts. Each turn asks with all that was said before.

    at: the services, `host:port`; where one is gone the next is asked. broken: streams that an engine's death has
    ended, with what they had said; they are asked again. moved: requests that a service's death has cut off; they are
    asked again at another's.
    """

    def __init__(self, name: str, at: list[str], count: int) -> None:
        chance = self._chance = random.Random(name)
        systems = [_words(chance, 5 * BLOCK) for _ in range(SYSTEMS)]
        self._said = [list(systems[i % SYSTEMS]) for i in range(count)]
        self.at = at
        self.best = Best()
        self.answers: list[Answered] = []
        self.broken: list[Answered] = []
        self.moved = 0
        self._answered = asyncio.Condition()
        self._asked = 0

    async def turns(self, count: int) -> None:
        """All chats go on by so many turns, a few at a time."""
        free = asyncio.Semaphore(IN_FLIGHT)
        questions = [[_words(self._chance, self._chance.randrange(20, 45)) for _ in range(count)] for _ in self._said]
        limits = httpx.Limits(max_keepalive_connections=0)  # a service that is gone is then found out before it is sent
        async with httpx.AsyncClient(timeout=ANSWER_S, limits=limits) as client:

            async def chat(said: list[int], asked: list[list[int]]) -> None:
                for question in asked:
                    async with free:
                        said += question
                        said += await self._turn(client, list(said))

            async with asyncio.TaskGroup() as group:
                for said, asked in zip(self._said, questions, strict=True):
                    group.create_task(chat(said, asked))

    def late_by(self, died: float) -> float:
        """Seconds from a death until all that was under way was answered, but for what the slowest answer took of those
        that were asked for later: a busy machine is slow without any death.
        """
        waited = max((one.at - died for one in self.answers if one.asked < died < one.at), default=0.0)
        return waited - max((one.at - one.asked for one in self.answers if one.asked > died), default=0.0)

    async def some_answers(self) -> None:
        """Waits for a few more."""
        until = len(self.answers) + IN_FLIGHT
        async with self._answered:
            await self._answered.wait_for(lambda: len(self.answers) >= until)

    async def _turn(self, client: httpx.AsyncClient, prompt: list[int]) -> list[int]:
        begun = time.monotonic()
        self._asked += 1
        streams = self._asked % STREAMED == 0
        held = self.best.held(prompt)
        while True:
            tokens, usage = await self._ask(client, prompt, streams)
            if usage is not None:
                break
            self.broken.append(Answered(prompt, tokens, begun, time.monotonic()))
        hit = (usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0
        self.best.answered(prompt, tokens, held, hit)
        async with self._answered:
            self.answers.append(Answered(prompt, tokens, begun, time.monotonic()))
            self._answered.notify_all()
        return tokens

    async def _ask(self, client: httpx.AsyncClient, prompt: list[int], streams: bool) -> tuple[list[int], Any]:
        """The answer and its usage; None: it broke off."""
        body: dict[str, Any] = {"model": "smol", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        if streams:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        at = self._asked
        while True:
            try:
                url = f"http://{self.at[at % len(self.at)]}/v1/completions"
                async with client.stream("POST", url, json=body) as answer:
                    if answer.status_code == 503:  # no engine is there, or all are taken for dead: as any client
                        await asyncio.sleep(int(answer.headers["retry-after"]))
                        continue
                    if streams and answer.status_code == 200:
                        return await _read(answer)
                    whole = json.loads(await answer.aread())
                    assert answer.status_code == 200, whole
                    return ids(whole), whole["usage"]
            except httpx.TransportError:
                self.moved += 1
                at += 1


async def _read(answer: httpx.Response) -> tuple[list[int], Any]:
    tokens: list[int] = []
    usage = None
    async for line in answer.aiter_lines():
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                return tokens, None
            tokens += [token for choice in event["choices"] for token in choice["token_ids"]]
            usage = event.get("usage") or usage
    return tokens, usage


def _words(chance: random.Random, count: int) -> list[int]:
    return [chance.randrange(1000, 40000) for _ in range(count)]


def _bytes(tokens: Sequence[int]) -> bytes:
    return np.array(tokens, np.uint16).tobytes()
