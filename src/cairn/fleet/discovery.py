"""The cluster's instances, followed: whoever joins is subscribed to, whoever leaves is dropped."""

import asyncio
import logging
from types import TracebackType
from typing import Final, Self

from cairn.cluster.directory import Changed, Directory, Event, Joined, Left
from cairn.cluster.values import Instance as Engine
from cairn.errors import ClosedError, InputError
from cairn.fleet.instances import Followed, Instance
from cairn.fleet.subscriber import Subscriber
from cairn.observe.log import log_once

logger = logging.getLogger(__name__)

_CLOSE_S: Final = 5.0


class Discovery:
    """Feeds a directory's instances to whoever follows publishers (a Subscriber, the index service): `async with
    Discovery(directory, subscriber)`.

    An instance is followed from its join to its leaving, a restarted one from the new incarnation's join; one whose
    endpoints change is followed anew. Another publisher that is followed under the same name is in its way. Ending it
    leaves the follower as it is.
    """

    def __init__(self, directory: Directory, follower: Followed | Subscriber) -> None:
        self._directory, self._follower = directory, follower
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._ended = False

    async def __aenter__(self) -> Self:
        self._stop = self._directory.listen(self._hear)
        self._task = asyncio.get_running_loop().create_task(self._run(), name="cairn discovery")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._stop()
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task], timeout=_CLOSE_S)

    def _hear(self, event: Event) -> None:
        """Reports, which come all the time, do not concern us, so the queue stays short."""
        if not isinstance(event, Changed) or event.member.instance.events != event.before.instance.events:
            self._events.put_nowait(event)

    async def _run(self) -> None:
        while not self._ended:
            await self._take(await self._events.get())

    async def _take(self, event: Event) -> None:
        """A follower that is late, as after the process was stopped for a while, is told again and again."""
        name = event.member.instance.name
        while not self._ended:
            try:
                if not isinstance(event, Joined):
                    await self._follower.remove(name)
                if not isinstance(event, Left):
                    await self._add(event.member.instance)
                return
            except TimeoutError:
                log_once(logger, "discovery late", f"{name}: whoever follows events does not answer; told again")

    async def _add(self, engine: Engine) -> None:
        for one in engine.events:
            try:
                instance = Instance(engine.name, one.endpoint, one.replay, rank=one.rank, model=engine.model)
                added = self._follower.add(instance)
                if added is not None:
                    await added
            except ClosedError:
                self._ended = True
                return
            except InputError as error:
                log_once(logger, f"discovery {engine.name}", f"{engine.name} is not followed: {error}")
