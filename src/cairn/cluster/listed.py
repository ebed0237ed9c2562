"""What registers itself in one folder, a value a name: the service's replicas, the hosts' nodes."""

import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Generic

from cairn.cluster.base import Change, Registry
from cairn.cluster.follower import Followed, Follower
from cairn.cluster.keys import Keys
from cairn.cluster.metrics import Unread
from cairn.cluster.values import HostNode, Replica, V, decode
from cairn.observe.log import log_once

logger = logging.getLogger(__name__)


class Listed(Followed, Generic[V]):
    """Follows a folder of the registry: `async with Listed(registry, prefix, kind) as listed`. Each registers itself
    with a `Registration`. on_change: told all that are there, in the event loop.
    """

    def __init__(
        self,
        registry: Registry,
        prefix: str,
        kind: type[V],
        on_change: Callable[[Mapping[str, V]], None] = lambda _: None,
    ) -> None:
        self._metrics = registry.metrics
        self._kind, self._on_change = kind, on_change
        self._values: dict[str, V] = {}
        self._follower = Follower(registry, prefix, self._apply)

    @property
    def values(self) -> Mapping[str, V]:
        """By name; a view that changes with the cluster."""
        return MappingProxyType(self._values)

    def _apply(self, changes: tuple[Change, ...]) -> None:
        for change in changes:
            name = change.key.removeprefix(self._follower.prefix)
            self._values.pop(name, None)
            value = decode(change.entry, self._kind) if change.entry else None
            if value is not None and getattr(value, "name", None) == name:
                assert isinstance(value, self._kind)
                self._values[name] = value
            elif value is not None:
                reason, kind = value if isinstance(value, Unread) else Unread.MISPLACED, self._kind.__name__
                self._metrics.cluster_unread.add(kind=kind, reason=reason)
                log_once(logger, f"{kind}.{reason}", f"{change.key}: left out: {reason}")
        self._on_change(self.values)


class Replicas(Listed[Replica]):
    """The replicas of the service, under `Keys.replica`; which of them leads is told by an `Election` under
    `Keys.election`.
    """

    def __init__(self, registry: Registry, keys: Keys) -> None:
        super().__init__(registry, keys.replicas, Replica)

    @property
    def replicas(self) -> Mapping[str, Replica]:
        """By name; a view that changes with the cluster."""
        return self.values


class HostNodes(Listed[HostNode]):
    """The hosts' nodes, under `Keys.node`."""

    def __init__(
        self, registry: Registry, keys: Keys, on_change: Callable[[Mapping[str, HostNode]], None] = lambda _: None
    ) -> None:
        super().__init__(registry, keys.nodes, HostNode, on_change)
