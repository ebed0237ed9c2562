"""A lease that a task keeps alive, and what its holder may still believe."""

import asyncio
import contextlib
import logging
from typing import Final, Self

from cairn.cluster.base import Registry
from cairn.errors import ClosedError, ClusterError, LeaseLostError
from cairn.observe.log import log_once

logger = logging.getLogger(__name__)

#: Renewals within a lease's time.
_RENEWALS: Final = 3

#: After a failed renewal the next follows soon, as a share of the lease's time.
_AGAIN: Final = 0.1

_CLOSE_S: Final = 2.0


class Lease:
    """Renewed until it is closed or gone. For one event loop.

    The holder may believe in it only while `held()`: as long as the registry cannot have ended it, by this machine's
    own clock, reckoned from before the last renewal was sent. Past that it may be alive or gone (`gone` is set when the
    registry says so), and a lease that lives is renewed further.
    """

    def __init__(self, registry: Registry, id: int, ttl_s: float, asked: float) -> None:
        """For `take`."""
        self.id, self.ttl_s = id, ttl_s
        self.gone = asyncio.Event()
        self._registry = registry
        self._loop = asyncio.get_running_loop()
        self._until = asked + ttl_s
        self._task = self._loop.create_task(self._renew(), name="cairn lease")

    @classmethod
    async def take(cls, registry: Registry, ttl_s: float) -> Self:
        """A new lease. Raises ClusterError."""
        asked = asyncio.get_running_loop().time()
        grant = await registry.grant(ttl_s)
        return cls(registry, grant.id, grant.ttl_s, asked)

    def held(self) -> bool:
        return not self.gone.is_set() and self._loop.time() < self._until

    async def lapse(self) -> None:
        """Waits until it is not held any more."""
        while self.held():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.gone.wait(), self._until - self._loop.time())

    async def close(self, *, revoke: bool = True) -> None:
        """Ends it, with all keys that hang from it; a registry that does not answer lets it expire. Repeatable."""
        self._task.cancel()
        await asyncio.wait([self._task], timeout=_CLOSE_S)
        if revoke and not self.gone.is_set():
            self.gone.set()
            with contextlib.suppress(ClusterError, ClosedError, TimeoutError):
                async with asyncio.timeout(_CLOSE_S):
                    await self._registry.revoke(self.id)

    async def _renew(self) -> None:
        pause = self.ttl_s / _RENEWALS
        while True:
            await asyncio.sleep(pause)
            asked = self._loop.time()
            try:
                self._until = asked + await self._registry.keep_alive(self.id)
            except LeaseLostError:
                self._registry.metrics.cluster_leases_lost.add()
                self.gone.set()
                return
            except ClosedError:
                return
            except ClusterError as error:
                log_once(logger, "lease.renewal", f"a lease is not renewed: {error}")
                pause = self.ttl_s * _AGAIN
            else:
                pause = self.ttl_s / _RENEWALS
