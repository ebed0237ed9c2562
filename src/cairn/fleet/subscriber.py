"""The subscriber: follows any number of publishers and brings their events to a sink."""

import asyncio
from collections import OrderedDict
from collections.abc import Iterable
from types import TracebackType
from typing import Final, Self

import zmq.asyncio

from cairn.errors import ClosedError, InputError
from cairn.fleet.base import Sink, Source
from cairn.fleet.feed import Feed
from cairn.fleet.instances import Instance, Limits, State, Tap
from cairn.fleet.messages import Inbox
from cairn.fleet.metrics import FleetMetrics, Resync
from cairn.fleet.positions import Position, WarmStart
from cairn.fleet.track import Track
from cairn.fleet.wire import RANKS

_CLOSE_S: Final = 5.0

#: Instances that are gone of which figures are shown still.
_GONE: Final = 256


class Subscriber:
    """Follows publishers; a task each. Static lists are given at once; a registry calls `add` and `remove`.

    The sink is called from the event loop's thread, in each source's own order. What cannot be had completely is
    dropped and begun anew, so that the sink holds at most what the source does, but for what is still on its way. A
    sink that does not keep up lets the queue of `Limits.queue` messages fill, and then the publishers drop: gaps, which
    are filled as others are. Sources whose publishers are gone are dropped after `Limits.lost_s`.

    `async with Subscriber(sink, [Instance("a", "tcp://10.0.0.1:5557", "tcp://10.0.0.1:5558")]): ...`
    """

    def __init__(
        self,
        sink: Sink,
        instances: Iterable[Instance] = (),
        *,
        limits: Limits | None = None,
        metrics: FleetMetrics | None = None,
        tap: Tap | None = None,
        warm: WarmStart | None = None,
    ) -> None:
        """tap: sees every message that is taken in, before the sink does (a Recorder's `write`). warm: what a snapshot
        has brought into the sink; sources whose instances have not been added after `Limits.lost_s` are dropped.
        """
        self.metrics = metrics or FleetMetrics()
        self._sink, self._limits, self._tap = sink, limits or Limits(), tap
        self._static = list(instances)
        self._warm = warm
        self._expiry: asyncio.Task[None] | None = None
        self._context, self._inbox = zmq.asyncio.Context(), Inbox()
        # A publisher takes three, and ZeroMQ has room for 1,023 unless told otherwise.
        self._context.set(zmq.MAX_SOCKETS, self._context.get(zmq.SOCKET_LIMIT))
        self._feeds: dict[tuple[str, str], tuple[Feed, asyncio.Task[None]]] = {}
        self._gone = OrderedDict[str, None]()  # the latest last
        self._closed = False

    def add(self, instance: Instance) -> None:
        """Begins to follow a publisher. Raises InputError if it is followed already, or its endpoint or rank cannot
        be used.
        """
        if self._closed:
            raise ClosedError("the subscriber is closed; make a new one")
        key = instance.name, instance.endpoint
        if not 0 <= instance.rank < RANKS:
            raise InputError(f"{instance.name} at {instance.endpoint}: rank={instance.rank}: must be below {RANKS}")
        if key in self._feeds:
            raise InputError(f"{instance.name} at {instance.endpoint}: followed already; remove it first")
        track = Track(instance, self._sink, self.metrics, self._tap, self._is_free)
        stand = self._warm.take(key) if self._warm else None
        if self._warm and stand:
            track.resume(stand, self._warm.sink)
        try:
            feed = Feed(self._context, track, self._limits, self._inbox)
        except InputError:
            track.drop(Resync.REMOVED)
            raise
        self._gone.pop(instance.name, None)
        self._feeds[key] = feed, asyncio.get_running_loop().create_task(feed.run(), name=f"cairn feed {instance.name}")

    def _is_free(self, source: Source) -> bool:
        return all(feed.source != source for feed, _ in self._feeds.values())

    async def remove(self, name: str) -> None:
        """Stops following all ranks of an instance and drops what came from them. An unknown name is no error."""
        for key in [key for key in self._feeds if key[0] == name]:
            feed, task = self._feeds.pop(key)
            await _stop([(feed, task)])
            feed.drop(Resync.REMOVED)
            self._gone[name] = None
        while len(self._gone) > _GONE:
            self.metrics.forget("instance", self._gone.popitem(last=False)[0])

    def states(self) -> list[State]:
        """Where each publisher's stream stands. From any thread."""
        return [feed.state() for feed, _ in list(self._feeds.values())]

    def position(self, source: Source) -> Position | None:
        """How far the stream of a source has been taken in; None: not at all, or it is not proved to be the same that a
        snapshot told of. What the sink holds of the source is exactly what came until there: nothing is half taken in
        whenever the event loop's thread does something else.
        """
        return next((feed.position() for feed, _ in self._feeds.values() if feed.source == source), None)

    async def close(self) -> None:
        """Stops; what the sink holds stays. Repeatable."""
        self._closed = True
        if self._expiry is not None:
            self._expiry.cancel()
        feeds, self._feeds = list(self._feeds.values()), {}
        await _stop(feeds)
        self._context.destroy(linger=0)

    async def __aenter__(self) -> Self:
        try:
            for instance in self._static:
                self.add(instance)
        except InputError:
            await self.close()
            raise
        if self._warm:
            self._expiry = asyncio.get_running_loop().create_task(self._expire(self._warm), name="cairn warm start")
        return self

    async def _expire(self, warm: WarmStart) -> None:
        await asyncio.sleep(self._limits.lost_s)  # a registry may take its time
        self.metrics.fleet_drops.add(warm.forget(), instance="", reason=Resync.UNCLAIMED)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()


async def _stop(feeds: list[tuple[Feed, asyncio.Task[None]]]) -> None:
    for _, task in feeds:
        task.cancel()
    if feeds:
        await asyncio.wait([task for _, task in feeds], timeout=_CLOSE_S)
    for feed, _ in feeds:
        feed.close()
