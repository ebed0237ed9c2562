"""Snapshots of a FleetIndex: written beside events and lookups, read at the next start.

Sources know nothing of each other, so each is copied at a moment of its own, together with how far its stream had been
taken in at that moment (`copying`). What is not in it: links, which are one index's own; copies beyond the first, which
count as gone too early then; counters; what clock's hand and recency knew.
"""

import io
import logging
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from cairn.errors import StorageError
from cairn.fleet.base import Source, Stored, Tier
from cairn.fleet.draft import draft
from cairn.fleet.index import FleetIndex
from cairn.fleet.metrics import FleetMetrics, WarmStarted
from cairn.fleet.positions import Position, WarmStart
from cairn.fleet.snapshot_format import (
    BLOCKS,
    END,
    KEPT,
    SOURCE,
    VOID,
    Header,
    Read,
    RecordWriter,
    SourceHead,
    SpoiledError,
    Write,
    decoded,
    piece_of,
    records,
    scheme,
)

logger = logging.getLogger(__name__)

_ROOM = 1 << 21

Positions = Callable[[Source], Position | None]
"""How far the stream of a source has been taken in; None: leave the source out."""

At = Callable[[Callable[[], bool]], bool]
"""Calls where nothing of any source is half taken in (a feed's event loop), and waits for the result."""


class Written(NamedTuple):
    """sources, worker_blocks: written. left_out: sources without a position, or dropped meanwhile. seconds: in all."""

    sources: int
    worker_blocks: int
    left_out: int
    bytes: int
    seconds: float


class StoppedError(Exception):
    """Whoever wanted the snapshot does not any more."""


def write_snapshot(
    index: FleetIndex,
    path: Path,
    positions: Positions | None = None,
    *,
    at: At | None = None,
    stop: threading.Event | None = None,
) -> Written:
    """Writes the index to a file, which replaces the one before when it is whole. For any one thread; nobody else waits
    longer than for the copy of one source's names. Takes memory for the largest source, about 40 bytes a block.

    positions: without, sources are written that can be read only by a `read_snapshot` that holds nothing back. at:
    without, sources must not change meanwhile, or be told of one event at a time. stop: gives up when it is set.
    Raises StorageError, StoppedError.
    """
    rehearse()
    begun = time.monotonic()
    with draft(path) as file:
        kept, left_out, blocks = write_sources(index, index.sources(), file.write, positions, at=at, stop=stop)
        size = file.tell()
    return Written(kept, blocks, left_out, size, time.monotonic() - begun)


def write_sources(
    index: FleetIndex,
    sources: tuple[Source, ...],
    write: Write,
    positions: Positions | None = None,
    *,
    at: At | None = None,
    stop: threading.Event | None = None,
) -> tuple[int, int, int]:
    """The snapshot of some sources, to anywhere; how many were written, how many left out, and how many blocks."""
    writer = RecordWriter(write, Header(scheme(), time.time(), *index.limits))
    kept = total = 0
    for source in sources:
        blocks = _write_source(index, source, writer, positions, at or _here, stop or threading.Event())
        kept += blocks is not None
        total += blocks or 0
    writer.record(END, kept.to_bytes(8, "little"))
    return kept, len(sources) - kept, total


def _here(call: Callable[[], bool]) -> bool:
    return call()


def _write_source(
    index: FleetIndex, source: Source, writer: RecordWriter, positions: Positions | None, at: At, stop: threading.Event
) -> int | None:
    """How many blocks were written; None: the source was left out."""
    copy, position = index.copy(source), None
    if copy is None:
        return None

    def take() -> bool:
        nonlocal position
        position = positions(source) if positions else None
        return (position is not None or positions is None) and index.cut(source, copy)

    try:
        if not at(take):
            return None
        writer.source(SourceHead(*source, copy.sizes, copy.count, position))
        written = 0
        for piece in copy.pieces():
            if stop.is_set():
                raise StoppedError
            writer.blocks(piece)
            written += len(piece.hashes)
        writer.record(VOID if copy.broken else KEPT, written.to_bytes(8, "little"))
        return None if copy.broken else written
    finally:
        copy.close()


def read_snapshot(
    path: Path, index: FleetIndex, *, hold_back: bool = True, metrics: FleetMetrics | None = None
) -> WarmStart:
    """Brings a snapshot into an index that holds nothing, for a `Subscriber` to take up.

    hold_back: sources do not count until their publishers have proved to be the same, and those without a position are
    not taken in; otherwise all count at once, which only suits sources that nobody follows. Whatever the file holds,
    and if there is none: never raises, and leaves the index empty unless the whole file is good; the outcome is counted
    and logged in one line.
    """
    rehearse()
    begun = time.monotonic()
    warm = WarmStart(index, WarmStarted.ABSENT, {})
    try:
        with path.open("rb", buffering=1 << 20) as file:
            warm = read_sources(file.read, index, hold_back=hold_back)
    except FileNotFoundError:
        pass
    except OSError:
        warm = WarmStart(index, WarmStarted.UNREADABLE, {})
    if metrics is not None:
        metrics.fleet_warm_starts.add(1, outcome=warm.outcome)
    seconds = time.monotonic() - begun
    if warm.outcome in (WarmStarted.WARM, WarmStarted.ABSENT):
        logger.info(
            "%s: %s start, %d sources and %d blocks of theirs in %.2f s",
            *(path, "warm" if warm.outcome is WarmStarted.WARM else "cold", warm.sources, warm.worker_blocks, seconds),
        )
    else:
        logger.warning("%s: %s; cold start", path, warm.outcome)
    return warm


def read_sources(read: Read, index: FleetIndex, *, hold_back: bool) -> WarmStart:
    """As `read_snapshot`, from anywhere. Raises StorageError where reading fails."""
    reading = _Reading(index, hold_back)
    try:
        for record in records(read):
            reading.take(record.kind, record.payload)
    except SpoiledError as spoiled:
        reading.undo()
        return WarmStart(index, spoiled.reason, {})
    except StorageError:
        reading.undo()
        raise
    return WarmStart(index, WarmStarted.WARM, reading.stands, reading.blocks)


class _Reading:
    """Takes records in, in an order that makes sense. Raises SpoiledError."""

    def __init__(self, index: FleetIndex, hold_back: bool) -> None:
        self._index, self._hold_back = index, hold_back
        self._head: SourceHead | None = None
        self._taken = False
        self._filled = self._heads = 0
        self._made: list[Source] = []
        self.stands: dict[Source, Position] = {}
        self.blocks = 0

    def take(self, kind: int, payload: bytes) -> None:
        if kind == SOURCE and self._head is None:
            self._begin(decoded(payload, SourceHead))
        elif kind == BLOCKS and self._head is not None:
            self._fill(self._head, payload)
        elif kind in (KEPT, VOID) and self._head is not None:
            self._end(self._head, kind == KEPT, int.from_bytes(payload, "little"))
        elif kind != END or self._head is not None or int.from_bytes(payload, "little") != self._heads:
            raise SpoiledError(WarmStarted.CORRUPT)

    def undo(self) -> None:
        for source in self._made:
            self._index.drop(source)

    def _begin(self, head: SourceHead) -> None:
        if head.source in self._made or len(set(head.sizes)) != len(head.sizes):
            raise SpoiledError(WarmStarted.CORRUPT)
        self._head, self._filled = head, 0
        wanted = head.position is not None or not self._hold_back
        room = min(head.names, _ROOM)  # more than this is not taken on a promise
        self._taken = wanted and self._index.restore(head.source, head.sizes, room, held_back=True)
        if self._taken:
            self._made.append(head.source)

    def _fill(self, head: SourceHead, payload: bytes) -> None:
        piece = piece_of(payload)
        self._filled += len(piece.hashes)
        if self._filled > head.names:
            raise SpoiledError(WarmStarted.CORRUPT)
        if self._taken:
            self._index.fill(head.source, piece)

    def _end(self, head: SourceHead, kept: bool, blocks: int) -> None:
        if blocks != self._filled:
            raise SpoiledError(WarmStarted.CORRUPT)
        self._head = None
        self._heads += kept
        if not self._taken:
            return
        if not kept:
            self._index.drop(head.source)
            return
        self.blocks += blocks
        if head.position is not None:
            self.stands[head.source] = head.position
        if not self._hold_back:
            self._index.show(head.source)


@cache
def rehearse() -> None:
    """Compiles what copies and reads run, so that nobody waits for a compiler under a lock."""
    source, buffer = Source("", 0), io.BytesIO()
    event = Stored((1, 2), None, [1, 2], 1, Tier.VRAM, b"", ())
    index = FleetIndex(64)
    index.apply(source, [event])
    copy = index.copy(source)
    assert copy is not None
    index.cut(source, copy)
    index.apply(source, [event])
    copy.close()
    write_sources(index, (source,), buffer.write)
    buffer.seek(0)
    read_sources(buffer.read, FleetIndex(64), hold_back=False)
