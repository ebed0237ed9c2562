"""A setting that a whole cluster shares: put once, followed by everybody."""

import logging
from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec

from cairn.cluster.base import Change, Registry
from cairn.cluster.follower import Followed, Follower
from cairn.cluster.keys import Keys
from cairn.cluster.metrics import Unread
from cairn.cluster.values import UNREADABLE
from cairn.observe.log import log_once

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Shared(Followed, Generic[T]):
    """Follows one setting: `async with Shared(registry, keys, "slo", Slo, default) as slo: slo.value`.

    kind: what msgspec decodes the JSON to (a struct, a dict, a number), with its rules. A value that breaks them is
    counted, and the one before stays. A deleted one is the default again.
    """

    def __init__(
        self,
        registry: Registry,
        keys: Keys,
        name: str,
        kind: type[T],
        default: T,
        on_change: Callable[[T], None] | None = None,
    ) -> None:
        self.value = default
        self._metrics = registry.metrics
        self._key, self._kind, self._default, self._on_change = keys.setting(name), kind, default, on_change
        self._follower = Follower(registry, self._key, self._apply)

    def _apply(self, changes: tuple[Change, ...]) -> None:
        for change in changes:
            if change.key == self._key:
                self._set(change)

    def _set(self, change: Change) -> None:
        before, value = self.value, self._default
        if change.entry:
            try:
                value = msgspec.json.decode(change.entry.value, type=self._kind)
            except UNREADABLE as error:
                self._metrics.cluster_unread.add(kind="setting", reason=Unread.MALFORMED)
                log_once(logger, self._key, f"{self._key}: left as it was: {error}")
                return
        self.value = value
        if value != before and self._on_change:
            self._on_change(value)


async def put_setting(registry: Registry, keys: Keys, name: str, value: object) -> None:
    """Sets it for everybody. Raises ClusterError, and InputError for a bad name."""
    await registry.put(keys.setting(name), msgspec.json.encode(value))
