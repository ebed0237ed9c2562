"""Follows publishers on a thread of its own, so that no lookup waits behind a batch of events."""

import asyncio
import threading
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack
from typing import Any, Final

from cairn.errors import ClosedError
from cairn.fleet import Event, FleetIndex, Source, Speculation
from cairn.fleet.instances import Instance, Limits, State
from cairn.fleet.metrics import FleetMetrics
from cairn.fleet.subscriber import Subscriber
from cairn.serve.base import T
from cairn.serve.indexer.memory import Memory

#: For what is asked of the thread, and for it to end, seconds; and at the start, where a large snapshot may be read
#: first, and kernels may have to be compiled.
_PATIENCE_S: Final = 10.0
_STARTING_S: Final = 120.0


class Following:
    """A `Subscriber` with its event loop and thread, and who it follows. A `Followed` for registries. Thread-safe.

    `start` first; `close` when done.
    """

    takes_many = True

    def __init__(
        self,
        index: FleetIndex,
        speculation: Speculation,
        metrics: FleetMetrics,
        limits: Limits,
        memory: Memory | None = None,
    ) -> None:
        """memory: what is known from before, and is kept for later."""
        self._index, self._speculation, self._memory = index, speculation, memory
        self._metrics, self._limits = metrics, limits
        self._loop: asyncio.AbstractEventLoop | None = None
        self._subscriber: Subscriber | None = None
        self._thread = threading.Thread(target=self._run, name="cairn-events", daemon=True)
        self._begun = threading.Event()
        self._ended: asyncio.Event | None = None
        self._told: set[Source] = set()
        self._changes = 0
        self._known: tuple[int, Mapping[Source, str]] = (-1, {})

    def start(self, instances: Iterable[Instance] = ()) -> None:
        """Begins to follow these. Raises InputError where one cannot be, and follows none then."""
        self._thread.start()
        if not self._begun.wait(_STARTING_S) or self._loop is None:
            raise ClosedError("the thread that follows events has not begun")
        try:
            for instance in instances:
                self._call(self._add(instance)).result(_STARTING_S)
        except BaseException:
            self.close()
            raise

    async def add(self, instance: Instance) -> None:
        await asyncio.wait_for(asyncio.wrap_future(self._call(self._add(instance))), _PATIENCE_S)

    async def remove(self, name: str) -> None:
        await asyncio.wait_for(asyncio.wrap_future(self._call(self._remove(name))), _PATIENCE_S)

    def states(self) -> Sequence[State]:
        """How each publisher's stream stands."""
        subscriber = self._subscriber
        return subscriber.states() if subscriber else ()

    def sources(self) -> Mapping[Source, str]:
        """All sources that are followed, whether they hold something or not, with what they serve ("": not told)."""
        changes, known = self._changes, self._known
        if known[0] != changes:
            found = {_source_of(state): state.instance.model for state in self.states()}
            known = self._known = changes, found
        return known[1]

    def apply(self, source: Source, events: Sequence[Event]) -> None:
        """As a sink."""
        self._index.apply(source, events)
        if source not in self._told:
            self._told.add(source)
            self._changes += 1

    def drop(self, source: Source) -> None:
        """As a sink. What was sent there on its way is lost too."""
        self._index.drop(source)
        self._speculation.forget(source)
        self._told.discard(source)
        self._changes += 1

    def close(self) -> None:
        """Stops; what the index holds stays. Repeatable."""
        if self._loop is not None and self._ended is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._ended.set)
            self._thread.join(_PATIENCE_S)

    def _run(self) -> None:
        try:
            asyncio.run(self._follow())
        finally:
            self._begun.set()

    async def _follow(self) -> None:
        self._ended = asyncio.Event()
        warm = await self._memory.read() if self._memory else None
        async with AsyncExitStack() as stack:
            subscriber = Subscriber(self, limits=self._limits, metrics=self._metrics, warm=warm)
            self._subscriber = await stack.enter_async_context(subscriber)
            if self._memory:
                await stack.enter_async_context(self._memory.kept(subscriber.position))
            self._loop = asyncio.get_running_loop()
            self._begun.set()
            await self._ended.wait()

    def _call(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        if self._loop is None or not self._thread.is_alive():
            work.close()
            raise ClosedError("no events are followed: the service has not started, or has ended")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _add(self, instance: Instance) -> None:
        assert self._subscriber is not None
        self._subscriber.add(instance)
        self._changes += 1

    async def _remove(self, name: str) -> None:
        assert self._subscriber is not None
        await self._subscriber.remove(name)
        self._changes += 1


def _source_of(state: State) -> Source:
    return state.source or Source(state.instance.name, state.instance.rank)
