"""The registry's contract on etcd's calls."""

import asyncio
import math
import random
from collections.abc import Sequence
from typing import Any, Final

from cairn.cluster.base import (
    MAX_ENTRIES,
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
    encode_key,
)
from cairn.cluster.etcd import wire_pb2 as wire
from cairn.cluster.etcd.caller import Caller, CompactedError
from cairn.cluster.etcd.failures import Verdict
from cairn.cluster.etcd.settings import EtcdSettings
from cairn.cluster.etcd.stream import bounds
from cairn.cluster.etcd.watch import EtcdWatch, Store, entry_of
from cairn.cluster.metrics import ClusterMetrics
from cairn.errors import ClusterError, LeaseLostError

#: Keys of one page of a listing.
_PAGE: Final = 200

#: Listings begun anew because the revision of their first page was compacted.
_LISTINGS: Final = 5

_CLOSE_S: Final = 5.0


class EtcdRegistry(Registry):
    """To be made and used within one event loop. Connects with the first call."""

    def __init__(self, settings: EtcdSettings, metrics: ClusterMetrics | None = None) -> None:
        """Raises InputError for addresses or files that cannot be used."""
        self.metrics = metrics or ClusterMetrics()
        self._caller = Caller(settings, self.metrics)
        self._watches: set[EtcdWatch] = set()

    async def get(self, key: str) -> Entry | None:
        check_key(key)
        answer = await self._caller.call("range", wire.RangeRequest(key=encode_key(key)))
        return entry_of(answer.kvs[0]) if answer.kvs else None

    async def range(self, prefix: str) -> Listing:
        return (await self._list(prefix)).listing

    async def put(self, key: str, value: bytes, lease: int = 0) -> int:
        check_put(key, value)
        request = wire.PutRequest(key=encode_key(key), value=value, lease=lease)
        answer = await self._caller.call("put", request, known=(Verdict.LEASE_GONE,))
        return int(_alive(answer, lease).header.revision)

    async def delete(self, key: str) -> bool:
        check_key(key)
        answer = await self._caller.call("delete", wire.DeleteRangeRequest(key=encode_key(key)))
        return bool(answer.deleted)

    async def transact(self, checks: Sequence[Check], operations: Sequence[Put | Delete]) -> Outcome:
        check_transaction(checks, operations)
        request = wire.TxnRequest(
            compare=map(_compare, checks),
            success=map(_operation, operations),
            failure=[wire.RequestOp(request_range=wire.RangeRequest(key=encode_key(check.key))) for check in checks],
        )
        lease = next((one.lease for one in operations if isinstance(one, Put) and one.lease), 0)
        answer = await self._caller.call("transact", request, repeat=False, known=(Verdict.LEASE_GONE,))
        answer = _alive(answer, lease)
        if answer.succeeded:
            return Outcome(True, answer.header.revision)
        found = [one.response_range.kvs for one in answer.responses]
        return Outcome(False, answer.header.revision, tuple(entry_of(kvs[0]) if kvs else None for kvs in found))

    async def grant(self, ttl_s: float) -> Grant:
        check_ttl(ttl_s)
        seconds = math.ceil(ttl_s)
        # The id is ours, so that a repetition is known for what it is.
        request = wire.LeaseGrantRequest(TTL=seconds, ID=random.SystemRandom().getrandbits(62) + 1)
        answer = await self._caller.call("grant", request, known=(Verdict.LEASE_THERE,))
        return Grant(request.ID, float(answer.TTL if answer else seconds))

    async def keep_alive(self, lease: int) -> float:
        request = wire.LeaseKeepAliveRequest(ID=lease)
        answer = await self._caller.call("keep_alive", request, known=(Verdict.LEASE_GONE,))
        if answer is not None and answer.TTL <= 0:
            answer = None
        return float(_alive(answer, lease).TTL)

    async def revoke(self, lease: int) -> None:
        await self._caller.call("revoke", wire.LeaseRevokeRequest(ID=lease), known=(Verdict.LEASE_GONE,))

    def watch(self, prefix: str, since: Listing) -> Watch:
        if self._caller.closed:
            raise self._caller.closed_error()
        watch = EtcdWatch(self._caller, self._list, prefix, since, self._watches.discard)
        self._watches.add(watch)
        return watch

    async def close(self) -> None:
        if self._caller.closed:
            return
        self._caller.closed = True
        if self._watches:
            closing = [asyncio.ensure_future(watch.close()) for watch in self._watches]
            await asyncio.wait(closing, timeout=_CLOSE_S)
        await self._caller.close()

    async def _list(self, prefix: str) -> Store:
        for _ in range(_LISTINGS):
            try:
                return await self._pages(prefix)
            except CompactedError:
                continue
        raise ClusterError(f"{prefix}: compacted {_LISTINGS} times while it was listed")

    async def _pages(self, prefix: str) -> Store:
        """All pages at the revision of the first."""
        start, end = bounds(prefix)
        entries: list[Entry] = []
        revision, cluster, more = 0, 0, True
        while more:
            request = wire.RangeRequest(key=start, range_end=end, limit=_PAGE, revision=revision)
            answer: wire.RangeResponse = await self._caller.call("range", request)
            entries += map(entry_of, answer.kvs)
            if not revision:
                revision, cluster = answer.header.revision, answer.header.cluster_id
            more = answer.more and bool(answer.kvs)
            if more:
                start = answer.kvs[-1].key + b"\0"
            if len(entries) > MAX_ENTRIES:
                raise ClusterError(f"{prefix}: more than {MAX_ENTRIES} keys; is this prefix another's?")
        return Store(Listing(tuple(entries), revision), cluster)


def _alive(answer: Any, lease: int) -> Any:
    if answer is None:
        raise LeaseLostError(f"lease {lease:x} is gone; take another")
    return answer


def _compare(check: Check) -> wire.Compare:
    key = encode_key(check.key)
    if check.value is not None:
        return wire.Compare(key=key, target=wire.VALUE, value=check.value)
    if check.created is not None:
        return wire.Compare(key=key, target=wire.CREATE, create_revision=check.created)
    return wire.Compare(key=key, target=wire.MOD, mod_revision=check.modified)


def _operation(operation: Put | Delete) -> wire.RequestOp:
    key = encode_key(operation.key)
    if isinstance(operation, Put):
        return wire.RequestOp(request_put=wire.PutRequest(key=key, value=operation.value, lease=operation.lease))
    return wire.RequestOp(request_delete_range=wire.DeleteRangeRequest(key=key))
