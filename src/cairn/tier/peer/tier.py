"""The peer tier: what other hosts' nodes hold in DRAM, read one-sided out of their arenas."""

import logging
import math
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from threading import Event
from typing import Final, NamedTuple

import numpy as np

from cairn.kv import Keys
from cairn.kv.keys import KEY_BYTES
from cairn.observe.reasons import Reason
from cairn.tier.base import Outcomes, Rows, Tier, check_span
from cairn.tier.known import ABSENT_S, Known
from cairn.tier.pace import Pace
from cairn.tier.peer.peers import FAIR_S, Peer, Peers
from cairn.tier.peer.wire import MAX_BLOCKS, MAX_LEASE_S, SUM_BYTES, Find, Found, GiveBack, Lend, Lent, sum_of
from cairn.tier.tally import Tally
from cairn.tier.workers import Workers
from cairn.transport import Read, Transport

log = logging.getLogger(__name__)

#: How long a node is taken to hold what it held.
_PRESENT_S: Final = 10.0
#: Blocks of which it is remembered where they are.
_REMEMBERED: Final = 1 << 17
_SCOUTS: Final = 2
#: One reads while the other proves. Four took half as long again over TCP on two cores, as four bare calls do.
_READERS: Final = 2


class Limits(NamedTuple):
    """Seconds that reading one batch may take, and one lookup; and for which what no node had is not asked about."""

    timeout_s: float = 2.0
    lookup_timeout_s: float = 0.1
    absent_s: float = ABSENT_S


class PeerTier(Tier):
    """KV blocks in other nodes' DRAM, under leases; nothing is stored there.

    Where blocks are is known by asking all nodes: `ask`, in the background; `match` says what is known. To read, a node
    is asked to lend its rows: it pins them and tells where they are, with a checksum of each block that it made then.
    The transport reads them without the node's help, and what came counts if its checksum is the one told. So it does
    not matter what a node does meanwhile: die, hang, take rows back that were lent for too long. A node that does not
    answer, or cannot be read from, three times in a row is left alone for a while.

    pool: the node's name for blocks of this geometry and row layout. Owns neither peers nor transport. Thread-safe;
    `match` and `stats` wait for nothing.
    """

    name = "peer"

    def __init__(self, peers: Peers, transport: Transport, pool: str, block_bytes: int, limits: Limits) -> None:
        self._peers = peers
        self._transport = transport
        self._pool = pool
        self._block_bytes = block_bytes
        self._limits = limits
        self._known = Known[Peer | bool](present_s=_PRESENT_S, absent_s=limits.absent_s, limit=_REMEMBERED)
        self._tally = Tally()
        self._tally.add(lookups_total=0, failed_lookups_total=0)
        self._pace = Pace()
        self._closed = False
        self._scouts = Workers(_SCOUTS, "cairn-peer-ask")
        self._readers = Workers(_READERS, "cairn-peer-read")

    def match(self, keys: Keys) -> int:
        """How many leading blocks a node is known to hold that may be asked now."""
        if not len(keys) or self._closed or not self._peers.all():
            return 0
        raw, now = keys.tobytes(), self._known.now()
        low, high = 0, len(keys)
        middle = high  # first the end, as whoever asked for the chain comes again
        while low < high:
            if self._holder(raw[(middle - 1) * KEY_BYTES : middle * KEY_BYTES], now):
                low = middle
            else:
                high = middle - 1
            middle = (low + high + 1) // 2
        return low

    def ask(self, keys: Keys, *, deadline: float, worth_s: float = math.inf) -> "Future[None] | None":
        pays = self._pace.pays(worth_s)
        if not (pays or self._pace.overdue) or self._closed or not any(peer.ready for peer in self._peers.all()):
            return None
        held = self.match(keys)
        if held == len(keys) or self._known.get(keys[held].tobytes()) is False:
            return None
        self._pace.asked()
        answered: Future[None] = Future()
        self._scouts.submit(partial(self._answer, keys[:MAX_BLOCKS].copy(), deadline, answered), urgent=True)
        return answered if pays else None

    def read(
        self, keys: Keys, first: int, rows: Rows, *, deadline: float, cancel: Event | None = None
    ) -> "Future[Outcomes]":
        check_span(keys, first, rows)
        wanted = keys[first : first + len(rows.ids)].copy()
        # Who has the last has those before it. Found now: by its turn what is known may be too old.
        peer = self._holder(wanted[-1].tobytes()) if len(wanted) else None
        if self._closed or peer is None:
            return self._tally.refused(len(wanted), Reason.CLOSED if self._closed else Reason.EVICTED)
        future: Future[Outcomes] = Future()
        future.set_running_or_notify_cancel()
        self._readers.submit(partial(self._read, future, peer, wanted, rows, deadline, cancel), urgent=True)
        return future

    def write(
        self, keys: Keys, first: int, rows: Rows, *, namespace: bytes, deadline: float, cancel: Event | None = None
    ) -> "Future[Outcomes]":
        """Nothing is stored in another's DRAM."""
        return self._tally.refused(len(rows.ids), Reason.NOT_ADMITTED)

    def write_start(self, keys: Keys) -> int:
        return len(keys)

    def touch(self, keys: Keys) -> None:
        """Nothing: from now on they are used here."""

    def remove(self, key: Keys) -> int:
        """Nothing: they are another's."""
        return 0

    def sync(self, timeout: float) -> bool:
        return True

    def watch(self) -> None:
        """None: the nodes tell by themselves what comes and goes."""

    def stats(self) -> Mapping[str, float]:
        """Counts by reason, `read_blocks`, `read_bytes`, lookups, and the nodes now."""
        peers = self._peers.all()
        return {
            **self._tally.read(),
            "lookup_seconds": self._pace.seconds,
            "peers": len(peers),
            "resting_peers": sum(not peer.ready for peer in peers),
        }

    def close(self, timeout: float) -> None:
        self._closed = True  # what is queued is answered with CLOSED
        until = time.monotonic() + timeout
        for pool in (self._scouts, self._readers):
            pool.stop(max(0.0, until - time.monotonic()))

    # --- lookups -------------------------------------------------------------------------------------------------

    def _holder(self, key: bytes, now: float | None = None) -> Peer | None:
        peer = self._known.get(key, now)
        return peer if isinstance(peer, Peer) and peer.ready and self._peers.has(peer) else None

    def _answer(self, keys: Keys, deadline: float, answered: "Future[None]") -> None:
        try:
            begun, raw = time.monotonic(), keys.tobytes()
            deadline = min(deadline, begun + self._limits.lookup_timeout_s)
            answers = self._peers.ask(self._peers.all(), Find(self._pool, bytearray(raw)), deadline)
            found = [(reply.blocks, peer) for peer, reply in answers.items() if isinstance(reply, Found)]
            self._tally.add(lookups_total=1, failed_lookups_total=int(len(found) < len(answers)))
            if not found:
                return
            blocks, holder = max(found, key=lambda one: one[0])
            self._known.note((raw[i * KEY_BYTES : (i + 1) * KEY_BYTES] for i in range(min(blocks, len(keys)))), holder)
            if blocks < len(keys):
                self._known.note([keys[blocks].tobytes()], False)
            self._pace.took(time.monotonic() - begun)
        finally:
            answered.set_result(None)

    # --- reads ---------------------------------------------------------------------------------------------------

    def _read(
        self,
        future: "Future[Outcomes]",
        peer: Peer,
        keys: Keys,
        rows: Rows,
        deadline: float,
        cancel: Event | None,
    ) -> None:
        try:
            late = self._too_late(deadline, cancel)
            outcomes: Outcomes = [late] * len(keys) if late else self._fetch(peer, keys, rows, deadline)
        except Exception:
            log.exception("reading from a node failed in a way it should not have; please report this")
            outcomes = [Reason.INTERNAL] * len(keys)
        done = outcomes.count(None)
        counts = Counter(f"{reason}_total" for reason in outcomes if reason is not None)
        self._tally.add(read_blocks=done, read_bytes=done * self._block_bytes, **counts)
        future.set_result(outcomes)

    def _too_late(self, deadline: float, cancel: Event | None) -> Reason | None:
        if self._closed:
            return Reason.CLOSED
        if cancel is not None and cancel.is_set():
            return Reason.CANCELLED
        return Reason.TIMEOUT if time.monotonic() > deadline else None

    def _fetch(self, peer: Peer, keys: Keys, rows: Rows, deadline: float) -> Outcomes:
        """Has the rows lent, reads them, and proves what came."""
        now = time.monotonic()
        seconds = min(deadline - now, self._limits.timeout_s, MAX_LEASE_S)
        deadline = now + seconds
        lent = self._peers.call(peer, Lend(self._pool, bytearray(keys), seconds), deadline)
        if not isinstance(lent, Lent):
            return [lent if isinstance(lent, Reason) else Reason.FOREIGN] * len(keys)
        count = len(lent.sums) // SUM_BYTES
        if count > len(keys) or (len(lent.rows), len(lent.sums)) != (4 * count, SUM_BYTES * count):
            return [Reason.FOREIGN] * len(keys)
        if count < len(keys):
            self._known.note([keys[count].tobytes(), keys[-1].tobytes()], False)
        if not count:
            return [Reason.EVICTED] * len(keys)
        reason = self._move(peer, lent, rows, deadline)
        self._peers.tell(peer, GiveBack(lent.lease))
        outcomes: Outcomes = [reason] * count
        for i in range(count if reason is None else 0):
            told = lent.sums[i * SUM_BYTES : (i + 1) * SUM_BYTES]
            if sum_of(keys[i], rows.memory[rows.ids[i], : self._block_bytes]) != told:
                outcomes[i] = Reason.CORRUPT
        return outcomes + [Reason.EVICTED] * (len(keys) - count)

    def _move(self, peer: Peer, lent: Lent, rows: Rows, deadline: float) -> Reason | None:
        """Reads rows of a node into rows here."""
        if not peer.reads.allow():
            return Reason.BREAKER_OPEN
        theirs = np.frombuffer(lent.rows, np.int32).tolist()
        reads = [
            Read(lent.address + row * lent.stride, rows.memory[own, : self._block_bytes].data)
            for row, own in zip(theirs, rows.ids, strict=False)
        ]
        begun = time.monotonic()
        reason = self._transport.read(lent.endpoint, reads, deadline=deadline)
        if reason is None:
            peer.reads.success()
        elif reason is not Reason.TIMEOUT or deadline - begun > FAIR_S:
            peer.reads.failure()
        return reason
