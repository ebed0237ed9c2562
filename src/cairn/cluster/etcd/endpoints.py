"""Which member of etcd to talk to: the first of all that answers and has a leader, until it fails."""

import asyncio
import logging

import grpc
import grpc.aio

from cairn.cluster.etcd import wire_pb2 as wire
from cairn.cluster.etcd.endpoint import Endpoint, make_credentials
from cairn.cluster.etcd.failures import describe
from cairn.cluster.etcd.settings import EtcdSettings
from cairn.cluster.metrics import ClusterMetrics
from cairn.errors import ClusterError

logger = logging.getLogger(__name__)


class Endpoints:
    """The members, of which one is in use. All are asked at once, so dead ones cost nobody their deadline."""

    def __init__(self, settings: EtcdSettings, metrics: ClusterMetrics) -> None:
        """Raises InputError for addresses or files that cannot be used."""
        addresses = settings.addresses()
        credentials = make_credentials(settings) if any(map(settings.secure, addresses)) else None
        self._all = [Endpoint(one, credentials if settings.secure(one) else None) for one in addresses]
        self._attempt_s = settings.attempt_s
        self._metrics = metrics
        self._current: Endpoint | None = None
        self._last: Endpoint | None = None
        self._search: asyncio.Task[Endpoint] | None = None
        self._probes: set[asyncio.Task[str | None]] = set()

    async def pick(self, timeout_s: float) -> Endpoint:
        """The member in use. Raises ClusterError if none answers in time, with what each has said."""
        if self._current:
            return self._current
        if self._search is None or self._search.done():
            self._search = asyncio.get_running_loop().create_task(self._find(), name="cairn etcd search")
            self._search.add_done_callback(_retrieve)
        await asyncio.wait([self._search], timeout=timeout_s)
        if not self._search.done():
            raise ClusterError(f"{self}: no member of etcd has answered in {timeout_s:.3g} s")
        return self._search.result()

    def failed(self, endpoint: Endpoint) -> None:
        """Has another member sought, if this one is still in use."""
        if self._current is endpoint:
            self._current = None

    async def close(self) -> None:
        """Ends all calls on all channels."""
        running: list[asyncio.Task[Endpoint] | asyncio.Task[str | None]] = [*self._probes]
        if self._search:
            running.append(self._search)
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running, timeout=self._attempt_s)
        for endpoint in self._all:
            await endpoint.close()

    def __str__(self) -> str:
        return ", ".join(endpoint.target for endpoint in self._all)

    async def _find(self) -> Endpoint:
        """Asks all. Those that are late are left to end by themselves, at their deadline."""
        loop = asyncio.get_running_loop()
        probes = {loop.create_task(self._probe(one), name=f"cairn etcd probe {one.target}"): one for one in self._all}
        waiting = set(probes)
        self._probes |= waiting
        for probe in probes:
            probe.add_done_callback(self._probes.discard)
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for probe in done:
                if probe.result() is None:
                    return self._use(probes[probe])
        raise ClusterError("; ".join(f"{one.target}: {probe.result()}" for probe, one in probes.items()))

    def _use(self, endpoint: Endpoint) -> Endpoint:
        if self._last not in (None, endpoint):
            self._metrics.cluster_failovers.add()
            logger.info("etcd: from %s to %s", self._last.target if self._last else "", endpoint.target)
        self._current = self._last = endpoint
        return endpoint

    async def _probe(self, endpoint: Endpoint) -> str | None:
        """What speaks against a member; None: nothing."""
        try:
            status: wire.StatusResponse = await endpoint.status(wire.StatusRequest(), timeout=self._attempt_s)
        except grpc.aio.AioRpcError as error:
            if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                return None  # it answers; a member may hide its status from those without a token
            return describe(error)
        if status.isLearner:
            return "a learner"
        return None if status.leader else "has no leader"


def _retrieve(task: "asyncio.Task[Endpoint]") -> None:
    """A failure that nobody waits for any more is no news."""
    if not task.cancelled():
        task.exception()
