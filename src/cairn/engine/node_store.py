"""The store of an engine that is a client of the host's node: blocks are the node's, their bytes are copied here."""

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import numpy as np

from cairn.copy import RowMemory
from cairn.engine.base import BlockStore, Held
from cairn.engine.hold import Hold
from cairn.engine.node_journal import NodeJournal
from cairn.engine.writing import Writing
from cairn.errors import StorageError
from cairn.kv import Keys, KVGeometry, Layout
from cairn.node import wire
from cairn.node.base import Memory
from cairn.node.client import Link, NodeClient
from cairn.node.wire import MAX_BLOCKS, raw_of, rows_of
from cairn.observe.metrics import Metrics
from cairn.observe.reasons import Reason
from cairn.plan import CostModel

_NO_ROWS = np.empty(0, np.int32)
#: Figures of the node that are younger than this are not asked for again, seconds.
_FRESH_S = 0.1
#: The tiers of which it is known what comes and goes.
_WATCHED = ("dram", "disk")


class NodeHold(Hold):
    """A hold on blocks in the node's arena. `access` says None once the node has taken them back."""

    def __init__(
        self,
        keys: Keys,
        link: Link | None,
        number: int,
        landed: Callable[[str, int, float], None],
        reason: Reason | None = None,
    ) -> None:
        """link: None where nothing will come, for `reason`."""
        super().__init__(keys, _NO_ROWS, link.home if link else None)
        self.reason = reason
        self._link = link
        self.number = number
        self._landed = landed
        self._spans: list[tuple[str, int, int]] = []
        self._early: dict[int, wire.Progress] = {}
        self._arrived = 0
        self._settled = link is None
        self._started = time.monotonic()
        self._released = False

    @property
    def settled(self) -> bool:
        return self._settled

    def blocks_by_tier(self, start: int, stop: int) -> dict[str, int]:
        stop = min(stop, self.ready)
        found = {"dram": 0}
        for tier, first, count in self._spans:
            part = max(0, min(stop, first + count) - max(start, first))
            if part:
                found[tier] = found.get(tier, 0) + part
        return found

    def access(self) -> AbstractContextManager[Memory | None]:
        return self._link.passage() if self._link else nullcontext(None)

    def release(self) -> None:
        self._end()
        with self._lock:
            if self._released:
                return
            self._released = True
        numbers = self._numbers()
        if self._link and numbers:
            self._link.end(*numbers)

    def told(self, reply: wire.Reply | None) -> None:
        """What the node says of this hold, in any order; None: it will say no more."""
        with self._lock:
            if not self._settled:
                if isinstance(reply, wire.Progress):
                    self._early[reply.first] = reply
                    while not self._settled and self._arrived in self._early:
                        self._apply(self._early.pop(self._arrived))
                elif reply is None:
                    self.stop_short(Reason.NODE_AWAY)
                    self._settled = True
            if self._settled and self._link:
                self._link.forget(self.number)
            self._notify()

    def _numbers(self) -> tuple[int, ...]:
        """What the node has under this hold."""
        return (self.number,)

    def _apply(self, news: wire.Progress) -> None:
        rows = rows_of(news.rows)
        at = self._arrived
        if at == 0 and news.settled:
            self.ids = rows
        else:
            self._make_room()
            self.ids[at : at + len(rows)] = rows
        for tier, count in news.tiers:
            self._spans.append((tier, at, count))
            if tier != "dram" and count:
                self._landed(tier, count, time.monotonic() - self._started)
            at += count
        if self._arrived == 0:
            self.resident = sum(count for tier, count in news.tiers if tier == "dram")
        self._arrived += len(rows)
        self.ready = max(self.ready, self._arrived)
        if news.reason:
            self.stop_short(_reason(news.reason))
        self._settled = news.settled


class NodeWriting(Writing):
    """A write into the node's arena. Once the node has taken the rows back, `access` says None and nothing commits."""

    def __init__(self, link: Link | None, number: int, reply: wire.Reply | None, committed: Callable[[int], None]):
        """reply: the node's to `Reserve`."""
        self._number = number
        self._done = 0
        self._committed = committed
        if link and isinstance(reply, wire.Reserved):
            self._link: Link | None = link
            self.home = link.home
            self.first, self.rows, self.reason = reply.first, rows_of(reply.rows), Reason.NO_SLOT
        else:
            self._link = None
            self.first, self.rows, self.reason = 0, _NO_ROWS, Reason.NODE_AWAY

    def access(self) -> AbstractContextManager[RowMemory | None]:
        return self._link.passage() if self._link else nullcontext(None)

    def commit(self, count: int) -> int:
        link = self._link
        if link is None:
            return 0
        reply = link.call(wire.Commit(self._number, link.welcome.session, self._number, count))
        if not isinstance(reply, wire.Committed):
            self.lost = True
            return 0
        self._done += count
        if self._done == len(self.rows):
            self._link = None  # the node ends it by itself
        self._committed(reply.new)
        return reply.new

    def end(self) -> None:
        link, self._link = self._link, None
        if link:
            link.end(self._number)


class NodeStore(BlockStore):
    """The node's blocks. While there is no node, everything is a miss with reason `node_away`, at once."""

    def __init__(
        self,
        address: str,
        geometry: KVGeometry,
        layout: Layout,
        *,
        timeout_s: float,
        wait_s: float,
        metrics: Metrics,
        cost: CostModel,
        canonical: bool = True,
    ) -> None:
        """Waits up to `wait_s` for a node. Raises InputError for what is no address, and StorageError if the node
        refuses this client; that there is none is no error.
        """
        self._geometry = geometry
        self._metrics = metrics
        self._cost = cost
        self._figures: dict[str, dict[str, float]] = {}
        self._figures_at = 0.0
        self._figures_lock = threading.Lock()
        self._journals: dict[str, NodeJournal] = {}
        self._followed: Link | None = None
        self._journals_lock = threading.Lock()
        metrics.watch("node", self._own_figures)
        self._client = NodeClient(
            address, geometry, layout, timeout_s=timeout_s, on_link=self._linked, canonical=canonical
        )
        self._client.wait(wait_s)
        if self._client.refusal:
            why = self._client.refusal
            self._client.close()
            raise StorageError(f"node at {address}: {why}")

    @property
    def asks(self) -> bool:  # type: ignore[override]
        link = self._link()
        return link is not None and link.welcome.asks

    def match(self, keys: Keys) -> Held:
        link = self._link()
        if link is None or not len(keys):
            return Held(0)
        reply = link.call(wire.Match(self._client.number(), link.welcome.session, raw_of(keys[:MAX_BLOCKS])))
        return Held(reply.dram, tuple(reply.below)) if isinstance(reply, wire.Matched) else Held(0)

    def ask(self, keys: Keys, *, deadline: float, worth_s: float) -> "Future[None] | None":
        link = self._link()
        if link is None or not link.welcome.asks or not len(keys):
            return None
        answer: Future[None] = Future()
        number = self._client.number()
        link.expect(number, lambda _: _answered(answer, link, number))
        seconds = max(0.0, deadline - time.monotonic())
        session = link.welcome.session
        reply = link.call(wire.Ask(number, session, number, raw_of(keys[:MAX_BLOCKS]), seconds, worth_s))
        if isinstance(reply, wire.Answered) and not reply.known:
            return answer
        link.forget(number)
        return None

    def hold(self, keys: Keys, *, deadline: float) -> NodeHold:
        link = self._link()
        if link is None or not len(keys):
            return NodeHold(keys, None, 0, self._landed, Reason.NODE_AWAY if link is None else None)
        hold = NodeHold(keys, link, self._client.number(), self._landed)
        self._take(hold, link, keys, deadline)
        return hold

    def write(self, keys: Keys, *, namespace: bytes) -> NodeWriting:
        link, number = self._link(), self._client.number()
        reply = None
        if link:
            request = wire.Reserve(number, link.welcome.session, number, raw_of(keys[:MAX_BLOCKS]), namespace)
            reply = link.call(request)
        return NodeWriting(link, number, reply, self._committed)

    def watch(self) -> dict[str, NodeJournal]:
        with self._journals_lock:
            if not self._journals:
                self._journals = {tier: NodeJournal(tier, self._client, self._figures_of) for tier in _WATCHED}
                if self._followed:
                    self._follow(self._followed)
            return self._journals

    def flush(self, timeout: float) -> bool:
        link = self._link()
        if link is None:
            return False
        number, done, over = self._client.number(), threading.Event(), [False]

        def told(reply: wire.Reply | None) -> None:
            over[0] = isinstance(reply, wire.Flushed) and reply.done
            done.set()

        link.expect(number, told)
        if isinstance(link.call(wire.Flush(number, link.welcome.session, number, timeout)), wire.Flushed):
            done.wait(timeout)
        link.forget(number)
        return over[0]

    def close(self, timeout: float) -> None:  # noqa: ARG002 - the contract
        """Ends the session; what was committed stays in the node, and is written by it."""
        self._client.close()

    # --- parts ---------------------------------------------------------------------------------------------------

    def _take(self, hold: NodeHold, link: Link, keys: Keys, deadline: float) -> None:
        """Has the node pin and bring up what the hold is about, and tell it."""
        number, seconds = hold.number, max(0.0, deadline - time.monotonic())
        link.expect(number, hold.told)
        hold.told(link.call(wire.Take(number, link.welcome.session, number, raw_of(keys[:MAX_BLOCKS]), seconds)))

    def _link(self) -> Link | None:
        """The session, if one stands."""
        link = self._client.link
        return link if link and link.alive else None

    def _linked(self, link: Link) -> None:
        for tier in link.welcome.tiers:
            self._metrics.watch(tier, partial(self._figures_of, tier))
        # What is matched and reserved before the journals have begun would not be mentioned to them.
        with self._journals_lock:
            self._followed = link
            self._follow(link)

    def _follow(self, link: Link) -> None:
        for journal in self._journals.values():
            journal.begin(link)

    def _figures_of(self, tier: str) -> Mapping[str, float]:
        with self._figures_lock:
            link, now = self._link(), time.monotonic()
            if link and now - self._figures_at > _FRESH_S:
                reply = link.call(wire.Stats(self._client.number(), link.welcome.session))
                if isinstance(reply, wire.Figures):
                    self._figures, self._figures_at = reply.tiers, now
            return self._figures.get(tier, {})

    def _own_figures(self) -> Mapping[str, float]:
        connected = self._link() is not None
        own = {"connected": int(connected), "links_total": self._client.links, "losses_total": self._client.losses}
        return {**(self._figures_of("node") if connected else {}), **own}

    def _committed(self, new: int) -> None:
        if new:
            self._metrics.stored_tokens.add(new * self._geometry.block_tokens, tier="dram")

    def _landed(self, tier: str, blocks: int, seconds: float) -> None:
        size = blocks * self._geometry.block_bytes
        self._metrics.transferred(tier, "load", size, seconds)
        self._cost.observe_load(tier, size, seconds)


def _answered(answer: "Future[None]", link: Link, number: int) -> None:
    link.forget(number)
    if not answer.done():
        answer.set_result(None)


def _reason(text: str) -> Reason:
    try:
        return Reason(text)
    except ValueError:
        return Reason.INTERNAL
