"""Reads of the remote tier: an object asked for by several requests at a time is fetched once."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from threading import Event
from typing import Final, NamedTuple

import numpy as np

from cairn.codec.base import Octets
from cairn.codec.xxh3 import CHECKSUM_BYTES
from cairn.kv import Keys
from cairn.observe.reasons import Reason
from cairn.tier.base import Rows
from cairn.tier.flights import Batch
from cairn.tier.remote.base import Get
from cairn.tier.remote.machine import Machine, OnDone
from cairn.tier.remote.packing import TAIL_BYTES, Span
from cairn.tier.remote.scout import FAIR_S
from cairn.tier.remote.streams import Streams
from cairn.transport.moving import sums_of

log = logging.getLogger(__name__)

#: What shows that an object is of no use to anybody.
_BROKEN: Final = frozenset({Reason.CORRUPT, Reason.FOREIGN})
#: What the breaker counts.
_FAILURES: Final = frozenset({Reason.TIMEOUT, Reason.IO_ERROR})


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


class _Load(NamedTuple):
    """A piece whose blocks are stored as they are: where these and the object's tail go, and what is to be read."""

    piece: Piece
    blocks: list[Octets]
    tail: memoryview
    gets: list[Get]


class Fetches:
    """The fetches that wait or are under way. Thread-safe; `submit` runs a task in one of `threads` workers."""

    def __init__(self, machine: Machine, submit: Callable[[Callable[[], None]], None], threads: int) -> None:
        self._machine = machine
        self._submit = submit
        self._tasks = machine.store.calls * threads
        self._waiting: dict[tuple[bytes, Span], list[Piece]] = {}
        self._lock = threading.Lock()
        self.shared = 0

    def add(self, pieces: list[Piece]) -> None:
        new = []
        with self._lock:
            for piece in pieces:
                others = self._waiting.get(piece.place)
                if others is None:
                    self._waiting[piece.place] = [piece]
                    new.append(piece.place)
                else:
                    others.append(piece)
                    self.shared += 1
        step = max(1, min(self._machine.together, len(new) // self._tasks))
        for at in range(0, len(new), step):
            self._submit(partial(self._run, new[at : at + step]))

    def _run(self, places: list[tuple[bytes, Span]]) -> None:
        leads = [lead for lead in map(self._lead, places) if lead]
        try:
            outcomes = self._fetch(leads) if leads else []
        except Exception:
            log.exception("reading objects failed in a way it should not have; please report this")
            outcomes = [[Reason.IO_ERROR] * len(lead.run) for lead in leads]
        for lead, reasons in zip(leads, outcomes, strict=True):
            with self._lock:
                followers = self._waiting.pop(lead.place)
            # A store that is too slow is so for all; if only the first one's time was over, others may have more.
            now, again = time.monotonic(), []
            ended = Reason.TIMEOUT in reasons and now >= lead.batch.deadline
            for follower in followers:
                if ended and follower.batch.deadline - now > FAIR_S:
                    again.append(follower)
                elif follower.claim():
                    self._copy(lead, follower, reasons)
                    follower.settle(list(reasons))
            self.add(again)
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

    def _fetch(self, pieces: list[Piece]) -> list[list[Reason | None]]:
        """Reads the blocks of pieces into their rows and proves them."""
        machine = self._machine
        if not machine.breaker.allow():
            return [[Reason.BREAKER_OPEN] * len(piece.run) for piece in pieces]
        deadline = machine.deadline(min(piece.batch.deadline for piece in pieces))
        if machine.streams:
            outcomes = [self._decoded(piece, machine.streams, deadline) for piece in pieces]
        else:
            loads = [self._load(piece) for piece in pieces]
            answers = self._get(pieces, [load.gets for load in loads], deadline)
            outcomes = [self._proved(load, answer) for load, answer in zip(loads, answers, strict=True)]
        for piece, reasons in zip(pieces, outcomes, strict=True):
            if not _BROKEN.isdisjoint(reasons):
                self._drop(piece, deadline)
        return outcomes

    def _load(self, piece: Piece) -> _Load:
        """What to read: blocks and tail at once where the tail follows the blocks."""
        packing, whole, (key, wanted) = self._machine.packing, piece.whole, piece.place
        memory, ids = piece.batch.rows
        blocks = [memory[i, : packing.block_bytes] for i in ids[piece.run.start : piece.run.stop].tolist()]
        tail, parts = memoryview(bytearray(TAIL_BYTES)), [block.data for block in blocks]
        name, offset = packing.name(key), (wanted.start - whole.start) * packing.block_bytes
        if wanted.stop == whole.stop:
            parts.append(tail)
            gets = [Get(name, offset, parts, whole=wanted == whole, sums=sums_of(parts))]
        else:
            end = (whole.stop - whole.start) * packing.block_bytes
            gets = [Get(name, offset, parts, sums=sums_of(parts)), Get(name, end, [tail])]
        return _Load(piece, blocks, tail, gets)

    def _proved(self, load: _Load, answer: int | Reason) -> list[Reason | None]:
        packing, (key, wanted), whole = self._machine.packing, load.piece.place, load.piece.whole
        count = len(load.blocks)
        if isinstance(answer, Reason):
            return [answer] * count
        if answer != count * packing.block_bytes + TAIL_BYTES:
            return [Reason.CORRUPT] * count
        expected = packing.prove_tail(load.tail, key, whole.stop - whole.start)
        if isinstance(expected, Reason):
            return [expected] * count
        first, sums = wanted.start - whole.start, load.gets[0].sums
        assert sums is not None
        wanted_sums = expected[first * CHECKSUM_BYTES : (first + count) * CHECKSUM_BYTES]
        return packing.prove(load.blocks, sums[:count], wanted_sums)

    def _decoded(self, piece: Piece, streams: Streams, deadline: float) -> list[Reason | None]:
        """Reads an object that is a stream: all of it, whatever part is wanted."""
        blocks = piece.whole.stop - piece.whole.start
        data = np.empty(streams.object_limit(blocks), np.uint8)
        get = Get(self._machine.packing.name(piece.place[0]), 0, [data.data], whole=True)
        begun = time.monotonic()
        (answer,) = self._get([piece], [[get]], deadline)
        if isinstance(answer, Reason):
            return [answer] * len(piece.run)
        streams.loaded(answer, time.monotonic() - begun)
        start, stop = piece.place[1]
        wanted = range(start - piece.whole.start, stop - piece.whole.start)
        rows = Rows(piece.batch.rows.memory, piece.batch.rows.ids[piece.run])
        return [streams.decode(data[:answer], piece.place[0], blocks, wanted, rows)] * len(piece.run)

    def _get(self, pieces: list[Piece], gets: list[list[Get]], deadline: float) -> list[int | Reason]:
        """Loads bytes of pieces' objects; how many came of each."""
        machine, begun, came = self._machine, time.monotonic(), 0
        machine.share.begin_load()
        try:
            answers = iter(machine.store.get_into([get for some in gets for get in some], deadline=deadline))
            found = [_sum_of([next(answers) for _ in some]) for some in gets]
            came = sum(answer for answer in found if not isinstance(answer, Reason))
        finally:
            machine.share.end_load(came)
        machine.judge(next((answer for answer in found if answer in _FAILURES), None), deadline, begun)
        absent = [piece.place[0] for piece, answer in zip(pieces, found, strict=True) if answer is Reason.ABSENT]
        if absent:
            machine.known.note(absent, False)
        return found

    def _drop(self, piece: Piece, deadline: float) -> None:
        """Takes a broken object away, so that it is written anew and nobody reads it again."""
        self._machine.known.note([piece.place[0]], False)
        self._machine.tally.add(dropped_blocks=piece.whole.stop - piece.whole.start)
        self._machine.store.delete([self._machine.packing.name(piece.place[0])], deadline=deadline)


def _sum_of(answers: list[int | Reason]) -> int | Reason:
    """How many bytes all came to, or why one did not come."""
    refusal = next((answer for answer in answers if isinstance(answer, Reason)), None)
    return refusal or sum(answer for answer in answers if not isinstance(answer, Reason))
