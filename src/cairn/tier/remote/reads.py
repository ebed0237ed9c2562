"""Reads of the remote tier: an object asked for by several requests at a time is fetched once."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from threading import Event
from typing import Final, NamedTuple

import numpy as np

from cairn.kv import Keys
from cairn.observe.reasons import Reason
from cairn.tier.base import Rows
from cairn.tier.flights import Batch
from cairn.tier.remote.base import Get
from cairn.tier.remote.machine import Machine, OnDone
from cairn.tier.remote.packing import TAIL_BYTES, Span
from cairn.tier.remote.streams import Streams
from cairn.transport.moving import sums_of

log = logging.getLogger(__name__)

#: What shows that an object is of no use to anybody.
_BROKEN: Final = frozenset({Reason.CORRUPT, Reason.FOREIGN})


class ReadBatch(Batch):
    """Reads keys[first + i] into row i, object by object. What no object is known to hold is EVICTED."""

    def __init__(
        self, machine: Machine, keys: Keys, first: int, rows: Rows, deadline: float, cancel: Event | None, done: OnDone
    ) -> None:
        super().__init__(len(rows.ids), deadline, cancel)
        self.keys = keys
        self.first = first
        self.rows = rows
        self.pieces: list[Piece] = []
        self._machine = machine
        self._done = done
        self._plan()

    def _plan(self) -> None:
        found: list[int] = []
        stop = self.first + len(self.rows.ids)
        for wanted in self._machine.packing.spans(self.first, stop):
            whole = self._machine.scout.covering(self.keys, wanted.start)
            end = min(wanted.stop, whole.stop) if whole else wanted.start
            if whole and end > wanted.start:
                place = self.keys[whole.stop - 1].tobytes(), Span(wanted.start, end)
                run = range(wanted.start - self.first, end - self.first)
                self.pieces.append(Piece(self, whole, place, run))
                found += run
            for at in range(end, wanted.stop):
                self.outcomes[at - self.first] = Reason.EVICTED
        self.prepare(found)

    @property
    def quick(self) -> bool:
        return True

    def complete(self) -> list[Batch]:
        self._machine.tally.add(**Counter(f"{reason}_total" for reason in self.outcomes if reason is not None))
        done = self.outcomes.count(None)
        self._machine.tally.add(read_blocks=done, read_bytes=done * self._machine.packing.block_bytes)
        self._done(self)
        self.future.set_result(self.outcomes)
        return []


class Piece(NamedTuple):
    """Blocks of a batch's chain, out of the object of the blocks `whole`.

    place: what is to be fetched, the object's last key and the blocks; pieces of the same place are fetched together.
    run: the blocks as the batch counts them.
    """

    batch: ReadBatch
    whole: Span
    place: tuple[bytes, Span]
    run: range

    def claim(self) -> bool:
        """Takes the blocks to move them now; False if the batch has given them up, or does so."""
        late = self.batch.too_late()
        if late is not None and self.batch.expire(late):
            self.batch.land()
        return late is None and self.batch.take(self.run)

    def settle(self, reasons: list[Reason | None]) -> None:
        if self.batch.settle(self.run, reasons):
            self.batch.land()


class Fetches:
    """The fetches that wait or are under way. Thread-safe; `submit` runs a task in a worker."""

    def __init__(self, machine: Machine, submit: Callable[[Callable[[], None]], None]) -> None:
        self._machine = machine
        self._submit = submit
        self._waiting: dict[tuple[bytes, Span], list[Piece]] = {}
        self._lock = threading.Lock()
        self.shared = 0

    def add(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            with self._lock:
                others = self._waiting.get(piece.place)
                if others is not None:
                    others.append(piece)
                    self.shared += 1
                    continue
                self._waiting[piece.place] = [piece]
            self._submit(lambda place=piece.place: self._run(place))  # type: ignore[misc]

    def _run(self, place: tuple[bytes, Span]) -> None:
        lead = self._lead(place)
        if lead is None:
            return
        try:
            reasons = self._fetch(lead)
        except Exception:
            log.exception("reading an object failed in a way it should not have; please report this")
            reasons = [Reason.IO_ERROR] * len(lead.run)
        with self._lock:
            followers = self._waiting.pop(place)
        for follower in followers:
            if follower.claim():
                self._copy(lead, follower, reasons)
                follower.settle(list(reasons))
        lead.settle(reasons)  # last: until then its rows are what is copied from

    def _lead(self, place: tuple[bytes, Span]) -> Piece | None:
        """The first piece that is still wanted; the others stay."""
        while True:
            with self._lock:
                if not self._waiting[place]:
                    del self._waiting[place]
                    return None
                piece = self._waiting[place].pop(0)
            if piece.claim():
                return piece

    def _copy(self, lead: Piece, follower: Piece, reasons: list[Reason | None]) -> None:
        size = self._machine.packing.block_bytes
        for source, target, reason in zip(lead.run, follower.run, reasons, strict=True):
            if reason is None:
                row = lead.batch.rows.memory[lead.batch.rows.ids[source]]
                follower.batch.rows.memory[follower.batch.rows.ids[target], :size] = row[:size]

    def _fetch(self, piece: Piece) -> list[Reason | None]:
        """Reads the blocks of a piece into their rows and proves them."""
        machine = self._machine
        if not machine.breaker.allow():
            return [Reason.BREAKER_OPEN] * len(piece.run)
        deadline = machine.deadline(piece.batch.deadline)
        reasons = self._decoded(piece, machine.streams, deadline) if machine.streams else self._copied(piece, deadline)
        if not _BROKEN.isdisjoint(reasons):
            self._drop(piece, deadline)
        return reasons

    def _copied(self, piece: Piece, deadline: float) -> list[Reason | None]:
        """Reads blocks that are stored as they are."""
        packing, (key, wanted), whole = self._machine.packing, piece.place, piece.whole
        tail = memoryview(bytearray(TAIL_BYTES))
        rows = piece.batch.rows
        blocks = [rows.memory[rows.ids[i], : packing.block_bytes] for i in piece.run]
        gets = self._gets(piece, tail, [block.data for block in blocks])
        answer = self._get(piece, gets, deadline)
        if isinstance(answer, Reason):
            return [answer] * len(blocks)
        if answer != len(blocks) * packing.block_bytes + TAIL_BYTES:
            return [Reason.CORRUPT] * len(blocks)
        expected = packing.prove_tail(tail, key, whole.stop - whole.start)
        if isinstance(expected, Reason):
            return [expected] * len(blocks)
        first = wanted.start - whole.start
        sums = gets[0].sums
        assert sums is not None
        return packing.prove(blocks, sums[: len(blocks)], expected[first : first + len(blocks)])

    def _decoded(self, piece: Piece, streams: Streams, deadline: float) -> list[Reason | None]:
        """Reads an object that is a stream: all of it, whatever part is wanted."""
        blocks = piece.whole.stop - piece.whole.start
        data = np.empty(streams.object_limit(blocks), np.uint8)
        get = Get(self._machine.packing.name(piece.place[0]), 0, [data.data], whole=True)
        begun = time.monotonic()
        answer = self._get(piece, [get], deadline)
        if isinstance(answer, Reason):
            return [answer] * len(piece.run)
        streams.loaded(answer, time.monotonic() - begun)
        start, stop = piece.place[1]
        wanted = range(start - piece.whole.start, stop - piece.whole.start)
        rows = Rows(piece.batch.rows.memory, piece.batch.rows.ids[piece.run])
        return [streams.decode(data[:answer], piece.place[0], blocks, wanted, rows)] * len(piece.run)

    def _get(self, piece: Piece, gets: list[Get], deadline: float) -> int | Reason:
        """Loads bytes of a piece's object; how many came."""
        machine, begun, came = self._machine, time.monotonic(), 0
        machine.share.begin_load()
        try:
            answers = machine.store.get_into(gets, deadline=deadline)
            came = sum(answer for answer in answers if not isinstance(answer, Reason))
        finally:
            machine.share.end_load(came)
        refusal = next((answer for answer in answers if isinstance(answer, Reason)), None)
        machine.judge(refusal, deadline, begun)
        if refusal is Reason.ABSENT:
            machine.known.note([piece.place[0]], False)
        return refusal or came

    def _gets(self, piece: Piece, tail: memoryview, blocks: list[memoryview]) -> list[Get]:
        """What to read: blocks and tail at once where the tail follows the blocks."""
        packing, whole, (key, wanted) = self._machine.packing, piece.whole, piece.place
        name, offset = packing.name(key), (wanted.start - whole.start) * packing.block_bytes
        if wanted.stop == whole.stop:
            parts = [*blocks, tail]
            return [Get(name, offset, parts, whole=wanted == whole, sums=sums_of(parts))]
        end = (whole.stop - whole.start) * packing.block_bytes
        return [Get(name, offset, blocks, sums=sums_of(blocks)), Get(name, end, [tail])]

    def _drop(self, piece: Piece, deadline: float) -> None:
        """Takes a broken object away, so that it is written anew and nobody reads it again."""
        self._machine.known.note([piece.place[0]], False)
        self._machine.tally.add(dropped_blocks=piece.whole.stop - piece.whole.start)
        self._machine.store.delete([self._machine.packing.name(piece.place[0])], deadline=deadline)
