"""Tokens of etcd's users: asked for when needed, and again when a member does not take them any more."""

import asyncio

from cairn.cluster.etcd import wire_pb2 as wire
from cairn.cluster.etcd.endpoint import Endpoint, Headers
from cairn.cluster.etcd.settings import EtcdSettings
from cairn.cluster.metrics import ClusterMetrics


class Login:
    """The token of the settings' user. One login at a time, however many calls wait for it."""

    def __init__(self, settings: EtcdSettings, metrics: ClusterMetrics) -> None:
        self._settings, self._metrics = settings, metrics
        self._headers: Headers | None = None if settings.username else ()
        self._lock = asyncio.Lock()

    async def headers(self, endpoint: Endpoint, timeout_s: float) -> Headers:
        """Metadata with a token; empty without a user. Raises AioRpcError as any call does, TimeoutError."""
        async with asyncio.timeout(timeout_s), self._lock:
            if self._headers is None:
                request = wire.AuthenticateRequest(name=self._settings.username, password=self._settings.password or "")
                answer = await endpoint.authenticate(request, timeout=timeout_s)
                self._metrics.cluster_logins.add()
                self._headers = (("token", answer.token),)
            return self._headers

    def refused(self, headers: Headers) -> bool:
        """Forgets a token that was not taken; whether another may be."""
        if self._headers == headers and headers:
            self._headers = None
        return self._settings.username is not None
