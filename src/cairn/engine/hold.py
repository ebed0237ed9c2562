"""A reader's hold on the leading blocks of a prompt: pinned in DRAM, the missing ones on their way up from the disk."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import numpy.typing as npt

from cairn.index import PrefixIndex
from cairn.kv import Keys
from cairn.observe.reasons import Reason
from cairn.tier.base import Outcomes

#: Told once, when all batches are in: (blocks brought up, seconds it took).
Landed = Callable[[int, float], None]


class _Batch:
    """Consecutive blocks that one read brings up into reserved rows."""

    __slots__ = ("first", "future", "ids")

    def __init__(self, first: int, ids: npt.NDArray[np.int32], future: "Future[Outcomes]") -> None:
        self.first = first
        self.ids = ids
        self.future = future

    def outcomes(self) -> Outcomes:
        """Of a finished read. A tier's future never fails; one that does all the same has brought nothing."""
        return [Reason.IO_ERROR] * len(self.ids) if self.future.exception() else self.future.result()


class Hold:
    """Leading blocks of a chain, kept in DRAM for one reader until `release`.

    `ids[:ready]` are the rows of the blocks that are there and pinned; `ready` grows as batches land, in order, and
    stops growing at the first block that could not be brought up (`reason` says why; None: no tier had it). Rows of a
    batch that is still being read belong to the read: a released hold lets it finish, so that the blocks it brings
    serve the next request.

    Thread-safe. Never raises for what happens below.
    """

    def __init__(self, index: PrefixIndex, keys: Keys, resident: npt.NDArray[np.int32], landed: Landed) -> None:
        self.keys = keys
        self.resident = len(resident)
        self.ids = np.empty(len(keys), np.int32)
        self.ids[: self.resident] = resident
        self.ready = self.resident
        self.reason: Reason | None = None
        self.cancel = threading.Event()
        self._index = index
        self._landed = landed
        self._batches: list[_Batch] = []
        self._started = 0.0
        self._next = 0
        self._brought = 0
        self._released = False
        self._changed = threading.Condition()

    def expect(self, first: int, ids: npt.NDArray[np.int32], future: "Future[Outcomes]") -> None:
        """Adds the next batch: blocks first.. are being read into the reserved rows `ids`."""
        self._batches.append(_Batch(first, ids, future))

    def start(self) -> None:
        """Called once all batches are known: from now on they land as they finish."""
        self._started = time.monotonic()
        for batch in self._batches:
            batch.future.add_done_callback(lambda _: self._land())

    def stop_short(self, reason: Reason) -> None:
        """No more blocks than those expected so far will come, for this reason."""
        if self.reason is None:
            self.reason = reason

    @property
    def settled(self) -> bool:
        """Whether `ready` is final."""
        return self._next == len(self._batches)

    def wait_beyond(self, ready: int, deadline: float) -> int:
        """Waits until more than `ready` blocks are there, or no more will come, or the deadline (monotonic) has
        passed.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self.ready > ready or self.settled or self.cancel.is_set(), deadline - time.monotonic()
            )
            if self.ready <= ready and not self.settled:
                self.stop_short(Reason.CANCELLED if self.cancel.is_set() else Reason.TIMEOUT)
            return self.ready

    def wait(self, deadline: float) -> int:
        """Waits until all blocks are there, or no more will come, or the deadline has passed; returns how many are."""
        while not self.settled:
            ready = self.ready
            if self.wait_beyond(ready, deadline) == ready:
                break
        return self.ready

    def abandon(self) -> None:
        """Wakes who waits; blocks whose reading has not started are left out. The hold still has to be released."""
        if not self.settled:
            self.stop_short(Reason.CANCELLED)
        self._end()

    def release(self) -> None:
        """Gives the pins back. Idempotent."""
        self._end()
        with self._changed:
            if self._released:
                return
            self._released = True
            self._index.unpin(self.ids[: self.ready])

    def _end(self) -> None:
        self.cancel.set()
        with self._changed:
            self._changed.notify_all()

    def _land(self) -> None:
        """Publishes every finished batch whose predecessors are published."""
        with self._changed:
            before = self._next
            while self._next < len(self._batches) and self._batches[self._next].future.done():
                self._land_one(self._batches[self._next])
                self._next += 1
            self._changed.notify_all()
            if self._next > before and self.settled:
                self._landed(self._brought, time.monotonic() - self._started)

    def _land_one(self, batch: _Batch) -> None:
        outcomes = batch.outcomes()
        good = next((i for i, outcome in enumerate(outcomes) if outcome is not None), len(outcomes))
        # A batch behind a failed one has no parent in the index: commit frees its rows by itself.
        self._index.commit(self.keys, batch.first, batch.ids[:good])
        self._index.free(batch.ids[good:])
        if good < len(outcomes):
            self.stop_short(outcomes[good] or Reason.IO_ERROR)
        if not self._released and self.ready == batch.first:
            pinned = self._index.pin(self.keys[batch.first : batch.first + good])
            self.ids[self.ready : self.ready + len(pinned)] = pinned
            self.ready += len(pinned)
            if len(pinned) < good:
                self.stop_short(Reason.EVICTED)
        self._brought += good
