"""Writes of the remote tier: whole objects, and one of fewer blocks at the end of what was stored."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from threading import Event

from cairn.kv import Keys
from cairn.observe.reasons import Reason
from cairn.tier.base import Rows
from cairn.tier.flights import Batch, SteppedBatch
from cairn.tier.remote.base import Put
from cairn.tier.remote.machine import Machine, OnDone
from cairn.tier.remote.packing import TAIL_BYTES, Span

#: How many leading blocks of these may be stored now.
Admit = Callable[[Keys], int]


class WriteBatch(SteppedBatch):
    """Packs blocks first.. of a chain and stores what the store lacks.

    Blocks before the first place where an object begins cannot be packed: NO_PARENT. `admit` is asked once the store
    has said what it has. After an object that could not be stored, those behind it are left out: nobody could find
    them.
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
        done: OnDone,
        admit: Admit,
    ) -> None:
        super().__init__(len(keys) - first, deadline, cancel)
        self.keys = keys
        self.first = first
        self.rows = rows
        self._namespace = namespace
        self._machine = machine
        self._done = done
        self._admit = admit
        self._failed_from = self._admitted = len(keys)
        self._arranging = threading.Lock()
        self._arranged = False
        step = machine.packing.blocks
        start = min(len(keys), -(-first // step) * step)
        self.outcomes[: start - first] = [Reason.NO_PARENT] * (start - first)
        self.prepare(range(start - first, len(keys) - first))
        self._start = start

    @property
    def quick(self) -> bool:
        return True

    @property
    def steps(self) -> int:
        """How many workers can help."""
        packing = self._machine.packing
        return -(-len(list(packing.spans(self._start, len(self.keys)))) // self._machine.together)

    def joins(self, run: list[int], i: int) -> bool:
        return (self.first + i) % (self._machine.packing.blocks * self._machine.together) != 0

    def arrange(self) -> None:
        """Asks once which of the objects are there."""
        with self._arranging:
            if self._arranged:
                return
            self._arranged = True
            machine, known = self._machine, self._machine.known
            spans = list(machine.packing.spans(self._start, len(self.keys)))
            ends = [self.keys[span.stop - 1].tobytes() for span in spans]
            unknown = [end for end in ends if known.get(end) is None]
            if unknown:
                machine.scout.exists(unknown[: machine.store.probe_names], machine.deadline(self.deadline))
            lacking = next((span.start for span, end in zip(spans, ends, strict=True) if not known.get(end)), None)
            if lacking is not None:
                self._admitted = lacking + self._admit(self.keys[lacking:])

    def work(self, run: list[int]) -> list[Reason | None]:
        spans = list(self._machine.packing.spans(self.first + run[0], self.first + run[-1] + 1))
        reasons = [self._reason_against(span) for span in spans]
        known = self._machine.known
        lacking = [
            i
            for i, span in enumerate(spans)
            if reasons[i] is None and not known.get(self.keys[span.stop - 1].tobytes())
        ]
        for i, reason in zip(lacking, self._store([spans[i] for i in lacking]) if lacking else [], strict=True):
            reasons[i] = reason
        failed = [span.start for span, reason in zip(spans, reasons, strict=True) if reason is not None]
        self._failed_from = min([self._failed_from, *failed])
        return [reason for span, reason in zip(spans, reasons, strict=True) for _ in range(*span)]

    def complete(self) -> list[Batch]:
        self._machine.tally.add(**Counter(f"{reason}_total" for reason in self.outcomes if reason is not None))
        self._done(self)
        self.future.set_result(self.outcomes)
        return []

    def _reason_against(self, span: Span) -> Reason | None:
        # An object is stored whole or not: a part of it would have another name.
        if span.stop > self._admitted:
            return Reason.NOT_ADMITTED
        return Reason.NO_PARENT if span.start >= self._failed_from else None

    def _store(self, spans: list[Span]) -> list[Reason | None]:
        machine = self._machine
        if not machine.write_breaker.allow() or not machine.breaker.allow():
            return [Reason.BREAKER_OPEN] * len(spans)
        puts = [self._put(span) for span in spans]
        size = sum(put.size for put in puts)
        machine.share.before_store(size, self.deadline)
        begun = time.monotonic()
        deadline = machine.deadline(self.deadline)
        reasons = machine.store.put(puts, deadline=deadline)
        machine.judge(next((reason for reason in reasons if reason is not None), None), deadline, begun)
        if machine.streams and not any(reasons):
            machine.streams.stored(size, time.monotonic() - begun)
        stored = [(span, put) for span, put, reason in zip(spans, puts, reasons, strict=True) if reason is None]
        if stored:
            machine.write_breaker.success()
            machine.known.note([self.keys[span.stop - 1].tobytes() for span, _ in stored], True)
            blocks = sum(span.stop - span.start for span, _ in stored)
            machine.tally.add(written_blocks=blocks, written_bytes=sum(put.size for _, put in stored))
        if Reason.NO_SPACE in reasons:
            machine.write_breaker.failure()
        return reasons

    def _put(self, span: Span) -> Put:
        """An object to store."""
        machine, keys = self._machine, self.keys[span.start : span.stop]
        packing, key = machine.packing, keys[-1].tobytes()
        ids = self.rows.ids[span.start - self.first : span.stop - self.first]
        if machine.streams:
            rows = Rows(self.rows.memory, ids)
            return Put(packing.name(key), machine.streams.encode(keys, self._namespace, rows, begins=span.start == 0))
        blocks = [packing.framer.codec.encode(self.rows.memory[i, : packing.block_bytes]) for i in ids]
        tail = packing.tail(key, self._namespace, blocks)
        return Put(packing.name(key), [block.data for block in blocks], tail, TAIL_BYTES)
