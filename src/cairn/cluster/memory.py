"""The registry in this process's memory: for an embedded service, for `cairn up` and for tests."""

import asyncio
import itertools
from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

from cairn.cluster.base import (
    Change,
    Check,
    Delete,
    Entry,
    Grant,
    Listing,
    Outcome,
    Put,
    Registry,
    Watch,
    check_key,
    check_put,
    check_transaction,
    check_ttl,
)
from cairn.cluster.known import Known
from cairn.cluster.metrics import ClusterMetrics, Resume
from cairn.errors import ClosedError, LeaseLostError

#: Changes kept for watches that lag; beyond it they are told the difference.
_HISTORY: Final = 10_000


class _Lease:
    def __init__(self, ttl_s: float, until: float) -> None:
        self.ttl_s, self.until = ttl_s, until
        self.keys: set[str] = set()


class MemoryRegistry(Registry):
    """Leases expire by the event loop's clock, which is monotonic. To be made and used within one event loop."""

    def __init__(self, metrics: ClusterMetrics | None = None) -> None:
        self.metrics = metrics or ClusterMetrics()
        self._loop = asyncio.get_running_loop()
        self._entries: dict[str, Entry] = {}
        self._revision = 1
        self._history: list[Change] = []
        self._compacted = 1  # changes up to this revision are not in the history any more
        self._leases: dict[int, _Lease] = {}
        self._ids = itertools.count(1)
        self._timer: asyncio.TimerHandle | None = None
        self._watches: set[_MemoryWatch] = set()
        self._closed = False

    async def get(self, key: str) -> Entry | None:
        self._begin("get")
        check_key(key)
        return self._entries.get(key)

    async def range(self, prefix: str) -> Listing:
        self._begin("range")
        return self.listing(prefix)

    async def put(self, key: str, value: bytes, lease: int = 0) -> int:
        self._begin("put")
        check_put(key, value)
        return self._change([Put(key, value, lease)])

    async def delete(self, key: str) -> bool:
        self._begin("delete")
        check_key(key)
        there = key in self._entries
        self._change([Delete(key)])
        return there

    async def transact(self, checks: Sequence[Check], operations: Sequence[Put | Delete]) -> Outcome:
        self._begin("transact")
        check_transaction(checks, operations)
        if all(self._holds(check) for check in checks):
            return Outcome(True, self._change(operations))
        return Outcome(False, self._revision, tuple(self._entries.get(check.key) for check in checks))

    async def grant(self, ttl_s: float) -> Grant:
        self._begin("grant")
        check_ttl(ttl_s)
        grant = Grant(next(self._ids), ttl_s)
        self._leases[grant.id] = _Lease(ttl_s, self._loop.time() + ttl_s)
        self._set_timer()
        return grant

    async def keep_alive(self, lease: int) -> float:
        self._begin("keep_alive")
        found = self._lease(lease)
        found.until = self._loop.time() + found.ttl_s
        return found.ttl_s

    async def revoke(self, lease: int) -> None:
        self._begin("revoke")
        if lease in self._leases:
            self._end_lease(lease)

    def watch(self, prefix: str, since: Listing) -> Watch:
        self._begin("watch")
        watch = _MemoryWatch(self, prefix, since)
        self._watches.add(watch)
        return watch

    async def close(self) -> None:
        self._closed = True
        if self._timer:
            self._timer.cancel()
        for watch in list(self._watches):
            await watch.close()

    def compact(self, revision: int) -> None:
        """Forgets the history up to and with `revision`, as etcd does on its own."""
        self._history = self._history[self._first(revision + 1) :]
        self._compacted = max(self._compacted, min(revision, self._revision))

    def listing(self, prefix: str) -> Listing:
        """`range` at once."""
        keys = sorted(key for key in self._entries if key.startswith(prefix))
        return Listing(tuple(self._entries[key] for key in keys), self._revision)

    def since(self, revision: int) -> list[Change] | None:
        """The changes from `revision` on; None: the history does not reach back."""
        return self._history[self._first(revision) :] if revision > self._compacted else None

    def forget(self, watch: "_MemoryWatch") -> None:
        self._watches.discard(watch)

    def _first(self, revision: int) -> int:
        return bisect_left(self._history, revision, key=lambda change: change.revision)

    def _begin(self, call: str) -> None:
        if self._closed:
            raise ClosedError("the registry is closed; open another")
        self._expire()
        self.metrics.cluster_requests.add(call=call, outcome="done")

    def _holds(self, check: Check) -> bool:
        entry = self._entries.get(check.key)
        if check.value is not None:
            return entry is not None and entry.value == check.value
        if check.created is not None:
            return check.created == (entry.created if entry else 0)
        return check.modified == (entry.modified if entry else 0)

    def _lease(self, lease: int) -> _Lease:
        if lease not in self._leases:
            raise LeaseLostError(f"lease {lease:x} is gone; take another")
        return self._leases[lease]

    def _change(self, operations: Sequence[Put | Delete]) -> int:
        """Applies operations at the next revision, if there is anything to apply."""
        for operation in operations:
            if isinstance(operation, Put) and operation.lease:
                self._lease(operation.lease)
        revision, changes = self._revision + 1, []
        for operation in operations:
            before = self._entries.pop(operation.key, None)
            if before and before.lease:
                self._leases[before.lease].keys.discard(operation.key)
            if isinstance(operation, Put):
                created, version = (before.created, before.version) if before else (revision, 0)
                entry = Entry(operation.key, operation.value, created, revision, version + 1, operation.lease)
                self._entries[operation.key] = entry
                if operation.lease:
                    self._leases[operation.lease].keys.add(operation.key)
                changes.append(Change(operation.key, entry, revision))
            elif before:
                changes.append(Change(operation.key, None, revision))
        if changes:
            self._revision = revision
            self._history += changes
            if len(self._history) > 2 * _HISTORY:
                self.compact(self._history[-_HISTORY].revision)
            for watch in self._watches:
                watch.wake()
        return self._revision

    def _end_lease(self, lease: int) -> None:
        self._change([Delete(key) for key in sorted(self._leases[lease].keys)])
        del self._leases[lease]

    def _expire(self) -> None:
        now = self._loop.time()
        for lease in [id for id, lease in self._leases.items() if lease.until <= now]:
            self._end_lease(lease)
        self._set_timer()

    def _set_timer(self) -> None:
        """So that watches hear of an expiry although nobody calls."""
        if self._timer:
            self._timer.cancel()
        until = min((lease.until for lease in self._leases.values()), default=None)
        self._timer = None if until is None else self._loop.call_at(until, self._expire)


class _MemoryWatch(Watch):
    def __init__(self, registry: MemoryRegistry, prefix: str, since: Listing) -> None:
        self._registry, self._prefix = registry, prefix
        self._known = Known(since)
        self._read = since.revision + 1  # the first revision of the history not looked at
        self._news = asyncio.Event()
        self._news.set()
        self._closed = False

    async def __anext__(self) -> tuple[Change, ...]:
        while not self._closed:
            await self._news.wait()
            self._news.clear()
            if changes := self._take():
                return changes
        raise StopAsyncIteration

    def wake(self) -> None:
        self._news.set()

    @property
    def connected(self) -> bool:
        return not self._closed

    async def close(self) -> None:
        self._closed = True
        self._registry.forget(self)
        self._news.set()

    def _take(self) -> tuple[Change, ...]:
        changes = self._registry.since(self._read)
        if changes is None:
            listing = self._registry.listing(self._prefix)
            self._registry.metrics.cluster_watch_resumes.add(reason=Resume.COMPACTED)
            self._read = listing.revision + 1
            return self._known.difference(listing)
        if changes:
            self._read = changes[-1].revision + 1
        return self._known.tell(change for change in changes if change.key.startswith(self._prefix))
