"""What the dashboard shows of a cluster: its engines as they report, and what the service saw of requests."""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Final
from urllib.parse import urlsplit

from cairn.cluster import TierState
from cairn.fleet import Source
from cairn.serve.dashboard.base import Condition, Counts, InstanceShown, PrefixShown, Reading, TierShown
from cairn.serve.dashboard.prefixes import tree
from cairn.serve.dashboard.traffic import Traffic
from cairn.serve.gateway.members import Member, Members

#: Engines that are gone: for how long they are shown, seconds, and how many at most.
_GONE_S: Final = 600.0
_GONE: Final = 16
_NOTHING: Final = Counts({}, {}, {}, {})
_ORDER: Final = {tier: place for place, tier in enumerate(("vram", "dram", "disk", "peer", "remote"))}


class ClusterShown:
    """A `Source`."""

    kind: Final = "service"

    def __init__(
        self,
        name: str,
        members: Members,
        traffic: Traffic,
        waiting: Callable[[], int],
        held: Callable[[], Mapping[Source, int]],
        *,
        with_text: bool,
    ) -> None:
        """waiting: requests that wait for an engine. held: blocks by who the index knows to hold them. with_text: the
        beginnings of prompts may be shown.
        """
        self.name = name
        self._members, self._traffic, self._waiting, self._held = members, traffic, waiting, held
        self._with_text = with_text
        self._here: dict[str, Member] = {}
        self._gone: OrderedDict[str, InstanceShown] = OrderedDict()
        self._indexed: Counter[str] = Counter()
        self._hot: list[PrefixShown] | None = None
        self._watched = False

    def look(self) -> None:
        """While somebody looks, the tree is made here, and not in the loop that carries requests."""
        self._hot, self._watched = self._tree() if self._watched else None, False
        indexed = Counter[str]()
        for source, blocks in self._held().items():
            indexed[source.instance] += blocks
        self._indexed = indexed

    def read(self) -> Reading:
        traffic, here = self._traffic, dict(self._members.members)
        for name, member in self._here.items():
            if name not in here:
                self._went(member)
        for name in here.keys() & self._gone.keys():
            del self._gone[name]
        traffic.keep(here.keys())
        self._here = here
        return Reading(
            counts={_life(member): self._counts(member) for member in here.values()} | _written(here.values()),
            requests=traffic.answered + traffic.failed,
            failures=traffic.failed,
            running=sum(member.running for member in here.values()),
            waiting=self._waiting(),
            served=traffic.served(),
        )

    def instances(self) -> list[InstanceShown]:
        now = time.monotonic()
        while self._gone and next(iter(self._gone.values())).since < time.time() - _GONE_S:
            self._gone.popitem(last=False)
        here = [_shown(member, now, self._indexed.get(member.name)) for member in self._here.values()]
        return sorted([*here, *self._gone.values()], key=lambda one: one.name)

    def tiers(self) -> list[TierShown]:
        found: dict[str, TierShown] = {}
        seen: set[tuple[str, str]] = set()
        for member in self._here.values():
            for tier in member.cache.tiers if member.cache else ():
                owner = _host_of(member) if tier.shared else member.name
                if (owner, tier.tier) not in seen and (tier.capacity_bytes or tier.blocks):
                    seen.add((owner, tier.tier))
                    total = found.setdefault(tier.tier, TierShown(tier=tier.tier))
                    total.capacity_bytes += tier.capacity_bytes
                    total.used_bytes += tier.used_bytes
                    total.blocks += tier.blocks
                    total.shared |= tier.shared
        return sorted(found.values(), key=lambda one: _ORDER.get(one.tier, len(_ORDER)))

    def hot(self) -> tuple[list[PrefixShown], int]:
        self._watched = True
        return self._tree() if self._hot is None else self._hot, len(self._traffic.recent)

    def _tree(self) -> list[PrefixShown]:
        return tree(list(self._traffic.recent), with_text=self._with_text)

    def _went(self, member: Member) -> None:
        one, now = member.instance, time.time()
        self._gone[one.name] = InstanceShown(
            name=one.name, role=one.role, model=one.model, version=one.version, http=one.http, state="gone", since=now
        )
        while len(self._gone) > _GONE:
            self._gone.popitem(last=False)

    def _counts(self, member: Member) -> Counts:
        """As the engine counts; of one that does not tell what was expected of it."""
        if member.cache is None:
            misses = self._traffic.misses.get(member.name, 0)
            return _NOTHING._replace(
                hit_tokens=dict(self._traffic.hits.get(member.name, {})), missed_tokens={"absent": misses}
            )
        return Counts(
            hit_tokens={tier.tier: tier.hit_tokens for tier in member.cache.tiers},
            missed_tokens=dict(member.cache.missed_tokens),
            load_bytes={tier.tier: tier.load_bytes for tier in member.cache.tiers},
            store_bytes={tier.tier: tier.store_bytes for tier in member.cache.tiers if not _by_the_node(tier)},
        )


def _life(member: Member) -> tuple[str, str]:
    return member.name, f"{member.instance.incarnation} {'routed' if member.cache is None else 'reported'}"


def _by_the_node(tier: TierState) -> bool:
    return tier.shared and tier.tier != "dram"


def _written(members: Iterable[Member]) -> dict[tuple[str, str], Counts]:
    """What nodes have stored, by their hosts: every instance of a host reports the same."""
    return {
        (_host_of(member), "node"): _NOTHING._replace(
            store_bytes={tier.tier: tier.store_bytes for tier in member.cache.tiers if _by_the_node(tier)}
        )
        for member in members
        if member.cache is not None and any(map(_by_the_node, member.cache.tiers))
    }


def _host_of(member: Member) -> str:
    return urlsplit(member.instance.http).hostname or ""


def _shown(member: Member, now: float, indexed: int | None) -> InstanceShown:
    instance, load = member.instance, member.load
    state: Condition = "draining" if member.drains else "ready" if member.ready(now) else "resting"
    return InstanceShown(
        name=member.name,
        role=instance.role,
        model=instance.model,
        version=instance.version,
        http=instance.http,
        state=state,
        since=member.since,
        running=max(member.running, load.running if load else 0),
        waiting=load.waiting if load else 0,
        queued_tokens=member.queued,
        kv_usage=(load.kv_usage or None) if load else None,
        ttft_s=load.ttft_s if load else None,
        tpot_s=load.tpot_s if load else None,
        measured=member.cache is not None,
        indexed_blocks=indexed,
    )
