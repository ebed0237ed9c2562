"""Follows publishers on threads of their own, so that no lookup waits behind a batch of events."""

import asyncio
import threading
import zlib
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Final

from cairn.fleet import Event, FleetIndex, Source, Speculation
from cairn.fleet.instances import Instance, Limits, State
from cairn.fleet.metrics import FleetMetrics
from cairn.fleet.subscriber import Subscriber
from cairn.serve.indexer.lane import STARTING_S, Lane
from cairn.serve.indexer.memory import Memory

#: For what is asked of a thread while the service runs, seconds.
_PATIENCE_S: Final = 10.0


class Following:
    """Who is followed, each instance by one of several lanes. A `Followed` for registries. Thread-safe.

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
        *,
        threads: int = 1,
    ) -> None:
        """memory: what is known from before, and is kept for later. threads: that take events in; one if there is a
        memory, as a snapshot's moments are those of one event loop.
        """
        self._index, self._speculation, self._memory = index, speculation, memory
        self._metrics, self._limits = metrics, limits
        self._lanes = [Lane(f"cairn-events-{i}", self._subscribed) for i in range(1 if memory else threads)]
        self._lock = threading.Lock()
        self._told: set[Source] = set()
        self._changes = 0
        self._known: tuple[int, Mapping[Source, str]] = (-1, {})

    def start(self, instances: Iterable[Instance] = ()) -> None:
        """Begins to follow these. Raises InputError where one cannot be, and follows none then."""
        try:
            for lane in self._lanes:
                lane.start()
            for instance in instances:
                self._adding(instance).result(STARTING_S)
        except BaseException:
            self.close()
            raise

    async def add(self, instance: Instance) -> None:
        await asyncio.wait_for(asyncio.wrap_future(self._adding(instance)), _PATIENCE_S)

    async def remove(self, name: str) -> None:
        work = self._lane(name).call(lambda one: self._remove(one, name))
        await asyncio.wait_for(asyncio.wrap_future(work), _PATIENCE_S)

    def states(self) -> Sequence[State]:
        """How each publisher's stream stands."""
        return [state for lane in self._lanes for state in lane.states()]

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
            self._changed()

    def drop(self, source: Source) -> None:
        """As a sink. What was sent there on its way is lost too."""
        self._index.drop(source)
        self._speculation.forget(source)
        self._told.discard(source)
        self._changed()

    def close(self) -> None:
        """Stops; what the index holds stays. Repeatable."""
        for lane in self._lanes:
            lane.close()

    def _lane(self, name: str) -> Lane:
        """Who follows all ranks of an instance, whenever it comes."""
        return self._lanes[zlib.crc32(name.encode()) % len(self._lanes)]

    @asynccontextmanager
    async def _subscribed(self) -> AsyncIterator[Subscriber]:
        warm = await self._memory.read() if self._memory else None
        async with Subscriber(self, limits=self._limits, metrics=self._metrics, warm=warm) as subscriber:
            if self._memory is None:
                yield subscriber
                return
            async with self._memory.kept(subscriber.position):
                yield subscriber

    def _adding(self, instance: Instance) -> "Future[None]":
        return self._lane(instance.name).call(lambda subscriber: self._add(subscriber, instance))

    async def _add(self, subscriber: Subscriber, instance: Instance) -> None:
        subscriber.add(instance)
        self._changed()

    async def _remove(self, subscriber: Subscriber, name: str) -> None:
        await subscriber.remove(name)
        self._changed()

    def _changed(self) -> None:
        with self._lock:
            self._changes += 1


def _source_of(state: State) -> Source:
    return state.source or Source(state.instance.name, state.instance.rank)
