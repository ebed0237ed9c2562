"""Objects in a Mooncake Store: the pooled DRAM of a cluster's hosts, over RDMA or TCP.

The client hangs when its master or a peer does, has no deadlines, and cannot be interrupted. So every call runs in a
lane: a thread with registered memory of its own. Whoever waits for it leaves at his deadline; the lane stays with the
call until that returns, and so does the memory that it may still touch. Objects that were lost, a dead peer and objects
that never were give the same answers; what comes is proved by its frames.
"""

import contextlib
import http.client
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from cairn.observe.log import log_once
from cairn.observe.reasons import Reason
from cairn.tier.remote.base import Get, ObjectStore, Put
from cairn.transport.lanes import Call, Client, Lane, Lanes, close_client
from cairn.transport.moving import gather, scatter, sums_of

log = logging.getLogger(__name__)

#: Calls at a time, and so the threads and buffers that a hanging cluster can keep.
_LANES: Final = 12
#: A transfer's call computes until its bytes have come, and one thread of the client receives for all of them: of more
#: than half as many loads as there are cores, each takes the processor from what it waits for.
_LOADS: Final = max(1, min(_LANES, len(os.sched_getaffinity(0)) // 2))
#: Longer than this no load waits for those before it, which a peer may have hung up.
_TURN_S: Final = 0.05
_CLOSE_S: Final = 2.0
_PROBE_S: Final = 0.2

#: The client's codes (mooncake-store/include/types.h): not found, and being written; no space; the master is gone;
#: less memory than the object takes.
_ABSENT: Final = (-704, -703)
_FULL: Final = -200
_NO_MASTER: Final = -900
_TOO_SMALL: Final = -600


class Cluster(NamedTuple):
    """Where a cluster is. master: host:port; metadata: URL of its metadata service; host: our own address and port.

    segment_bytes: memory that this process gives to the cluster; 0: it is a client only.
    """

    master: str
    metadata: str
    host: str
    protocol: str = "tcp"
    device: str = ""
    segment_bytes: int = 0


class MooncakeStore(ObjectStore):
    """A client of the cluster; `make` gives a new `MooncakeDistributedStore`. Connects when it is first used, and again
    once the master was gone.
    """

    object_bytes = 16 << 20
    probe_names = 4096

    def __init__(self, cluster: Cluster, make: Callable[[], Any]) -> None:
        self._cluster = cluster
        self._make = make
        self._client: Client | None = None
        self._connecting = threading.Lock()
        self._closed = False
        self._lanes = Lanes(_LANES, "cairn-mooncake")
        self._turns = threading.Semaphore(_LOADS)

    def exists(self, names: Sequence[bytes], *, deadline: float) -> list[bool] | Reason:
        def ask(client: Any, *_: Any) -> list[bool] | Reason:
            codes = client.batch_is_exist([name.decode() for name in names])
            failed = next((code for code in codes if code < 0 and code not in _ABSENT), None)
            return [code == 1 for code in codes] if failed is None else self.reason(failed, client)

        answer: list[bool] | Reason = self._do(ask, deadline)
        return answer

    def put(self, puts: Sequence[Put], *, deadline: float) -> list[Reason | None]:
        answers: list[Reason | None] | Reason = self._do(_Store(self, puts), deadline)
        return [answers] * len(puts) if isinstance(answers, Reason) else answers

    def get_into(self, gets: Sequence[Get], *, deadline: float) -> list[int | Reason]:
        answers: list[int | Reason] | Reason = self._do(_Load(self, gets), deadline)
        return [answers] * len(gets) if isinstance(answers, Reason) else answers

    def delete(self, names: Sequence[bytes], *, deadline: float) -> Reason | None:
        def remove(client: Any, *_: Any) -> Reason | None:
            # By force: without it an object that was used of late stays.
            codes = client.batch_remove([name.decode() for name in names], True)
            failed = next((code for code in codes if code < 0 and code not in _ABSENT), None)
            return None if failed is None else self.reason(failed, client)

        answer: Reason | None = self._do(remove, deadline)
        return answer

    def health(self, *, deadline: float) -> Reason | None:
        answer = self.exists([b"cairn/health"], deadline=deadline)  # `health_check` calls a dead master healthy
        return answer if isinstance(answer, Reason) else None

    def stats(self) -> Mapping[str, float]:
        return {"abandoned_calls_total": self._lanes.abandoned, "free_lanes": self._lanes.free}

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._lanes.close()
        client, self._client = self._client, None
        closed = client.retire() if client is not None else None
        if client is not None and not (closed and closed.wait(_CLOSE_S)):
            log.warning("mooncake at %s: the client does not close, and is left alone", self._cluster.master)

    # --- parts ---------------------------------------------------------------------------------------------------

    def _do(self, work: "Callable[[Any, Lane, Call], Any]", deadline: float) -> Any:
        def run(lane: Lane, call: Call) -> Any:
            client = self._connected()
            if client is None or not client.enter():
                return Reason.IO_ERROR
            try:
                return work(client.inner, lane, call)
            finally:
                client.leave()

        return self._lanes.run(run, deadline)

    def _connected(self) -> Client | None:
        """The client; None if the cluster cannot be had."""
        with self._connecting:
            if self._client is None and not self._closed:
                where = self._cluster
                if not _answers(where):
                    log_once(log, f"down {where.master}", f"mooncake at {where.master} does not answer")
                    return None
                client = self._make()
                code = client.setup(
                    where.host,
                    where.metadata,
                    where.segment_bytes,
                    _LANES << 20,
                    where.protocol,
                    where.device,
                    where.master,
                )
                if code != 0:
                    log_once(log, f"setup {code}", f"mooncake at {where.master} cannot be reached ({code})")
                    close_client(client)
                    return None
                self._client = Client(client)
            return self._client

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Held while a load transfers bytes; what it has loaded is copied while the next one transfers."""
        mine = self._turns.acquire(timeout=_TURN_S)
        try:
            yield
        finally:
            if mine:
                self._turns.release()

    def reason(self, code: int, client: Any) -> Reason:
        """What a code of the client means, and what follows from it."""
        if code in _ABSENT:
            return Reason.ABSENT
        log_once(log, f"mooncake {code}", f"mooncake at {self._cluster.master} answers {code}")
        current = self._client
        if code == _NO_MASTER and current is not None and current.inner is client:
            # It never finds its way back to a master that was restarted: the next call makes another one.
            self._client = None
            current.retire()
        return Reason.NO_SPACE if code == _FULL else Reason.IO_ERROR


class _Store:
    """Puts, in a lane, all in one call of the client."""

    def __init__(self, store: MooncakeStore, puts: Sequence[Put]) -> None:
        self._store = store
        self._puts = puts

    def __call__(self, client: Any, lane: Lane, call: Call) -> list[Reason | None]:
        names, sizes = [put.name.decode() for put in self._puts], [put.size for put in self._puts]
        starts = list(accumulate(sizes, initial=0))
        memory = lane.memory(client, starts.pop())
        rooms = [memory[start : start + size] for start, size in zip(starts, sizes, strict=True)]
        if not call.with_caller(self._fill, rooms):
            return [Reason.TIMEOUT] * len(names)
        if len(names) == 1:  # the client's batches refuse empty objects
            codes = [client.put_from(names[0], lane.address, sizes[0])]
        else:
            codes = client.batch_put_from(names, [lane.address + start for start in starts], sizes)
        return [None if code == 0 else self._store.reason(code, client) for code in codes]

    def _fill(self, rooms: Sequence[memoryview]) -> None:
        for put, room in zip(self._puts, rooms, strict=True):
            sums = sums_of(put.blocks) if put.tail else None
            gather(put.blocks, room, sums)
            if put.tail and sums is not None:
                room[put.size - put.tail_bytes :] = put.tail(sums)


class _Load:
    """Gets, in a lane, all in one call of the client, which fills one buffer only of two for the same name. There are
    no reads of less than an object here, and an object's size may be another one."""

    def __init__(self, store: MooncakeStore, gets: Sequence[Get]) -> None:
        self._store = store
        self._gets = gets

    def __call__(self, client: Any, lane: Lane, call: Call) -> list[int | Reason]:
        # Of a whole object the size is known, which spares asking the master.
        known = {get.name: get.size for get in self._gets if get.whole}
        codes = {get.name: known.get(get.name) or client.get_size(get.name.decode()) for get in self._gets}
        asked = {name: code for name, code in codes.items() if 0 < code <= _SIZE_LIMIT}
        starts = list(accumulate(asked.values(), initial=0))
        memory = lane.memory(client, starts.pop())
        found = dict.fromkeys(codes, memory[:0])
        if asked:
            places = [lane.address + start for start in starts]
            with self._store.turn():
                came = client.batch_get_into([name.decode() for name in asked], places, list(asked.values()))
            for name, start, code in zip(asked, starts, came, strict=True):
                codes[name], found[name] = code, memory[start : start + max(0, min(code, asked[name]))]
        if not call.with_caller(self._deliver, found):
            return [Reason.TIMEOUT] * len(self._gets)
        return [self._answer(client, get, codes[get.name]) for get in self._gets]

    def _deliver(self, found: Mapping[bytes, memoryview]) -> None:
        for get in self._gets:
            scatter(found[get.name][get.offset :], get.parts, get.sums)

    def _answer(self, client: Any, get: Get, code: int) -> int | Reason:
        if code == _TOO_SMALL and get.whole:
            code = client.get_size(get.name.decode())
        if code < 0:
            return self._store.reason(code, client)
        # Of a range no more counts than was asked for; nobody has asked for an object as large as the limit.
        came = max(0, code - get.offset)
        return came if get.whole or code > _SIZE_LIMIT else min(came, get.size)


#: Sizes are the store's word: memory is taken up to this one.
_SIZE_LIMIT: Final = 1 << 30


def _answers(cluster: Cluster) -> bool:
    """Whether the master is there. Asked before `setup`, which else waits four seconds for it and holds the GIL.

    The metadata service is usually the master's own, and then says whether the process works; a connection is also made
    to one that is frozen.
    """
    host, _, port = cluster.master.rpartition(":")
    try:
        socket.create_connection((host, int(port)), _PROBE_S).close()
        if cluster.metadata.startswith("http://"):
            parts = urlsplit(cluster.metadata)
            connection = http.client.HTTPConnection(parts.netloc, timeout=_PROBE_S)
            try:
                connection.request("GET", f"{parts.path}?key=cairn")
                connection.getresponse()  # any answer will do
            finally:
                connection.close()
    except (OSError, http.client.HTTPException):
        return False
    return True
