"""A watch that outlives its connections, its members and the history that they keep."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple

import grpc.aio

from cairn.cluster.base import Change, Entry, Listing, Watch, decode_key
from cairn.cluster.etcd import wire_pb2 as wire
from cairn.cluster.etcd.caller import Caller, RefusedError, backoff
from cairn.cluster.etcd.failures import describe
from cairn.cluster.etcd.stream import EndedError, WatchStream, bounds
from cairn.cluster.known import Known
from cairn.cluster.metrics import Resume
from cairn.errors import ClosedError, ClusterError
from cairn.observe.log import log_once

logger = logging.getLogger(__name__)

#: Silence after which a member is asked for a sign of life.
_QUIET_S: Final = 2.0

_CLOSE_S: Final = 2.0

#: Logins after which a refusal is final.
_LOGINS: Final = 2


#: What a member says that does not let us watch.
_REFUSALS: Final = ("permission denied", "invalid auth token", "revision of auth store is old", "user name is empty")


class Store(NamedTuple):
    """A listing, and the id of the etcd cluster it comes from."""

    listing: Listing
    cluster: int


class EtcdWatch(Watch):
    """Reads only while somebody waits for changes; until then they wait in etcd and in gRPC's bounded window."""

    def __init__(
        self,
        caller: Caller,
        listing: Callable[[str], Awaitable[Store]],
        prefix: str,
        since: Listing,
        on_close: Callable[["EtcdWatch"], None],
    ) -> None:
        self._caller, self._listing, self._prefix, self._on_close = caller, listing, prefix, on_close
        self._known = Known(since)
        self._cluster = 0  # the id of the store that is watched; 0: not yet seen
        self._stream: WatchStream | None = None
        self._pending: list[Change] = []  # of an answer whose rest is to come
        self._behind: Resume | None = None  # why a listing must be looked at before the next stream
        self._tries = self._logins = 0
        self._step: asyncio.Task[tuple[Change, ...]] | None = None
        self._closing = asyncio.Event()

    async def __anext__(self) -> tuple[Change, ...]:
        while not self._closing.is_set():
            if self._step is None:  # else it goes on from a wait that was cancelled
                self._step = asyncio.get_running_loop().create_task(self._more(), name="cairn etcd watch")
            await asyncio.wait([self._step])
            step, self._step = self._step, None
            try:
                if step and not step.cancelled() and (changes := step.result()):
                    return changes
            except (ClosedError, grpc.aio.UsageError):  # the channel was closed
                await self.close()
            except RefusedError:
                self._abandon()
                raise
            except grpc.aio.AioRpcError as error:
                await self._resume(Resume.BROKEN, describe(error))
            except TimeoutError:
                await self._resume(Resume.SILENT, "no sign of life")
            except (EndedError, ClusterError) as error:
                await self._resume(Resume.BROKEN, str(error))
            if self._caller.closed:
                await self.close()
        raise StopAsyncIteration

    @property
    def connected(self) -> bool:
        return self._stream is not None and self._stream.live

    async def close(self) -> None:
        self._closing.set()
        self._on_close(self)
        step = self._step
        if step:
            step.cancel()
            await asyncio.wait([step], timeout=_CLOSE_S)
            if step.done() and not step.cancelled():
                step.exception()  # of interest to nobody any more
        await self._drop()

    async def _more(self) -> tuple[Change, ...]:
        """One step: the difference if one is due, else what the stream brings; may be nothing."""
        if self._behind:
            return await self._catch_up()
        if self._stream is None:
            return await self._open()
        answer = await self._stream.next()
        return () if answer is None else self._take(answer)

    async def _open(self) -> tuple[Change, ...]:
        """Begins a stream where the last one ended."""
        caller = self._caller
        endpoint = await caller.endpoints.pick(caller.timeout_s)
        headers = await caller.login.headers(endpoint, caller.attempt_s)
        stream = WatchStream(endpoint, headers, _QUIET_S, caller.attempt_s)
        self._stream = stream  # so that it is closed, whatever comes
        answer = await stream.begin(*bounds(self._prefix), self._known.next)
        if answer.canceled and self._token_refused(answer, stream):
            return ()
        if answer.canceled:
            return self._take(answer)
        self._tries = self._logins = 0
        header = answer.header
        another = self._cluster not in (0, header.cluster_id)
        self._cluster = self._cluster or header.cluster_id
        if another or header.revision < self._known.next - 1:  # another store, a younger one, or a member that lags
            store = await self._listing(self._prefix)
            if store.cluster != self._cluster or store.listing.revision < self._known.next - 1:
                self._behind = Resume.RESET
                await self._drop()
        return ()

    async def _catch_up(self) -> tuple[Change, ...]:
        """The difference between what was told and what stands there."""
        assert self._behind
        store = await self._listing(self._prefix)
        self._caller.metrics.cluster_watch_resumes.add(reason=self._behind)
        log_once(
            logger, f"watch.{self._behind}", f"etcd: {self._prefix}: {self._behind}; the difference is taken instead"
        )
        another = self._cluster not in (0, store.cluster)
        self._cluster, self._behind = store.cluster, None
        return self._known.difference(store.listing, another=another)

    def _take(self, answer: wire.WatchResponse) -> tuple[Change, ...]:
        """The changes of an answer, once it is complete."""
        self._pending += map(_change, answer.events)
        if answer.canceled:
            if not answer.compact_revision:
                raise EndedError(answer.cancel_reason or "cancelled by etcd")
            self._behind = Resume.COMPACTED
            self._abandon()
        if answer.fragment:
            return ()
        changes, self._pending = self._pending, []
        return self._known.tell(changes)

    def _token_refused(self, answer: wire.WatchResponse, stream: WatchStream) -> bool:
        """Whether another token may help. Raises RefusedError where it does not: to some members an expired token is
        no permission.
        """
        if answer.compact_revision or not any(sign in answer.cancel_reason for sign in _REFUSALS):
            return False
        self._logins += 1
        if self._logins > _LOGINS or not self._caller.login.refused(stream.headers):
            self._logins = 0
            raise RefusedError(f"etcd refuses to watch {self._prefix}: {answer.cancel_reason}")
        self._abandon()
        return True

    async def _resume(self, reason: Resume, said: str) -> None:
        """After a failure: drops the stream and waits before the next."""
        if self._closing.is_set():
            return
        stream = self._stream
        self._abandon()
        if stream:
            self._caller.endpoints.failed(stream.endpoint)
            self._caller.metrics.cluster_watch_resumes.add(reason=reason)
            log_once(
                logger, f"watch.{reason}", f"etcd: {stream.endpoint.target}: watch of {self._prefix}: {said}; resuming"
            )
        pause = backoff(self._tries)
        self._tries += 1
        try:
            await asyncio.wait_for(self._closing.wait(), pause)
        except TimeoutError:
            return

    def _abandon(self) -> None:
        """Lets the stream go; to be followed by another."""
        stream, self._stream = self._stream, None
        self._pending = []
        if stream:
            stream.cancel()

    async def _drop(self) -> None:
        stream, self._stream = self._stream, None
        self._pending = []
        if stream:
            await stream.close()


def entry_of(kv: Any) -> Entry:
    """An entry of etcd's key-value pair."""
    return Entry(decode_key(kv.key), kv.value, kv.create_revision, kv.mod_revision, kv.version, kv.lease)


def _change(event: Any) -> Change:
    entry = entry_of(event.kv)
    return Change(entry.key, None if event.type == wire.DELETE else entry, entry.modified)
