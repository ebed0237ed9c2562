"""The remote tier: KV blocks in objects of a store that other processes and hosts share."""

import logging
import math
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from threading import Event
from typing import Final, NamedTuple

from cairn.codec import canonical_codec
from cairn.codec.frame import Framer
from cairn.codec.ladder import Ladder
from cairn.config.schema import Remote
from cairn.errors import InputError
from cairn.kv import CANONICAL, Keys, KVGeometry, Layout
from cairn.kv.namespace import DIGEST_BYTES
from cairn.observe.metrics import Metrics
from cairn.observe.reasons import Reason
from cairn.tier.admission import Sightings
from cairn.tier.base import Outcomes, Rows, Tier, check_span
from cairn.tier.breaker import Breaker
from cairn.tier.flights import Batch, Flights
from cairn.tier.known import ABSENT_S, Known
from cairn.tier.remote.base import ObjectStore
from cairn.tier.remote.machine import Machine
from cairn.tier.remote.packing import Packing, blocks_of
from cairn.tier.remote.reads import Fetches, ReadBatch
from cairn.tier.remote.scout import Scout
from cairn.tier.remote.share import Share
from cairn.tier.remote.streams import Streams
from cairn.tier.remote.urls import open_store
from cairn.tier.remote.writes import WriteBatch
from cairn.tier.tally import Tally
from cairn.tier.workers import GRACE_S, Workers
from cairn.transport.moving import rehearse

log = logging.getLogger(__name__)

#: What was found to be there is asked about again after so many seconds.
PRESENT_S: Final = 60.0
_SCOUTS: Final = 2
#: What a call of the store takes beyond its deadline before it counts as stuck.
_STUCK_S: Final = 1.0
#: Blocks whose offers `second_touch` remembers.
_REMEMBERED: Final = 1 << 18


class Limits(NamedTuple):
    """How hard the tier may work the store.

    timeout_s, lookup_timeout_s: what one transfer and one lookup may take. threads: loads at a time; a quarter of as
    many more store. write_share: the stores' share of the bytes moved while loads are under way. second_touch: only
    what is offered for the second time is stored. ttl_s: when the store lets unused objects go, if it does. absent_s:
    how long an object that was not there is not asked about again.
    """

    timeout_s: float = 2.0
    lookup_timeout_s: float = 0.25
    threads: int = 8
    write_share: float = 0.25
    second_touch: bool = False
    ttl_s: float | None = None
    absent_s: float = ABSENT_S


DEFAULT_LIMITS: Final = Limits()


class RemoteTier(Tier):
    """KV blocks in an object store, shared with whoever uses the same store, model and settings.

    What is there is known by asking: `ask`, in the background; `match` says what is known. Nothing read is trusted
    before its frames prove it; an object that is torn, corrupt or foreign is a miss with that reason, and is taken
    away. The store may fail in any way: three failures open the breaker, which rests the store and tries it again by
    itself. layout: of the rows; objects are canonical, whatever it is. object_bytes: the size of an object; what the
    store likes unless given. Processes with other sizes do not see each other's objects. ladder: of codecs, if objects
    are compressed, for canonical rows only (`streams` says who sees whose objects then). metrics: where it is counted.

    Owns the store and closes it. Thread-safe; `match`, `touch` and `stats` wait for nothing.
    """

    name = "remote"

    def __init__(
        self,
        store: ObjectStore,
        *,
        geometry: KVGeometry,
        limits: Limits = DEFAULT_LIMITS,
        layout: Layout = CANONICAL,
        object_bytes: int | None = None,
        breaker: Breaker | None = None,
        ladder: Ladder | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        rehearse()
        self.geometry = geometry
        self._metrics = metrics or Metrics()
        self._store = store
        self._limits = limits
        self._tally = Tally()
        self._tally.add(failed_lookups_total=0)
        self._breaker = breaker or Breaker()
        if ladder and layout != CANONICAL:
            raise InputError(f"codecs for rows of layout {layout}: they read canonical rows only")
        streams = Streams(ladder, self._metrics) if ladder else None
        liked = object_bytes or store.object_bytes * (streams.growth if streams else 1)
        packing = Packing(
            Framer(canonical_codec(geometry, layout)),
            blocks_of(liked, geometry.block_bytes),
            streams.family if streams else "",
        )
        known = Known[bool](present_s=min(PRESENT_S, (limits.ttl_s or PRESENT_S * 2) / 2), absent_s=limits.absent_s)
        self._machine = Machine(
            store=store,
            packing=packing,
            known=known,
            scout=Scout(store, packing, self._breaker, known),
            breaker=self._breaker,
            write_breaker=Breaker(),
            share=Share(limits.write_share),
            tally=self._tally,
            timeout_s=limits.timeout_s,
            streams=streams,
        )
        self.pack_blocks = packing.blocks
        self._sightings = Sightings(_REMEMBERED) if limits.second_touch else None
        self._admitting = threading.Lock()
        self._closed = False
        self._closing = threading.Lock()
        self._scouts = Workers(_SCOUTS, "cairn-remote-ask")
        self._readers = Workers(limits.threads, "cairn-remote-read")
        self._writers = Workers(max(1, limits.threads // 4), "cairn-remote-write")
        self._fetches = Fetches(self._machine, partial(self._readers.submit, urgent=True), limits.threads)
        self._flights = Flights(self._at_deadline, "cairn-remote-deadlines")

    def match(self, keys: Keys) -> int:
        """How many leading blocks the store is known to have; 0 while the breaker is open."""
        return 0 if self._closed or not self._breaker.ready() else self._machine.scout.match(keys)

    def ask(self, keys: Keys, *, deadline: float, worth_s: float = math.inf) -> "Future[None] | None":
        scout = self._machine.scout
        self._look_at(self._scouts)
        pays = scout.pace.pays(worth_s)
        if self._closed or not self._breaker.ready() or not (pays or scout.pace.overdue) or scout.settled(keys):
            return None
        scout.pace.asked()
        answered: Future[None] = Future()
        self._scouts.submit(partial(self._answer, keys.copy(), deadline, answered), urgent=True)
        return answered if pays else None

    def read(
        self, keys: Keys, first: int, rows: Rows, *, deadline: float, cancel: Event | None = None
    ) -> "Future[Outcomes]":
        self._check(keys, first, rows)
        refusal = self._refusal()
        if refusal:
            return self._tally.refused(len(rows.ids), refusal)
        batch = ReadBatch(self._machine, keys, first, rows, deadline, cancel, self._flights.remove)
        if batch.empty or (not self._flights.add(batch) and batch.expire(Reason.CLOSED)):
            batch.land()
        else:
            self._fetches.add(batch.pieces)
        return batch.future

    def write(
        self, keys: Keys, first: int, rows: Rows, *, namespace: bytes, deadline: float, cancel: Event | None = None
    ) -> "Future[Outcomes]":
        self._check(keys, first, rows)
        if len(namespace) != DIGEST_BYTES:
            raise InputError(f"namespace of {len(namespace)} bytes: must be the {DIGEST_BYTES} of the chain's root")
        refusal = self._refusal()
        if refusal:
            return self._tally.refused(len(rows.ids), refusal)
        chain = keys[: first + len(rows.ids)]
        batch = WriteBatch(
            self._machine, chain, first, rows, namespace, deadline, cancel, self._flights.remove, self._admit
        )
        if batch.empty or (not self._flights.add(batch) and batch.expire(Reason.CLOSED)):
            batch.land()
        else:
            self._writers.submit(batch.step, urgent=False, times=batch.steps)
        return batch.future

    def write_start(self, keys: Keys) -> int:
        """An object is written whole, also where the store has the beginning of it as a smaller one."""
        held = self.match(keys)
        return held if held == len(keys) else held // self.pack_blocks * self.pack_blocks

    def touch(self, keys: Keys) -> None:
        """Nothing: objects are renewed when they are asked about and read."""

    def remove(self, key: Keys) -> int:
        """Takes away the object that ends with the block, if there is one. What follows stays, and is not found."""
        end = key.tobytes()
        deadline = time.monotonic() + self._limits.timeout_s
        if self._closed or self._store.delete([self._machine.packing.name(end)], deadline=deadline) is not None:
            return 0
        there = self._machine.known.get(end)
        self._machine.known.note([end], False)
        return int(there is not False)

    def sync(self, timeout: float) -> bool:
        """Nothing to do: what a store has accepted is its own affair."""
        return not self._closed

    def watch(self) -> None:
        """None: the blocks are not this process's, so their coming and going is not for it to tell."""

    def stats(self) -> Mapping[str, float]:
        """Counts by reason, `read_blocks`, `read_bytes`, `written_blocks`, `written_bytes` (frames included),
        `dropped_blocks`, lookups and their round trips, and the state now."""
        scout = self._machine.scout
        decoded, decoding_s = self._metrics.decompression.sums(tier=self.name)
        return {
            **self._tally.read(),
            **self._store.stats(),
            "object_blocks": self.pack_blocks,
            "lookups_total": scout.lookups,
            "round_trips_total": scout.round_trips,
            "lookup_seconds": scout.pace.seconds,
            "shared_reads_total": self._fetches.shared,
            "held_back_writes_total": self._machine.share.held_back,
            "compression_ratio": self._metrics.compression.value(tier=self.name) or 1.0,
            "decompressed_objects_total": decoded,
            "decompression_seconds_total": decoding_s,
            "batches_under_way": len(self._flights),
            "breaker_open": 0 if self._breaker.closed else 1,
            "breaker_opened_total": self._breaker.opened,
            "write_breaker_open": 0 if self._machine.write_breaker.closed else 1,
        }

    def close(self, timeout: float) -> None:
        """As the contract says; what is still queued after half of `timeout` is left out with CLOSED."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        self._flights.refuse()
        until = time.monotonic() + max(timeout, GRACE_S)
        if not self._flights.drain(timeout / 2):
            for batch in self._flights.all():
                if batch.expire(Reason.CLOSED):
                    batch.land()
            self._flights.drain(until - time.monotonic())
        self._flights.stop()
        stopped = [
            pool.stop(max(0.0, until - time.monotonic())) for pool in (self._scouts, self._readers, self._writers)
        ]
        if all(stopped):
            self._store.close()
        else:
            log.warning("remote tier: closed while the store still owes an answer")

    # --- parts ---------------------------------------------------------------------------------------------------

    def _answer(self, keys: Keys, deadline: float, answered: "Future[None]") -> None:
        try:
            limit = min(deadline, time.monotonic() + self._limits.lookup_timeout_s)
            reason = self._machine.scout.ask(keys, limit)
            if reason is not None:
                self._tally.add(failed_lookups_total=1)
        finally:
            answered.set_result(None)

    def _look_at(self, workers: Workers) -> None:
        """A call that does not return, as in a file system that hangs, tells the breaker nothing by itself."""
        if workers.longest_seconds() > self._limits.timeout_s + _STUCK_S and self._breaker.allow():
            self._breaker.failure()

    def _at_deadline(self, batch: Batch) -> None:
        if isinstance(batch, ReadBatch):  # stores may be slow in the background
            self._look_at(self._readers)
        if batch.expire(Reason.TIMEOUT):
            batch.land()

    def _admit(self, keys: Keys) -> int:
        if self._sightings is None:
            return len(keys)
        with self._admitting:
            seen = self._sightings.sight(keys)
        return len(keys) if seen.all() else int(seen.argmin())

    def _refusal(self) -> Reason | None:
        if self._closed:
            return Reason.CLOSED
        return None if self._breaker.ready() else Reason.BREAKER_OPEN

    def _check(self, keys: Keys, first: int, rows: Rows) -> None:
        check_span(keys, first, rows)
        if rows.memory.shape[1] < self.geometry.block_bytes or rows.memory.strides[1] != 1:
            raise InputError(
                f"rows of {rows.memory.shape[1]} bytes: must hold a block of {self.geometry.block_bytes} bytes"
            )


def open_remote(
    settings: Remote,
    geometry: KVGeometry,
    layout: Layout,
    ladder: Ladder | None = None,
    metrics: Metrics | None = None,
    *,
    absent_s: float = ABSENT_S,
) -> RemoteTier:
    """The tier that `storage.remote` asks for, whose url is given, for rows of `layout`. absent_s: see `Limits`.

    Raises ConfigError or StorageError.
    """
    assert settings.url is not None
    if ladder:
        ladder.rehearse()
    store = open_store(settings.url, ttl_s=settings.ttl_s, capacity_bytes=settings.capacity)
    limits = Limits(
        timeout_s=settings.timeout_s,
        lookup_timeout_s=settings.lookup_timeout_s,
        threads=settings.threads,
        write_share=settings.write_share,
        second_touch=settings.admission == "second_touch",
        ttl_s=settings.ttl_s,
        absent_s=absent_s,
    )
    return RemoteTier(
        store,
        geometry=geometry,
        limits=limits,
        layout=layout,
        object_bytes=settings.object_size,
        ladder=ladder,
        metrics=metrics,
    )
