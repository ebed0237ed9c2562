"""Stands beside an engine that knows nothing of the cluster: registers it while it answers, reports load and cache."""

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import Callable
from typing import Any, Final

import msgspec

from cairn.cluster.base import Registry
from cairn.cluster.cache_metrics import cache_of
from cairn.cluster.draining import left
from cairn.cluster.engine_metrics import LoadMeter, Scrape, parse
from cairn.cluster.http import HttpError, get, parse_url
from cairn.cluster.keys import Keys
from cairn.cluster.registration import Registration
from cairn.cluster.values import Instance, encode
from cairn.errors import ClosedError, ClusterError, InputError
from cairn.observe.log import log_once

logger = logging.getLogger(__name__)

#: Looks in a row without an answer after which an engine counts as dead; one where nobody listens is, at once.
_MISSES: Final = 3

_LEAVE_S: Final = 2.0


class Registrar:
    """Looks at an engine every `period_s`: /health, then /metrics.

    An engine that answers is registered under a lease, with a new incarnation each time; one that is gone (nobody
    listens, or no answer three times in a row), or that has restarted between two looks (its counters went back), is
    deregistered at once. If this process dies, the lease ends.
    """

    def __init__(
        self,
        registry: Registry,
        keys: Keys,
        instance: Instance,
        *,
        lease_s: float,
        period_s: float = 1.0,
        answer_s: float = 2.0,
        token: str | None = None,
        on_change: Callable[[Instance | None], None] = lambda _: None,
    ) -> None:
        """instance: as it is to be registered; the incarnation is replaced; model, version and block_tokens are asked
        of the engine if they are empty. answer_s: deadline of each question. token: the engine's API key. on_change:
        told what was registered, or None. Raises InputError for a value that breaks a rule.
        """
        parse_url(instance.http)
        encode(instance)
        self._registry, self._keys, self._instance = registry, keys, instance
        self._lease_s, self._period_s, self._token, self._on_change = lease_s, period_s, token, on_change
        self._registration: Registration | None = None
        self._meter = LoadMeter()
        self._answer_s = answer_s
        self._misses = 0

    async def run(self) -> None:
        """Until cancelled; deregisters then. Raises ClusterError when another process has taken the name."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                begun = loop.time()
                try:
                    await self._look()
                except _Superseded:
                    raise ClusterError(
                        f"{self._instance.name}: another process has registered under this name; choose another"
                    ) from None
                except ClusterError as error:
                    log_once(logger, "registrar", f"{self._instance.name}: {error}")
                await asyncio.sleep(max(0.0, begun + self._period_s - loop.time()))
        finally:
            await self._leave()

    async def _look(self) -> None:
        if self._registration and self._registration.superseded.is_set():
            raise _Superseded
        try:
            if (await self._get("/health")).status != 200:
                raise HttpError(f"{self._instance.http}/health: not healthy")
            scrape = await self._scrape()
        except HttpError as error:
            self._misses += 1
            if error.refused or self._misses >= _MISSES:
                await self._leave()
            return
        self._misses = 0
        if self._registration and self._meter.restarted(scrape):
            await self._leave()
        if self._registration is None:
            await self._join(scrape)
        assert self._registration
        report = self._meter.report(
            scrape, self._registration.value.incarnation, asyncio.get_running_loop().time(), time.time()
        )
        await self._registration.report(self._keys.instance(self._instance.name, "load"), report)
        cache = cache_of(scrape.cache, report.incarnation, report.time)
        if cache:
            await self._registration.report(self._keys.instance(self._instance.name, "cache"), cache)

    async def _join(self, scrape: Scrape) -> None:
        instance = msgspec.structs.replace(
            self._instance,
            incarnation=secrets.token_hex(8),
            started=time.time(),
            model=self._instance.model or _text(await self._json("/v1/models"), "data", 0, "id"),
            version=self._instance.version or _text(await self._json("/version"), "version"),
            block_tokens=self._instance.block_tokens or scrape.block_tokens,
        )
        self._meter = LoadMeter()
        registration = Registration(self._registry, self._keys.instance(instance.name), instance, self._lease_s)
        await registration.open()
        self._registration = registration
        self._on_change(instance)

    async def _leave(self) -> None:
        registration, self._registration = self._registration, None
        if registration:
            await registration.close()
            self._on_change(None)
            with contextlib.suppress(ClusterError, ClosedError, TimeoutError):
                async with asyncio.timeout(_LEAVE_S):
                    await left(self._registry, self._keys, self._instance.name, registration.value.incarnation)

    async def _scrape(self) -> Scrape:
        """An engine without metrics is registered all the same, without figures."""
        answer = await self._get("/metrics")
        try:
            return parse(answer.body.decode("utf-8", "replace")) if answer.status == 200 else parse("")
        except ValueError as error:
            log_once(logger, "registrar.metrics", f"{self._instance.http}/metrics: not taken in: {error}")
            return parse("")

    async def _json(self, path: str) -> Any:
        try:
            answer = await self._get(path)
            return json.loads(answer.body) if answer.status == 200 else None
        except (HttpError, ValueError):
            return None

    async def _get(self, path: str) -> Any:
        return await get(self._instance.http, path, self._answer_s, self._token)


class _Superseded(Exception):  # noqa: N818 - a signal within this file
    pass


def rank_endpoints(endpoint: str, ranks: int) -> list[str]:
    """The endpoints of `ranks` data-parallel ranks: vLLM adds the rank to the port. Raises InputError for an endpoint
    that others cannot connect to.
    """
    head, _, port = endpoint.rpartition(":")
    if not head.startswith("tcp://") or not port.isdigit() or not 0 < int(port) <= 65535 - ranks + 1:
        raise InputError(f"{endpoint}: must be an endpoint such as tcp://10.0.0.1:5557")
    if head.removeprefix("tcp://") in ("*", "0.0.0.0", "[::]"):
        raise InputError(f"{endpoint}: is what the engine binds; name the address that others reach it by")
    return [f"{head}:{int(port) + rank}" for rank in range(ranks)]


def _text(tree: Any, *path: str | int) -> str:
    """A text within JSON; "" if there is none."""
    for part in path:
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            return ""
    return tree[:1024] if isinstance(tree, str) else ""
