"""A write of the disk tier: slots late, blocks in any order, the commit in chain order; and the writes under way."""

import threading
from collections.abc import Callable
from threading import Event
from typing import Final

import numpy as np

from cairn.index import PrefixIndex
from cairn.index.slots import SlotIds
from cairn.kv import Keys
from cairn.observe.reasons import Reason
from cairn.tier.base import Rows
from cairn.tier.disk_batch import DiskBatch, Machine, OnDone
from cairn.tier.disk_slots import reason_of
from cairn.tier.flights import Flights

_NO_SLOTS: Final[SlotIds] = np.empty(0, np.int32)


class WriteBatch(DiskBatch):
    """Writes what is new of keys[first:] (the chain from its root) from its rows, and commits it in chain order.

    Slots are reserved when the first block starts, so that a batch still queued holds nothing and evicts nothing. A
    batch whose parent is being written by another one waits with its commit for that one: see `Writers`.
    """

    def __init__(
        self,
        machine: Machine,
        keys: Keys,
        first: int,
        rows: Rows,
        namespace: bytes,
        deadline: float,
        cancel: Event | None,
        on_done: OnDone,
    ) -> None:
        super().__init__(machine, len(keys) - first, deadline, cancel, on_done)
        self.keys = keys
        self.first = first
        self.start = self.stop = first  # keys[start:stop] are new
        self.followers: list[WriteBatch] = []
        self._rows = rows
        self._namespace = namespace
        self._slots: SlotIds | None = None
        self._refused = Reason.NO_SLOT
        self._failed_from = len(keys)
        self._parent_pin = _NO_SLOTS
        self._reserving = threading.Lock()
        self._sums: list[bytes] = [b""] * (len(keys) - first)
        self._summed = 0
        self.step_blocks = machine.slots.write_run_blocks

    def place(self, lead: int, after: "WriteBatch | None", admit: Callable[[Keys], int]) -> None:
        """Decides what is new: the first `lead` keys are there or, the last of them by `after`, on their way."""
        self.start = self.stop = max(lead, self.first)
        if lead < self.first:
            self._fail(self.first, len(self.keys), Reason.NO_PARENT)
            return
        if after is None and not self._pin_parent():
            self._fail(self.start, len(self.keys), Reason.NO_PARENT)
            return
        self.stop = self.start + admit(self.keys[self.start :])
        self._fail(self.stop, len(self.keys), Reason.NOT_ADMITTED)
        new = range(self.start - self.first, self.stop - self.first)
        self.prepare(new, others=0 if after is None else 1)
        if after is not None:
            after.followers.append(self)

    def release(self) -> bool:
        """The batch before this one is finished; whether this one is to be completed now."""
        if not self._pin_parent():
            self._failed_from = self.start
        return super().release()

    def sum_up(self, ready: Callable[[], None]) -> None:
        """Makes the checksums, one after the other, and calls `ready` whenever there is enough for one more `step`.

        A thread of its own does this ahead of the I/O: made by the workers between their I/Os, the same sums cost the
        device 5 to 7 % of its write throughput on the two-core machine that this was measured on.
        """
        start, stop = self.start - self.first, self.stop - self.first
        for i in range(start, stop):
            if self.too_late() is None:
                self._sums[i] = self.machine.slots.sum(self._rows.memory[self._rows.ids[i]])
            self._summed = i + 1
            if (i + 1 - start) % self.step_blocks == 0 or i + 1 == stop:
                ready()

    def arrange(self) -> None:
        with self._reserving:
            # A batch that has met its end meanwhile evicts nothing any more.
            if self._slots is not None or not self._todo:
                return
            try:
                slots = self.machine.ledger.reserve(self.stop - self.start)
            except OSError as error:
                self._refused = reason_of(error)
                slots = _NO_SLOTS
            with self._lock:
                if self._todo:
                    self._slots = slots
                    return
            # Its end came while it waited here: `finish` knows nothing of these slots.
            self.machine.index.free(slots)

    def joins(self, run: list[int], i: int) -> bool:
        at = self.first + i - self.start
        if self._slots is None or at >= len(self._slots) or len(run) >= self.step_blocks:
            return False
        return i < self._summed and bool(self._slots[at] == self._slots[at - 1] + 1)

    @property
    def quick(self) -> bool:
        return self._written() == 0

    def move(self, run: list[int]) -> list[Reason | None]:
        at = self.first + run[0] - self.start
        slots = _NO_SLOTS if self._slots is None else self._slots
        reason: Reason | None
        if self.first + run[0] >= self._failed_from:
            return [Reason.NO_PARENT] * len(run)
        if at >= len(slots):
            reason = self._refused
        else:
            keys = [self.keys[self.first + i].tobytes() for i in run]
            rows = [self._rows.memory[self._rows.ids[i]] for i in run]
            sums = [self._sums[i] for i in run]
            reason = self.machine.slots.write(int(slots[at]), keys, self._namespace, rows, sums)
        if reason is not None:
            self._failed_from = min(self._failed_from, self.first + run[0])
        return [reason] * len(run)

    def finish(self) -> None:
        """Commits, or gives the slots back."""
        index, count = self.machine.index, self._written()
        slots = _NO_SLOTS if self._slots is None else self._slots
        reason = Reason.NO_PARENT
        resident = 0
        try:
            if count:
                keys = self.keys[: self.start + count]
                resident = self.machine.ledger.commit(keys, self.start, slots[:count], self._namespace)
            else:
                resident = index.match(self.keys[: self.start])
        except OSError as error:
            reason = reason_of(error)
        index.free(slots[count:])
        index.unpin(self._parent_pin)
        for at in range(max(self.first, resident), self.stop):
            if self.outcomes[at - self.first] is None:
                self.outcomes[at - self.first] = reason
        self.machine.tally.add(
            written_blocks=max(0, resident - self.start),
            written_bytes=max(0, resident - self.start) * self.machine.slots.slot_bytes,
        )

    def _written(self) -> int:
        """How many of the new blocks are in their slots, up to the first that is not."""
        new = self.outcomes[self.start - self.first : self.stop - self.first]
        return next((i for i, reason in enumerate(new) if reason is not None), len(new))

    def _pin_parent(self) -> bool:
        """Keeps the block that the new ones hang below; whether it is there."""
        if self.start > 0:
            self._parent_pin = self.machine.index.pin(self.keys[self.start - 1 : self.start], use=False)
        return self.start == 0 or len(self._parent_pin) > 0

    def _fail(self, start: int, stop: int, reason: Reason) -> None:
        for at in range(start, stop):
            self.outcomes[at - self.first] = reason


class Writers:
    """The writes under way by the blocks they bring, so that no block is written twice and none before its parent."""

    def __init__(self, index: PrefixIndex, admit: Callable[[Keys], int], flights: Flights) -> None:
        self._index = index
        self._admit = admit
        self._flights = flights
        self._by_key: dict[bytes, WriteBatch] = {}
        self._lock = threading.Lock()

    def enter(self, batch: WriteBatch) -> bool:
        """Decides what of the batch is new, and registers that; False if no batch is taken any more."""
        with self._lock:
            # In this order: what commits in between is still registered.
            lead, after = self._index.match(batch.keys), None
            while lead < len(batch.keys) and (writer := self._by_key.get(batch.keys[lead].tobytes())) is not None:
                lead, after = lead + 1, writer
            batch.place(lead, after, self._admit)
            for at in range(batch.start, batch.stop):
                self._by_key[batch.keys[at].tobytes()] = batch
            # Under the lock: the batch before it could finish, and this one with it, before it was known.
            return self._flights.add(batch)

    def leave(self, batch: WriteBatch) -> list[WriteBatch]:
        """Forgets a batch that has been committed; returns those that waited only for that, to be completed now."""
        with self._lock:
            for at in range(batch.start, batch.stop):
                # Another batch may bring the block anew, if its parent went meanwhile.
                if self._by_key.get(key := batch.keys[at].tobytes()) is batch:
                    del self._by_key[key]
            followers, batch.followers = batch.followers, []
        return [follower for follower in followers if follower.release()]
