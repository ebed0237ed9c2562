"""The instances that are there now, with their last reports, and who hears of their coming and going."""

import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple, TypeVar

from cairn.cluster.base import Change, Entry, Registry
from cairn.cluster.follower import Followed, Follower
from cairn.cluster.keys import Keys
from cairn.cluster.metrics import Unread
from cairn.cluster.values import CacheState, Drain, Instance, Load, Versioned, decode
from cairn.observe.log import log_once

logger = logging.getLogger(__name__)


class Member(NamedTuple):
    """An instance with what it has reported last, in this incarnation; None: nothing yet. drain: if nothing new is to
    go there.
    """

    instance: Instance
    load: Load | None = None
    cache: CacheState | None = None
    drain: Drain | None = None


#: What may stand beside an instance, by the name of the part and of the field.
_PARTS: Final[dict[str, type[Load] | type[CacheState] | type[Drain]]] = {
    "load": Load,
    "cache": CacheState,
    "drain": Drain,
}


class Joined(NamedTuple):
    """An instance came: new, or restarted (then its predecessor has left just before)."""

    member: Member


class Left(NamedTuple):
    """An instance went: it deregistered, its lease expired, or another incarnation takes its place."""

    member: Member


class Changed(NamedTuple):
    """An instance changed its registration (`before.instance` differs) or reported."""

    member: Member
    before: Member


Event = Joined | Left | Changed
Listener = Callable[[Event], None]
V = TypeVar("V", bound=Versioned)


class Directory(Followed):
    """Follows the registry: `async with Directory(registry, keys) as directory`. For one event loop.

    Listeners are called in the loop, in order, and must not block. Reports count only for the incarnation that is
    registered. While the registry is away the last state stands. A value that cannot be read is counted and left out.
    """

    def __init__(self, registry: Registry, keys: Keys) -> None:
        self._metrics = registry.metrics
        self._members: dict[str, Member] = {}
        # Reports of incarnations that are not registered: in a difference a report may stand before its instance, and a
        # drain stands on while a lease is lost.
        self._early: dict[tuple[str, str], Load | CacheState | Drain] = {}
        self._listeners: list[Listener] = []
        self._follower = Follower(registry, keys.instances, self._apply)

    @property
    def members(self) -> Mapping[str, Member]:
        """By name; a view that changes with the cluster."""
        return MappingProxyType(self._members)

    @property
    def connected(self) -> bool:
        """Whether changes would come now."""
        return self._follower.connected

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Tells `listener` of every member (Joined), then of every event. Returns how to stop it."""
        for member in list(self._members.values()):
            listener(Joined(member))
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    def _apply(self, changes: tuple[Change, ...]) -> None:
        for change in changes:
            name, _, part = change.key.removeprefix(self._follower.prefix).partition("/")
            if part == "instance":
                self._register(name, self._read(name, change.entry, Instance))
            elif part in _PARTS:
                self._report(name, part, self._read(name, change.entry, _PARTS[part]))

    def _register(self, name: str, instance: Instance | None) -> None:
        before = self._members.get(name)
        if before and (instance is None or instance.incarnation != before.instance.incarnation):
            del self._members[name]
            self._early |= {(name, part): report for part in _PARTS if (report := getattr(before, part))}
            self._metrics.cluster_left.add()
            self._tell(Left(before))
            before = None
        if instance is None:
            return
        if before:
            self._replace(name, before, before._replace(instance=instance))
            return
        member = Member(instance)
        for part in _PARTS:
            early = self._early.get((name, part))
            if early and early.incarnation == instance.incarnation:
                member = _with(member, part, self._early.pop((name, part)))
        self._members[name] = member
        self._metrics.cluster_joined.add()
        self._tell(Joined(member))

    def _report(self, name: str, part: str, report: Load | CacheState | Drain | None) -> None:
        before = self._members.get(name)
        if report and (before is None or report.incarnation != before.instance.incarnation):
            if before:
                self._metrics.cluster_unread.add(kind=type(report).__name__, reason=Unread.STALE)
            self._early[name, part] = report
            return
        self._early.pop((name, part), None)
        if before:
            self._replace(name, before, _with(before, part, report))

    def _replace(self, name: str, before: Member, member: Member) -> None:
        if member != before:
            self._members[name] = member
            self._tell(Changed(member, before))

    def _read(self, name: str, entry: Entry | None, kind: type[V]) -> V | None:
        if entry is None:
            return None
        value = decode(entry, kind)
        if not isinstance(value, Unread):
            if getattr(value, "name", name) == name:
                return value
            value = Unread.MISPLACED
        self._metrics.cluster_unread.add(kind=kind.__name__, reason=value)
        log_once(logger, f"{kind.__name__}.{value}", f"{entry.key}: left out: {value}")
        return None

    def _tell(self, event: Event) -> None:
        for listener in list(self._listeners):
            try:
                listener(event)
            except Exception as error:  # noqa: BLE001 - counted; the other listeners hear of it all the same
                self._metrics.cluster_internal.add()
                log_once(logger, "directory.listener", f"a bug in a listener: {error!r}")


def _with(member: Member, part: str, report: Load | CacheState | Drain | None) -> Member:
    changed: dict[str, Any] = {part: report}
    return member._replace(**changed)
