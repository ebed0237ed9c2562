"""What reads and writes of the disk tier have in common, and the read: from the first block to the future."""

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event
from typing import Final

from cairn.index import PrefixIndex
from cairn.kv import Keys
from cairn.observe.reasons import Reason
from cairn.tier.base import Rows
from cairn.tier.breaker import Breaker
from cairn.tier.disk_ledger import Ledger
from cairn.tier.disk_slots import SlotFile
from cairn.tier.flights import Batch, SteppedBatch
from cairn.tier.tally import Tally

log = logging.getLogger(__name__)

#: What shows that a block is not to be had where the index says it is.
_LOST: Final = frozenset({Reason.CORRUPT, Reason.FOREIGN, Reason.IO_ERROR})


#: What shows that the device works.
_ANSWERS: Final = frozenset({None, Reason.CORRUPT, Reason.FOREIGN})


@dataclass(frozen=True, slots=True)
class Machine:
    """What reads and writes work with. stuck_seconds: an I/O that took longer, and past its deadline, is a failure."""

    index: PrefixIndex
    ledger: Ledger
    slots: SlotFile
    breaker: Breaker
    tally: Tally
    stuck_seconds: float


#: Called when a batch is done; returns the batches that can be completed now.
OnDone = Callable[[Batch], list[Batch]]


class DiskBatch(SteppedBatch):
    """What reads and writes have in common: the device is watched, and the outcomes are counted."""

    def __init__(self, machine: Machine, count: int, deadline: float, cancel: Event | None, on_done: OnDone) -> None:
        super().__init__(count, deadline, cancel)
        self.machine = machine
        self._on_done = on_done

    def work(self, run: list[int]) -> list[Reason | None]:
        start = time.monotonic()
        reasons = self.move(run)
        end = time.monotonic()
        if Reason.IO_ERROR in reasons or (end > self.deadline and end - start > self.machine.stuck_seconds):
            self.machine.breaker.failure()
        elif not _ANSWERS.isdisjoint(reasons):
            self.machine.breaker.success()
        return reasons

    def move(self, run: list[int]) -> list[Reason | None]:
        raise NotImplementedError

    def finish(self) -> None:
        """Draws the conclusions from the outcomes, and may change them."""
        raise NotImplementedError

    def complete(self) -> list[Batch]:
        try:
            self.finish()
        except Exception:
            log.exception("finishing a batch failed in a way it should not have; please report this")
            self.outcomes = [reason or Reason.IO_ERROR for reason in self.outcomes]
        counts = Counter(f"{reason}_total" for reason in self.outcomes if reason is not None)
        self.machine.tally.add(**counts)
        following = self._on_done(self)
        self.future.set_result(self.outcomes)
        return following


class ReadBatch(DiskBatch):
    """Reads keys[i] into row i; the blocks that the index holds are pinned until the end."""

    def __init__(
        self,
        machine: Machine,
        keys: Keys,
        rows: Rows,
        deadline: float,
        cancel: Event | None,
        on_done: OnDone,
    ) -> None:
        super().__init__(machine, len(keys), deadline, cancel, on_done)
        self._keys = keys
        self._rows = rows
        self._slots = machine.index.pin(keys)
        for i in range(len(self._slots), len(keys)):
            self.outcomes[i] = Reason.EVICTED
        self.prepare(range(len(self._slots)))

    @property
    def quick(self) -> bool:
        return self._first_lost() is None

    def arrange(self) -> None:
        """Nothing: the slots are known."""

    def joins(self, run: list[int], i: int) -> bool:
        return len(run) < self.machine.slots.read_run_blocks and self._slots[i] == self._slots[run[-1]] + 1

    def move(self, run: list[int]) -> list[Reason | None]:
        keys = [self._keys[i].tobytes() for i in run]
        rows = [self._rows.memory[self._rows.ids[i]] for i in run]
        return self.machine.slots.read(int(self._slots[run[0]]), keys, rows)

    def finish(self) -> None:
        lost = self._first_lost()
        # While the device fails at everything, the blocks are not to blame.
        if lost is not None and self.machine.breaker.closed:
            dropped = self.machine.ledger.drop(self._keys[lost])
            self.machine.tally.add(dropped_blocks=dropped)
        self.machine.index.unpin(self._slots)
        done = self.outcomes.count(None)
        self.machine.tally.add(read_blocks=done, read_bytes=done * self.machine.slots.block_bytes)

    def _first_lost(self) -> int | None:
        return next((i for i, reason in enumerate(self.outcomes) if reason in _LOST), None)
