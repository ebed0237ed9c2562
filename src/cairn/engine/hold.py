"""A reader's hold on the leading blocks of a prompt: pinned in DRAM, the missing ones on their way up from below."""

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cairn.copy import Copier, PagedKV, Progress, TokenSlots
from cairn.errors import StorageError
from cairn.index import PrefixIndex
from cairn.kv import Keys
from cairn.node.base import Home, Memory, VramHome
from cairn.observe.log import log_once
from cairn.observe.reasons import Reason
from cairn.tier.base import Outcomes

logger = logging.getLogger(__name__)

#: Told once for each tier, when all batches are in: (tier, blocks brought up, seconds it took).
Landed = Callable[[str, int, float], None]


class _Batch:
    """Consecutive blocks that one read brings up from `tier` into reserved rows."""

    __slots__ = ("finished", "first", "future", "ids", "tier")

    def __init__(self, tier: str, first: int, ids: npt.NDArray[np.int32], future: "Future[Outcomes]") -> None:
        self.tier = tier
        self.first = first
        self.ids = ids
        self.future = future
        self.finished = 0.0

    def outcomes(self) -> Outcomes:
        """Of a finished read. A tier's future never fails; one that does all the same has brought nothing."""
        return [Reason.IO_ERROR] * len(self.ids) if self.future.exception() else self.future.result()


class Run(NamedTuple):
    """Blocks up to `stop` are read from memory of one kind: "dram", whichever tier they came from, or "vram"."""

    tier: str
    stop: int


class Hold(ABC):
    """Leading blocks of a chain, kept in DRAM for one reader until `release`.

    `ids[:ready]` are the rows of the blocks that are there and pinned; `ready` grows as batches land, in order, and
    stops growing at the first block that could not be brought up (`reason` says why; None: no tier had it).
    `resident`: how many were there from the beginning. `home`: see `Home`. `abandoned`: nobody waits for it any more.

    Most holds have all their blocks from the beginning, so what only waiting needs is made by who waits.

    Thread-safe. Never raises for what happens below.
    """

    def __init__(self, keys: Keys, resident: npt.NDArray[np.int32], home: Home | None = None) -> None:
        self.keys = keys
        self.ids = resident
        self.resident = self.ready = len(resident)
        self.reason: Reason | None = None
        self.abandoned = False
        self.home = home
        self._lock = threading.Lock()
        self._changed: threading.Condition | None = None

    @property
    @abstractmethod
    def settled(self) -> bool:
        """Whether `ready` is final."""

    @abstractmethod
    def blocks_by_tier(self, start: int, stop: int) -> dict[str, int]:
        """In which tiers blocks start..stop were found, of those that are there now: DRAM, and others that had some."""

    @abstractmethod
    def access(self) -> AbstractContextManager[Memory | None]:
        """The arena, in which `ids[:ready]` may be read while the context lasts. None: it is held no more."""

    @abstractmethod
    def release(self) -> None:
        """Gives the pins back. Idempotent."""

    def run(self, block: int) -> Run:  # noqa: ARG002 - the contract
        """Where `block` is read from, and how far that goes."""
        return Run("dram", len(self.keys))

    def placed(self, blocks: range) -> tuple[Home | VramHome | None, npt.NDArray[np.int32]]:
        """Where blocks of one `run` are, of those that are there, for whoever copies them by himself: home and rows."""
        return self.home, self.ids[blocks.start : blocks.stop]

    def scatter(
        self, copier: Copier, kv: PagedKV, slots: TokenSlots, blocks: range, layers: range | Progress | None = None
    ) -> bool:
        """Copies blocks of one `run`, of those that are there, into a paged cache; see `Copier`. layers: for a run in
        DRAM also a progress, to copy all of them layer by layer.

        False: they are held no more, or cannot be had. Then it is not known what is in the slots, the hold stops short,
        and it knows why. Raises InputError for slots outside the cache.
        """
        with self.access() as memory:
            if memory is None:
                self.stop_short(Reason.NODE_AWAY)
                return False
            try:
                rows = self.ids[blocks.start : blocks.stop]
                if isinstance(layers, Progress):
                    copier.scatter_layers(kv, slots, memory, rows, layers)
                else:
                    copier.scatter(kv, slots, memory, rows, layers)
            except StorageError as error:
                log_once(logger, "scatter", f"a copy failed: {error}")
                self.stop_short(Reason.IO_ERROR)
                return False
        return True

    def stop_short(self, reason: Reason) -> None:
        """No more blocks than those expected so far will come, for this reason."""
        if self.reason is None:
            self.reason = reason

    def wait_beyond(self, ready: int, deadline: float) -> int:
        """Waits until more than `ready` blocks are there, or no more will come, or the deadline (monotonic) has
        passed.
        """
        with self._lock:
            if self.ready <= ready and not self.settled:
                self._changed = self._changed or threading.Condition(self._lock)
                self._changed.wait_for(
                    lambda: self.ready > ready or self.settled or self.abandoned, deadline - time.monotonic()
                )
            if self.ready <= ready and not self.settled:
                self.stop_short(Reason.CANCELLED if self.abandoned else Reason.TIMEOUT)
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

    def _end(self) -> None:
        with self._lock:
            self.abandoned = True
            self._notify()

    def _notify(self) -> None:
        """Wakes who waits. Under the lock."""
        if self._changed:
            self._changed.notify_all()

    def _make_room(self) -> None:
        """For rows that come later. Under the lock, or before anybody else has the hold."""
        if len(self.ids) < len(self.keys):
            ids = np.empty(len(self.keys), np.int32)
            ids[: len(self.ids)] = self.ids
            self.ids = ids


class LocalHold(Hold):
    """A hold on blocks of this process's own tiers. Rows of a batch that is still being read belong to the read: a
    released hold lets it finish, so that the blocks it brings serve the next request.

    progress: called, from whichever thread, when `ready` has grown or the hold has settled.
    """

    def __init__(
        self, index: PrefixIndex, keys: Keys, resident: npt.NDArray[np.int32], landed: Landed, memory: Memory
    ) -> None:
        super().__init__(keys, resident)
        self.progress: Callable[[], None] | None = None
        self._memory = memory
        self._index = index
        self._landed = landed
        self._batches: list[_Batch] = []
        self._started = 0.0
        self._next = 0
        self._brought: dict[str, int] = {}
        self._released = False
        self._cancel: threading.Event | None = None

    def prepare(self) -> threading.Event:
        """Before anything is expected; what it returns is set when the reads are not wanted any more."""
        self._make_room()
        self._cancel = self._cancel or threading.Event()
        return self._cancel

    def expect(self, tier: str, first: int, ids: npt.NDArray[np.int32], future: "Future[Outcomes]") -> None:
        """Adds the next batch: blocks first.. are being read from `tier` into the reserved rows `ids`."""
        self._batches.append(_Batch(tier, first, ids, future))

    def start(self) -> None:
        """Called once all batches are known: from now on they land as they finish."""
        self._started = time.monotonic()
        for batch in self._batches:
            batch.future.add_done_callback(partial(self._finished, batch))

    def blocks_by_tier(self, start: int, stop: int) -> dict[str, int]:
        stop = min(stop, self.ready)
        found = {"dram": max(0, min(stop, self.resident) - start)}
        for batch in self._batches:
            blocks = min(stop, batch.first + len(batch.ids)) - max(start, batch.first)
            if blocks > 0:
                found[batch.tier] = found.get(batch.tier, 0) + blocks
        return found

    @property
    def settled(self) -> bool:
        return self._next == len(self._batches)

    def access(self) -> AbstractContextManager[Memory | None]:
        return nullcontext(self._memory)

    def release(self) -> None:
        self._end()
        with self._lock:
            if self._released:
                return
            self._released = True
            self._index.unpin(self.ids[: self.ready])

    def _end(self) -> None:
        super()._end()
        if self._cancel:
            self._cancel.set()

    def _finished(self, batch: _Batch, _: "Future[Outcomes]") -> None:
        batch.finished = time.monotonic()
        self._land()

    def _land(self) -> None:
        """Publishes every finished batch whose predecessors are published."""
        with self._lock:
            before = self._next
            while self._next < len(self._batches) and self._batches[self._next].future.done():
                self._land_one(self._batches[self._next])
                self._next += 1
            self._notify()
            if self._next > before and self.settled:
                for tier, blocks in self._brought.items():
                    last = max(batch.finished for batch in self._batches if batch.tier == tier)
                    self._landed(tier, blocks, last - self._started)
        if self.progress:
            self.progress()

    def _land_one(self, batch: _Batch) -> None:
        batch.finished = batch.finished or time.monotonic()  # another batch's end may be the first to see this one's
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
        self._brought[batch.tier] = self._brought.get(batch.tier, 0) + good
