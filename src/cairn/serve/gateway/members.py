"""The engines there are, and what the gateway knows of each: its way there, its load, whether it rests."""

import asyncio
import bisect
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Final, NamedTuple, Self

from cairn.cluster import Directory, Load
from cairn.cluster.directory import Changed, Event, Left
from cairn.cluster.directory import Member as Reported
from cairn.config.schema import Serve
from cairn.plan.schedule.base import Ask, InstanceView
from cairn.serve.gateway.base import Prompt
from cairn.serve.gateway.http1 import Pool

#: Seconds that an engine rests after a failure: doubled from the first up to the last while it goes on failing.
_FIRST_REST_S: Final = 0.5
_LAST_REST_S: Final = 30.0
#: Seconds for which engines that all left are expected back: a registry that was away for longer than its leases
#: forgets every engine at once, and those that live register again.
_RETURN_S: Final = 10.0


class Member:
    """One engine in this incarnation. drains: nothing new goes there, set by `Members.drain`. rests_until: after
    failures. running: our requests there. queued: tokens of their prompts that are to be computed.
    """

    load: Load | None = None

    def __init__(self, reported: Reported, config: Serve) -> None:
        instance = reported.instance
        self.instance, self.name = instance, instance.name
        self.view = InstanceView(id=instance.name)
        token = config.backend_token.get_secret_value() if config.backend_token else None
        self.pool = Pool(instance.http, config.connect_s, token)
        self.running = self.queued = 0
        self.drains = reported.drain is not None
        self._rest_s, self.rests_until = _FIRST_REST_S, 0.0
        self.since = time.time()
        self.update(reported)

    def update(self, reported: Reported) -> None:
        """What it has registered and reported."""
        instance, load, self.cache, _ = reported
        if load is not None and load is not self.load:
            self.view.running, self.view.waiting = load.running, load.waiting
            self.view.ttft_s, self.view.tpot_s = load.ttft_s, load.tpot_s
            self.view.reported_at = time.monotonic()
        self.instance, self.load = instance, load
        self.view.role, self.view.model = instance.role, instance.model

    def ready(self, now: float) -> bool:
        return now >= self.rests_until

    def succeeded(self) -> None:
        self._rest_s, self.rests_until = _FIRST_REST_S, 0.0

    def failed(self, now: float) -> None:
        if self.ready(now):  # failures of requests that were under way together count once
            self.rests_until = now + self._rest_s
            self._rest_s = min(2 * self._rest_s, _LAST_REST_S)


class Flight:
    """A request at a member, from its sending to its end: `with Flight(...)`."""

    def __init__(self, members: "Members", member: Member, prompt: Prompt) -> None:
        held = sum(prompt.held.get(member.name, {}).values())
        self.member = member
        self._members = members
        self._computes = max(1, prompt.tokens - held)
        self._waits = True
        member.running += 1
        member.queued += self._computes

    def first_token(self) -> None:
        """It has been computed."""
        if self._waits:
            self._waits = False
            self.member.queued -= self._computes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.first_token()
        self.member.running -= 1
        self._members.wake()


class _Waiter(NamedTuple):
    """number: so that no two are alike."""

    after: int
    due: float
    number: int
    future: asyncio.Future[None]


class Members:
    """Follows a directory's instances. on_left: told who is gone. For one event loop."""

    def __init__(self, config: Serve, on_left: Callable[[str], None] = lambda _: None) -> None:
        self._config, self._on_left = config, on_left
        self._members: dict[str, Member] = {}
        self.members: Mapping[str, Member] = MappingProxyType(self._members)
        self._takers: dict[str, list[Member]] = {"": []}  # those that do not drain by model; "": of all models
        self._waiting: list[_Waiter] = []  # in their order
        self._waited = 0
        self._last_left = -math.inf

    @property
    def waiting(self) -> int:
        """Requests that wait for an engine with room."""
        return len(self._waiting)

    def expected(self, now: float) -> bool:
        """Whether there is an engine, or may be one again soon."""
        return bool(self._members) or now < self._last_left + _RETURN_S

    @contextmanager
    def following(self, directory: Directory) -> Iterator[None]:
        stop = directory.listen(self._hear)
        try:
            yield
        finally:
            stop()
            for member in self._members.values():
                member.pool.close()

    def choices(self, model: str, tried: Sequence[str], now: float) -> Sequence[Member]:
        """Who may serve a request: those that serve its model, or all if nobody says so (an adapter's name); of them
        those that were not tried; of them those that do not rest, if there are any.
        """
        able = self._takers.get(model, self._takers[""])
        if tried:
            able = [one for one in able if one.name not in tried]
        return [one for one in able if now >= one.rests_until] or able

    def drain(self, member: Member, drains: bool) -> None:
        """Whether nothing new goes there."""
        back, member.drains = member.drains and not drains, drains
        self._sort()
        if back:
            self._wake_all()

    def wake(self) -> None:
        """Lets the first that waits ask again; if it is served, it wakes the next."""
        while self._waiting:
            if _let_go(self._waiting.pop(0).future):
                return

    async def changed(self, timeout_s: float, request: Ask) -> None:
        """Waits until a request has ended or a member has come, or for so long. Higher priorities come first, and then
        those whose first token is due sooner.
        """
        loop = asyncio.get_running_loop()
        self._waited += 1
        due = request.arrived + request.ttft_slo_s
        waiter = _Waiter(-request.priority, due, self._waited, loop.create_future())
        timer = loop.call_later(timeout_s, _let_go, waiter.future)
        bisect.insort(self._waiting, waiter)
        try:
            await waiter.future
        except asyncio.CancelledError:
            if not waiter.future.cancelled():
                self.wake()  # it was let go just now, and will not use it
            raise
        finally:
            timer.cancel()
            if waiter in self._waiting:
                self._waiting.remove(waiter)

    def _hear(self, event: Event) -> None:
        member, name = event.member, event.member.instance.name
        known = self._members.get(name)
        if isinstance(event, Left):
            if known:
                del self._members[name]
                self._sort()
                known.pool.close()
                self._last_left = time.monotonic()
            self._on_left(name)
        elif known and isinstance(event, Changed) and known.instance.http == member.instance.http:
            known.update(member)
            self.drain(known, member.drain is not None)
        else:
            self._members[name] = Member(member, self._config)
            self._sort()
            self._wake_all()

    def _sort(self) -> None:
        """Once a change, not once a request."""
        self._takers = {"": []}
        for member in self._members.values():
            for model in {"", member.view.model}:
                takers = self._takers.setdefault(model, [])
                if not member.drains:
                    takers.append(member)

    def _wake_all(self) -> None:
        for _ in range(len(self._waiting)):
            self.wake()


def _let_go(waiter: asyncio.Future[None]) -> bool:
    if waiter.done():
        return False
    waiter.set_result(None)
    return True
