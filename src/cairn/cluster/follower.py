"""Follows what stands under a prefix: everything once, then every change, through all of the registry's outages."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from cairn.cluster.base import Change, Listing, Registry
from cairn.cluster.known import Known
from cairn.errors import ClosedError, ClusterError
from cairn.observe.log import log_once

logger = logging.getLogger(__name__)

#: Pauses after a registry that does not answer or refuses, seconds: doubled from the first up to the last.
_FIRST_PAUSE_S: Final = 0.1
_LAST_PAUSE_S: Final = 5.0

_CLOSE_S: Final = 2.0


class Followed:
    """What is known by a follower of its own, `_follower`: `async with` it. For one event loop."""

    _follower: "Follower"

    async def wait(self, timeout_s: float) -> bool:
        """Waits until what stood in the registry at first is known; False: not in time."""
        return await self._follower.wait(timeout_s)

    async def __aenter__(self) -> Self:
        await self._follower.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self._follower.__aexit__(kind, error, at)


class Follower:
    """Calls `apply` with changes, in the event loop, from a task of its own: `async with Follower(...)`.

    While the registry is away nothing is called, so that whoever follows goes on with the last state. `ready` is set
    when everything that stood there at first was applied. What `apply` raises is counted and logged, and the rest goes
    on.
    """

    def __init__(self, registry: Registry, prefix: str, apply: Callable[[tuple[Change, ...]], None]) -> None:
        self.ready = asyncio.Event()
        self.prefix = prefix
        self._registry, self._apply = registry, apply
        self._known = Known(Listing((), 0))
        self._connected: Callable[[], bool] = lambda: False
        self._task: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        """Whether changes would come now; if not, what was applied may be out of date."""
        return self._connected()

    async def wait(self, timeout_s: float) -> bool:
        """Waits for `ready`; False: not in time."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.ready.wait(), timeout_s)
        return self.ready.is_set()

    async def __aenter__(self) -> Self:
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"cairn follower {self.prefix}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task], timeout=_CLOSE_S)

    async def _run(self) -> None:
        pause = _FIRST_PAUSE_S
        while True:
            try:
                listing = await self._registry.range(self.prefix)
                self._call(self._known.difference(listing))
                self.ready.set()
                pause = _FIRST_PAUSE_S
                await self._watch(listing)
            except ClosedError:
                return
            except ClusterError as error:
                log_once(logger, f"follower {self.prefix}", f"{self.prefix} is not followed now: {error}")
            await asyncio.sleep(pause)
            pause = min(_LAST_PAUSE_S, 2 * pause)

    async def _watch(self, listing: Listing) -> None:
        async with self._registry.watch(self.prefix, listing) as watch:
            self._connected = lambda: watch.connected
            async for changes in watch:
                self._call(changes)
                self._known.tell(changes)

    def _call(self, changes: tuple[Change, ...]) -> None:
        if not changes:
            return
        try:
            self._apply(changes)
        except Exception as error:  # noqa: BLE001 - counted; one listener's bug does not end what others follow
            self._registry.metrics.cluster_internal.add()
            log_once(logger, "follower.internal", f"{self.prefix}: a bug in a listener: {error!r}")
