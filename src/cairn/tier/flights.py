"""Batches under way: what a deadline does to them, and how to wait until there are none."""

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import Event
from typing import Final

from cairn.observe.reasons import Reason
from cairn.tier.base import Outcomes

log = logging.getLogger(__name__)

_LONGEST_WAIT_SECONDS: Final = 3600.0


class Batch(ABC):
    """Blocks moved by one call: each is settled once, with an outcome, and the last to settle completes the batch.

    A block is claimed by taking its number out of a queue, by a worker that moves it or by whoever expires it, so that
    it never is both. `future` cannot be cancelled from outside; it gives `outcomes` when nothing touches the rows any
    more. Workers come to a batch by `SteppedBatch.step`, or claim what they move by `take`.
    """

    def __init__(self, count: int, deadline: float, cancel: Event | None) -> None:
        self.future: Future[Outcomes] = Future()
        self.future.set_running_or_notify_cancel()
        self.outcomes: Outcomes = [None] * count
        self.step_blocks = 1
        self.deadline = deadline
        self.begun = time.monotonic()
        self._cancel = cancel
        self._todo: deque[int] = deque()
        #: Nothing to wait for from the start; and how many blocks there are to move.
        self.empty = True
        self.blocks_to_move = 0
        self._pending = 0
        self._lock = threading.Lock()

    @abstractmethod
    def complete(self) -> "list[Batch]":
        """Draws the conclusions and sets the future. Called once, by whoever settled the last block.

        Returns other batches that waited for nothing else any more, and are to be completed by the caller: see `land`.
        """

    @property
    @abstractmethod
    def quick(self) -> bool:
        """Whether `complete` waits for no I/O, once all is settled."""

    def prepare(self, todo: Sequence[int], others: int = 0) -> None:
        """Says which blocks are to be moved, and how many more `settle` calls come from elsewhere. Called once."""
        self._todo.extend(todo)
        self.blocks_to_move = len(todo)
        self._pending = len(todo) + others
        self.empty = self._pending == 0

    def land(self) -> None:
        """Completes a settled batch and all that waited for it; in a loop, since such chains grow long."""
        landed: list[Batch] = [self]
        while landed:
            landed.extend(landed.pop().complete())

    def expire(self, reason: Reason) -> bool:
        """Settles all blocks that nobody has started; whether the batch is to be completed by the caller now."""
        with self._lock:
            rest = list(self._todo)
            self._todo.clear()
        return self.settle(rest, [reason] * len(rest))

    def take(self, run: Sequence[int]) -> bool:
        """Claims these blocks for the caller, who settles them; False if they were settled by their end."""
        with self._lock:
            if run[0] not in self._todo:
                return False
            for i in run:
                self._todo.remove(i)
            return True

    def release(self) -> bool:
        """Notes that something else has come that was waited for; as `settle`."""
        with self._lock:
            self._pending -= 1
            return self._pending == 0

    def settle(self, run: Sequence[int], reasons: "list[Reason | None]") -> bool:
        """Notes what became of blocks; True if nothing is pending any more, once."""
        if not run:
            return False
        with self._lock:
            for i, reason in zip(run, reasons, strict=True):
                self.outcomes[i] = reason
            self._pending -= len(run)
            return self._pending == 0

    def too_late(self) -> Reason | None:
        """Why what has not started is to be left out, if it is."""
        if self._cancel is not None and self._cancel.is_set():
            return Reason.CANCELLED
        return Reason.TIMEOUT if time.monotonic() > self.deadline else None


class SteppedBatch(Batch):
    """A batch whose blocks are moved in order, a run at a time, by as many workers as call `step`."""

    @abstractmethod
    def arrange(self) -> None:
        """Called before blocks are claimed, in a worker; may wait for I/O."""

    @abstractmethod
    def joins(self, run: list[int], i: int) -> bool:
        """Whether block i, the one after the run, is best moved together with it."""

    @abstractmethod
    def work(self, run: list[int]) -> "list[Reason | None]":
        """Moves a run of blocks; what became of each. Runs in a worker."""

    def step(self) -> None:
        """Moves the next `step_blocks` blocks or a few more, if so many are left: a worker's task."""
        moved, last = 0, False
        while moved < self.step_blocks and not last:
            late = self.too_late()
            if late is not None:
                last = self.expire(late)
                break
            run: list[int] = []
            try:
                self.arrange()
                run = self._claim()
                reasons = self.work(run) if run else []
            except Exception:
                log.exception("moving blocks failed in a way it should not have; please report this")
                if not run:  # of those that nobody has claimed nobody may be left to do so
                    last = self.expire(Reason.IO_ERROR)
                    break
                reasons = [Reason.IO_ERROR] * len(run)
            last = self.settle(run, reasons)
            if not run:
                break
            moved += len(run)
        if last:
            self.land()

    def _claim(self) -> list[int]:
        with self._lock:
            run: list[int] = []
            while self._todo and (not run or self.joins(run, self._todo[0])):
                run.append(self._todo.popleft())
            return run


class Flights:
    """The batches under way. One thread watches their deadlines, so that a batch completes even if all workers are
    stuck.

    on_deadline is called in that thread, once a batch; it must not wait for I/O. Thread-safe.
    """

    def __init__(self, on_deadline: Callable[[Batch], None], name: str) -> None:
        self._on_deadline = on_deadline
        self._under_way: set[Batch] = set()
        self._in_time: set[Batch] = set()
        self._wake_at = float("inf")
        self._stopped = False
        self._refusing = False
        lock = threading.Lock()
        self._changed = threading.Condition(lock)
        self._idle = threading.Condition(lock)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return len(self._under_way)

    def add(self, batch: Batch) -> bool:
        """Takes a batch that has something pending, before anyone could settle it; False after `refuse`."""
        if batch.empty:
            return True
        with self._changed:
            if self._refusing:
                return False
            self._under_way.add(batch)
            self._in_time.add(batch)
            if batch.deadline < self._wake_at:
                self._changed.notify()
            return True

    def refuse(self) -> None:
        """Takes no more batches."""
        with self._changed:
            self._refusing = True

    def remove(self, batch: Batch) -> None:
        with self._idle:
            self._under_way.discard(batch)
            self._in_time.discard(batch)
            if not self._under_way:
                self._idle.notify_all()

    def drain(self, timeout: float) -> bool:
        """Waits until no batch is under way; False if there still is one after `timeout` seconds."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._under_way, timeout)

    def all(self) -> list[Batch]:
        with self._changed:
            return list(self._under_way)

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while (due := self._next_due()) is not None:
            for batch in due:
                self._on_deadline(batch)

    def _next_due(self) -> list[Batch] | None:
        with self._changed:
            while not self._stopped:
                now = time.monotonic()
                due = [batch for batch in self._in_time if batch.deadline <= now]
                if due:
                    self._in_time.difference_update(due)
                    return due
                self._wake_at = min((batch.deadline for batch in self._in_time), default=float("inf"))
                self._changed.wait(min(self._wake_at - now, _LONGEST_WAIT_SECONDS))
        return None
