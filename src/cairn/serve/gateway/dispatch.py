"""Asks the scheduler until it sends a request somewhere, refuses it, or the request's time in the queue is over."""

import math
import time
from collections.abc import Callable, Sequence

import msgspec

from cairn.config.schema import Serve
from cairn.plan.schedule.base import Ask, Scheduler, Send, Wait
from cairn.serve.base import RequestError
from cairn.serve.gateway.asked import Asked
from cairn.serve.gateway.base import Prompt
from cairn.serve.gateway.members import Member, Members

#: Waits, seconds: for an engine to come; for another engine, for each one tried, before one of those is tried again.
_LOOK_S = 0.25
#: The shortest wait that a scheduler may ask for, seconds.
_LEAST_WAIT_S = 0.001


class RefusedError(RequestError):
    """Not served now. retry_after_s: when it is worth asking again."""

    def __init__(self, message: str, status: int, retry_after_s: float) -> None:
        super().__init__(message, status)
        self.retry_after_s = max(1, math.ceil(retry_after_s))


class Placed(msgspec.Struct, frozen=True):
    """Where a request goes. prefill: who computes its prompt first, if another."""

    choice: Send
    member: Member
    prefill: Member | None


class Dispatch:
    """Places requests. For one event loop."""

    def __init__(self, members: Members, scheduler: Scheduler, config: Serve, shed: Callable[[], None]) -> None:
        """shed: called for each request that the scheduler refuses. slo: of requests that come from now on."""
        self.slo = config.slo
        self._members, self.scheduler, self._config, self._shed = members, scheduler, config, shed
        self._asks = 0

    @property
    def waiting(self) -> int:
        """Requests that wait for an engine with room."""
        return self._members.waiting

    def ask(self, asked: Asked, prompt: Prompt) -> Ask:
        """What the scheduler is asked for a request that comes now."""
        self._asks += 1
        return Ask(
            id=str(self._asks),
            prompt_tokens=prompt.tokens,
            arrived=time.monotonic(),
            held=prompt.held,
            ttft_slo_s=self.slo.ttft_s,
            tbt_slo_s=self.slo.tbt_s,
            max_tokens=asked.max_tokens,
            priority=-asked.priority,  # vLLM's are the other way round
            streams=asked.streams,
        )

    async def place(self, ask: Ask, model: str, tried: Sequence[str]) -> Placed:
        """An engine for the request; of those that were tried one only where all were. Raises RefusedError."""
        begun = time.monotonic()
        until, again = begun + self._config.queue_s, begun + _LOOK_S * len(tried)
        while True:
            now = time.monotonic()
            able = self._members.choices(model, tried, now)
            placed, pause = self._choose(ask, able, now) if able else (None, _LOOK_S)
            if placed is not None:
                return placed
            if now >= until or not self._members.expected(now):
                self._members.wake()  # the next one may have more luck
                raise self._too_late(bool(able))
            if not able and now >= again:
                tried = ()
            await self._members.changed(min(pause, until - now), ask)

    def _choose(self, ask: Ask, able: Sequence[Member], now: float) -> tuple[Placed | None, float]:
        choice = self.scheduler.choose(ask, [member.view for member in able], now)
        if isinstance(choice, Send):
            self._members.wake()  # there may be room for more than one
            by_name = self._members.members
            first = choice.prefill_on if choice.prefill_on != choice.instance_id else None
            return Placed(choice, by_name[choice.instance_id], by_name[first] if first else None), 0.0
        if isinstance(choice, Wait):
            return None, max(_LEAST_WAIT_S, choice.until_s - now)
        self._shed()
        raise RefusedError(choice.reason, 429, choice.retry_after_s)

    def _too_late(self, able: bool) -> RefusedError:
        if able:
            return RefusedError(f"no room at any engine for {self._config.queue_s:g} s; try again later", 429, 1.0)
        return RefusedError("no engine is there that could serve this; try again later", 503, 1.0)
