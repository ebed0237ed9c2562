"""The disk tier: blocks in the fixed slots of one preallocated file, found again after kill -9."""

import logging
import os
import time
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from threading import Event, Lock
from typing import Final, NamedTuple

from cairn.codec import Raw, Shard
from cairn.codec.frame import WHOLE, Framer
from cairn.errors import InputError, StorageError
from cairn.index import LRU, EvictionPolicy, PrefixIndex
from cairn.index.journal import Journal
from cairn.index.slots import SlotIds
from cairn.kv import CANONICAL, Keys, KVGeometry, Layout
from cairn.kv.namespace import DIGEST_BYTES
from cairn.observe.reasons import Reason
from cairn.plan.cost import OnlineFit
from cairn.tier.admission import Admission
from cairn.tier.base import Outcomes, Rows, Tier, check_span
from cairn.tier.breaker import Breaker
from cairn.tier.disk_batch import Machine, ReadBatch
from cairn.tier.disk_directory import CacheDirectory, plan_superblock
from cairn.tier.disk_ledger import Ledger
from cairn.tier.disk_slots import SlotFile
from cairn.tier.disk_table import RecordTable, recover
from cairn.tier.disk_write import WriteBatch, Writers
from cairn.tier.flights import Batch, Flights
from cairn.tier.tally import Tally
from cairn.tier.workers import GRACE_S, Workers

log = logging.getLogger(__name__)

DEFAULT_THREADS: Final = 8


class LoadEstimate(NamedTuple):
    """What a read batch takes, from measurement: seconds a call and seconds a byte; both 0 before there is any."""

    seconds_per_call: float
    seconds_per_byte: float


class DiskTier(Tier):
    """KV blocks in a directory that belongs to this process.

    A block whose write is done (outcome None) survives the death of the process, and after a `sync` that returned True
    a power cut. What is read is proved by its frame: key, geometry, shard and checksum; else it is a miss with a
    reason, and the block goes, with all that follow from it. All files together never exceed `capacity_bytes`.

    layout: of the rows. Blocks are kept as they stand there, so those of another are foreign.
    threads: I/Os in flight. write_budget_bytes_per_day: see `cairn.tier.admission`. stuck_seconds: an I/O that takes
    longer and misses its deadline counts as a failure; three in a row, and the breaker rests the device. lossy: whether
    rows may hold what a codec with loss gave back; a directory keeps only such rows, or none.

    Thread-safe. `match`, `touch`, `stats` and `load_cost` wait for no I/O, however stuck the device is; `read` and
    `write` only queue. Raises InputError for a capacity below one block, LockedError while another process owns the
    directory, StorageError if it holds blocks of another kind or lacks space.
    """

    name = "disk"

    def __init__(
        self,
        path: str | Path,
        *,
        geometry: KVGeometry,
        capacity_bytes: int,
        policy: type[EvictionPolicy] = LRU,
        shard: Shard = WHOLE,
        layout: Layout = CANONICAL,
        threads: int = DEFAULT_THREADS,
        write_budget_bytes_per_day: float | None = None,
        stuck_seconds: float = 1.0,
        breaker: Breaker | None = None,
        lossy: bool = False,
    ) -> None:
        if threads < 1:
            raise InputError(f"threads={threads}: must be at least 1")
        wanted = plan_superblock(geometry, shard, capacity_bytes, layout, lossy=lossy)
        self.capacity_bytes = capacity_bytes
        self.geometry = geometry
        self._directory = CacheDirectory(Path(path), wanted)
        try:
            found = recover(self._directory.table_fd, wanted.slots)
            self._slots = SlotFile(self._directory.path / "data", Framer(Raw(geometry, layout), shard))
        except OSError as error:
            self._directory.close()
            raise StorageError(f"{path}: {error.strerror or error}; check the disk") from None
        self._index = PrefixIndex(wanted.slots, policy)
        ledger = Ledger(self._index, RecordTable(self._directory.table_fd, wanted.slots, found.last_sequence + 1))
        restored = ledger.restore(found)
        self._tally = Tally()
        self._tally.add(restored_blocks=restored, damaged_records=found.damaged)
        self._breaker = breaker or Breaker()
        self._machine = Machine(self._index, ledger, self._slots, self._breaker, self._tally, stuck_seconds)
        self._admission = Admission(write_budget_bytes_per_day, block_bytes=wanted.slot_bytes, blocks=wanted.slots)
        self._fit = OnlineFit(2)
        self._closed = False
        self._closing = Lock()
        self._sync_failed = False
        self._syncing = Lock()
        self._awaiting_sync: list[Future[bool]] = []
        self._sync_runs = False
        self._space = os.fstatvfs(self._slots.fd)
        self._workers = Workers(threads, "cairn-disk")
        self._summer = Workers(1, "cairn-disk-checksums")
        self._flights = Flights(self._at_deadline, "cairn-disk-deadlines")
        self._writers = Writers(self._index, self._admission.admit, self._flights)

    def match(self, keys: Keys) -> int:
        return 0 if self._closed or not self._breaker.ready() else self._index.match(keys)

    def read(
        self, keys: Keys, first: int, rows: Rows, *, deadline: float, cancel: Event | None = None
    ) -> "Future[Outcomes]":
        self._check(keys, first, rows)
        refusal = self._refusal()
        if refusal:
            return self._tally.refused(len(rows.ids), refusal)
        batch = ReadBatch(self._machine, keys[first : first + len(rows.ids)], rows, deadline, cancel, self._read_done)
        self._launch(batch, self._flights.add(batch))
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
        batch = WriteBatch(self._machine, chain, first, rows, namespace, deadline, cancel, self._write_done)
        self._launch(batch, self._writers.enter(batch))
        return batch.future

    def touch(self, keys: Keys) -> None:
        self._index.touch(keys)

    def remove(self, key: Keys) -> int:
        """As the contract says; waits for the page cache, so not for callers that must not wait."""
        return 0 if self._closed else self._machine.ledger.drop(key)

    def sync(self, timeout: float) -> bool:
        """As the contract says. Once a sync has failed every later one is False: the kernel reports a lost page once
        and forgets it, so nobody can tell any more what is on the device."""
        return not self._closed and self._sync(timeout)

    def slots_of(self, keys: Keys) -> SlotIds:
        """In which slots the leading blocks of the chain are; they may move as soon as this is said."""
        slots = self._index.pin(keys, use=False)
        self._index.unpin(slots)
        return slots

    def load_cost(self) -> LoadEstimate:
        """What reading takes now, for the planner; fitted to the latest batches, queueing included."""
        if not self._fit.ready:
            return LoadEstimate(0.0, 0.0)
        # Bytes come first: where all batches were of one size the fit cannot tell, and takes the first that explains
        # it.
        byte, call = self._fit.coefficients().tolist()
        return LoadEstimate(call, byte)

    def watch(self) -> Journal:
        return self._index.watch()

    def stats(self) -> Mapping[str, float]:
        """Counts by reason (`corrupt_total`, ...), `read_blocks`, `read_bytes`, `written_blocks`, `written_bytes`
        (frames included), `restored_blocks`, `damaged_records`, `dropped_blocks`, and the state now."""
        cost = self.load_cost()
        return {
            **self._tally.read(),
            "resident_blocks": len(self._index),
            "capacity_blocks": self._index.capacity,
            "capacity_bytes": self.capacity_bytes,
            "evicted_blocks_total": self._index.evicted,
            "batches_under_way": len(self._flights),
            "breaker_open": 0 if self._breaker.closed else 1,
            "breaker_opened_total": self._breaker.opened,
            "direct_io": int(self._slots.direct),
            "filesystem_bytes": self._space.f_blocks * self._space.f_frsize,
            "filesystem_free_bytes": self._space.f_bavail * self._space.f_frsize,
            "load_seconds_per_call": cost.seconds_per_call,
            "load_seconds_per_byte": cost.seconds_per_byte,
        }

    def close(self, timeout: float) -> None:
        """As the contract says. What is still queued after half of `timeout` is left out with CLOSED. If the device is
        stuck the files stay open, and the lock with them, since an I/O may still come to them."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        self._flights.refuse()
        until = time.monotonic() + max(timeout, GRACE_S)
        if not self._flights.drain(timeout / 2):
            for batch in self._flights.all():
                if batch.expire(Reason.CLOSED):
                    self._workers.submit(batch.land, urgent=True)
            self._flights.drain(until - time.monotonic())
        synced = self._sync(max(0.0, until - time.monotonic()))
        self._flights.stop()
        self._summer.stop(max(0.0, until - time.monotonic()))
        if self._workers.stop(max(0.0, until - time.monotonic())):
            self._slots.close()
            self._machine.ledger.close()
            self._directory.close()
        if not synced:
            log.warning("%s: closed without a sync; a power cut may cost the latest blocks", self._directory.path)

    def _launch(self, batch: ReadBatch | WriteBatch, accepted: bool) -> None:
        if batch.empty or (not accepted and batch.expire(Reason.CLOSED)):
            batch.land()
        elif not accepted:
            return
        elif isinstance(batch, ReadBatch):
            self._workers.submit(batch.step, urgent=True, times=batch.blocks_to_move)
        else:
            ready = partial(self._workers.submit, batch.step, urgent=False)
            self._summer.submit(partial(batch.sum_up, ready), urgent=False)

    def _read_done(self, batch: Batch) -> list[Batch]:
        self._flights.remove(batch)
        if batch.outcomes and not any(batch.outcomes):
            size = len(batch.outcomes) * self.geometry.block_bytes
            self._fit.observe((float(size), 1.0), time.monotonic() - batch.begun)
        return []

    def _write_done(self, batch: Batch) -> list[Batch]:
        assert isinstance(batch, WriteBatch)
        self._flights.remove(batch)
        return list(self._writers.leave(batch))

    def _at_deadline(self, batch: Batch) -> None:
        if self._workers.longest_seconds() > self._machine.stuck_seconds:
            self._breaker.failure()
        if not batch.expire(Reason.TIMEOUT):
            return
        # This thread keeps everyone's deadlines and must not wait for the disk.
        landed = batch.complete() if batch.quick else [batch]
        for waiting in landed:
            self._workers.submit(waiting.land, urgent=True)

    def _sync(self, timeout: float) -> bool:
        done: Future[bool] = Future()
        with self._syncing:
            self._awaiting_sync.append(done)
            start = not self._sync_runs
            self._sync_runs = True
        if start:
            self._workers.submit(self._sync_all, urgent=True)
        try:
            return done.result(timeout)
        except TimeoutError:
            return False

    def _sync_all(self) -> None:
        """Syncs until nobody waits for one that began after he came: a worker's task, and only one worker's, or a slow
        sync asked for again and again would take all of them from the reads."""
        while True:
            with self._syncing:
                awaiting, self._awaiting_sync = self._awaiting_sync, []
                if not awaiting:
                    self._sync_runs = False
                    return
            try:
                self._slots.sync()
                self._machine.ledger.sync()
                self._space = os.fstatvfs(self._slots.fd)  # here, as it may wait for the device
            except OSError as error:
                log.error("%s: sync failed: %s", self._directory.path, error)
                self._sync_failed = True
            except BaseException:
                with self._syncing:
                    self._sync_runs = False  # or nothing would be synced any more
                raise
            for done in awaiting:
                done.set_result(not self._sync_failed)

    def _refusal(self) -> Reason | None:
        if self._closed:
            return Reason.CLOSED
        return None if self._breaker.allow() else Reason.BREAKER_OPEN

    def _check(self, keys: Keys, first: int, rows: Rows) -> None:
        check_span(keys, first, rows)
        if not self._slots.takes(rows.memory):
            raise InputError(
                f"rows of {rows.memory.shape[1]} bytes: must be page-aligned, of whole pages, "
                f"and hold a block of {self.geometry.block_bytes} bytes"
            )
