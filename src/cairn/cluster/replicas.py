"""The replicas of the service that are there now."""

import logging
from collections.abc import Mapping
from types import MappingProxyType, TracebackType
from typing import Self

from cairn.cluster.base import Change, Registry
from cairn.cluster.follower import Follower
from cairn.cluster.keys import Keys
from cairn.cluster.metrics import Unread
from cairn.cluster.values import Replica, decode
from cairn.observe.log import log_once

logger = logging.getLogger(__name__)


class Replicas:
    """Follows the registry: `async with Replicas(registry, keys) as replicas`. A replica registers itself with a
    `Registration` under `Keys.replica`; which of them leads is told by an `Election` under `Keys.election`.
    """

    def __init__(self, registry: Registry, keys: Keys) -> None:
        self._metrics = registry.metrics
        self._replicas: dict[str, Replica] = {}
        self._follower = Follower(registry, keys.replicas, self._apply)

    @property
    def replicas(self) -> Mapping[str, Replica]:
        """By name; a view that changes with the cluster."""
        return MappingProxyType(self._replicas)

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

    def _apply(self, changes: tuple[Change, ...]) -> None:
        for change in changes:
            name = change.key.removeprefix(self._follower.prefix)
            self._replicas.pop(name, None)
            value = decode(change.entry, Replica) if change.entry else None
            if isinstance(value, Replica) and value.name == name:
                self._replicas[name] = value
            elif value is not None:
                reason = value if isinstance(value, Unread) else Unread.MISPLACED
                self._metrics.cluster_unread.add(kind="Replica", reason=reason)
                log_once(logger, f"Replica.{reason}", f"{change.key}: left out: {reason}")
