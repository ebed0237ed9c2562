"""Keeps something of this process registered, for as long as the process lives and nobody takes its name."""

import asyncio
import contextlib
import logging
from types import TracebackType
from typing import Final, Self

import msgspec

from cairn.cluster.base import Check, Entry, Outcome, Put, Registry
from cairn.cluster.lease import Lease
from cairn.cluster.values import UNREADABLE, Versioned, encode
from cairn.errors import ClosedError, ClusterError, LeaseLostError, UnclearError
from cairn.observe.log import log_once

logger = logging.getLogger(__name__)

#: Looks at our own key within a lease's time: somebody may have deleted it, or taken the name.
_LOOKS: Final = 2

#: After a look that failed the next follows so soon, as a share of the lease's time.
_AGAIN: Final = 0.1

_CLOSE_S: Final = 2.0


class Registration:
    """A value under a key that hangs from a lease, and reports beside it. For one event loop.

    `open` takes the name, also from a predecessor whose lease still runs: the younger process is the one that lives.
    From then on a task renews the lease, and registers anew where it was lost (the registry was away for too long, or
    has lost its data), unless another incarnation stands there: then this one is `superseded` and goes silent.
    """

    def __init__(self, registry: Registry, key: str, value: Versioned, ttl_s: float) -> None:
        """ttl_s: seconds from the death of this process until it is forgotten. Raises InputError for a bad value."""
        self.value = value
        self.superseded = asyncio.Event()
        self._registry, self._key, self._ttl_s = registry, key, ttl_s
        self._data = encode(value)
        self._modified = 0  # the revision of our own last put
        self._lease: Lease | None = None
        self._lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Registers. Raises ClusterError if the registry does not answer; nothing is left behind then, nor if it is
        cancelled.
        """
        try:
            async with self._lock:
                await self._take()
        except BaseException:
            await self.close()
            raise
        self._task = asyncio.get_running_loop().create_task(self._keep(), name=f"cairn registration {self._key}")

    async def update(self, value: Versioned) -> bool:
        """Registers another value of the same incarnation; False: not registered now, so it comes later or never."""
        data = encode(value)
        async with self._lock:
            self.value, self._data = value, data
            outcome = await self._guarded(Put(self._key, data, self._lease.id if self._lease else 0))
            if outcome:
                self._modified = outcome.revision
            return outcome is not None

    async def report(self, key: str, value: Versioned) -> bool:
        """Puts a report under another key, if we are registered; it goes when we go. Raises ClusterError."""
        data = encode(value)
        async with self._lock:
            return await self._guarded(Put(key, data, self._lease.id if self._lease else 0)) is not None

    async def close(self) -> None:
        """Deregisters. Repeatable."""
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task], timeout=_CLOSE_S)
        if self._lease:
            await self._lease.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def _guarded(self, put: Put) -> Outcome | None:
        """Puts it if our registration stands as we put it; None: it does not."""
        if self._lease is None or self._lease.gone.is_set() or self.superseded.is_set():
            return None
        try:
            outcome = await self._registry.transact([Check(self._key, modified=self._modified)], [put])
        except (LeaseLostError, UnclearError):
            return None  # the next look mends it
        return outcome if outcome.applied else None

    async def _keep(self) -> None:
        while not self.superseded.is_set():
            assert self._lease
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._lease.gone.wait(), self._ttl_s / _LOOKS)
            try:
                async with self._lock:
                    await self._look()
            except ClosedError:
                return
            except ClusterError as error:
                log_once(logger, "registration", f"{self._key}: not looked after: {error}")
                await asyncio.sleep(self._ttl_s * _AGAIN)  # a lease that is gone is not waited for

    async def _look(self) -> None:
        """Mends our registration where it does not stand as it should."""
        entry = await self._registry.get(self._key)
        if entry and incarnation_of(entry) != self.value.incarnation:
            logger.warning("%s: another process has taken the name; this one is not registered any more", self._key)
            self.superseded.set()
            return
        assert self._lease
        if self._lease.gone.is_set():
            await self._take(Check(self._key, modified=entry.modified if entry else 0))
        elif entry is None or entry.lease != self._lease.id or entry.value != self._data:
            await self._put(self._lease, Check(self._key, modified=entry.modified if entry else 0))
        else:
            self._modified = entry.modified

    async def _take(self, check: Check | None = None) -> None:
        """A new lease with our value under it, if the check holds; otherwise the next look finds out."""
        lease = await Lease.take(self._registry, self._ttl_s)
        previous, self._lease = self._lease, lease
        if previous:
            await previous.close(revoke=False)
        await self._put(lease, check)

    async def _put(self, lease: Lease, check: Check | None) -> None:
        put = Put(self._key, self._data, lease.id)
        if check is None:
            self._modified = await self._registry.put(*put)
            return
        try:
            outcome = await self._registry.transact([check], [put])
        except (LeaseLostError, UnclearError):
            return
        if outcome.applied:
            self._modified = outcome.revision


class _Head(msgspec.Struct):
    incarnation: str = ""


def incarnation_of(entry: Entry) -> str:
    """Of a registered value; "" if it has none."""
    try:
        return msgspec.json.decode(entry.value, type=_Head).incarnation
    except UNREADABLE:
        return ""
