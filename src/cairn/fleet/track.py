"""What has been taken in of one publisher's stream: how far, from which source, and what the decoder has learnt.

It outlives whoever brings the batches: a feed, or a snapshot.
"""

import logging
import time
from collections.abc import Callable
from typing import Final

from cairn.fleet.base import Sink, Source
from cairn.fleet.events import Batch, Decoder
from cairn.fleet.instances import Instance, Tap
from cairn.fleet.messages import Messages
from cairn.fleet.metrics import FleetMetrics, Resync, Skip
from cairn.fleet.positions import Position, ShowingSink, Stand, payload_digest
from cairn.fleet.recording import Message
from cairn.observe.log import log_once

logger = logging.getLogger(__name__)

#: As much as a lag may count, seconds.
_LONGEST_LAG_S: Final = 3600.0


class Track:
    """For one event loop.

    next: the sequence expected; None: nothing taken in. source: who tells, once that is known. life: grows whenever all
    is begun anew.
    """

    def __init__(
        self,
        instance: Instance,
        sink: Sink,
        metrics: FleetMetrics,
        tap: Tap | None = None,
        is_free: Callable[[Source], bool] = lambda _: True,
    ) -> None:
        """is_free: whether nobody else tells of a source."""
        self.instance: Final = instance
        self.metrics: Final = metrics
        self.life = 0
        self._sink, self._tap, self._is_free = sink, tap, is_free
        self._held_back_in: ShowingSink | None = None
        self._begin()

    def _begin(self) -> None:
        self.life += 1
        self.next: int | None = None
        self.source: Source | None = None
        self._held_back_in = None
        self._last: bytes | None = None
        self._digest = b""
        many = getattr(self._sink, "takes_many", False)
        self._decoder = Decoder(self.metrics, many=many, copies=self.instance.copies)

    def resume(self, stand: Stand, sink: ShowingSink | None = None) -> None:
        """Goes on where another left off. sink: holds the source back until it is proved."""
        self._begin()
        self.source, position = stand
        self.next, self._digest = position.next, position.digest
        self._decoder.resume(position.full, position.main)
        self._held_back_in = sink

    def position(self) -> Position | None:
        """How far it is; None: nothing is taken in, or what was is not proved."""
        if self.next is None or self.source is None or self._held_back_in is not None:
            return None
        digest = self._digest if self._last is None else payload_digest(self._last)
        full, main = self._decoder.learnt()
        return Position(self.instance.name, self.instance.endpoint, self.next, digest, full, main)

    def is_last(self, payload: bytes) -> bool:
        """Whether this is, byte for byte, the last batch that was taken in; if so, its publisher is still the same."""
        if self._last is not None:
            return payload == self._last
        if payload_digest(payload) != self._digest:
            return False
        self._last = payload
        return True

    def prove(self) -> None:
        """The publisher is still the one that what is held came from."""
        if self._held_back_in is not None and self.source is not None:
            self._held_back_in.show(self.source)
        self._held_back_in = None

    def drop(self, reason: Resync) -> None:
        """Makes the sink forget what came from here."""
        if self.next is not None and self.source is not None:
            self.metrics.fleet_drops.add(1, instance=self.instance.name, reason=reason)
            self._sink.drop(self.source)
        self._begin()

    def accept(self, batches: Messages) -> None:
        """Takes in batches that follow one another, one at least."""
        last, payloads, first = batches.framed(len(batches) - 1), batches.payloads(), 0
        assert last is not None
        self.next, self._last = last.sequence + 1, last.payload
        while first < len(batches):
            stop = len(batches) if self._tap is None else first + 1
            batch, count = self._decoder.decode_first(payloads.part(first, stop))
            self._decoded(batch, batches.part(first, first + count))
            first += count

    def _decoded(self, batch: Batch | None, told_by: Messages) -> None:
        rank = self.instance.rank if batch is None or batch.rank is None else batch.rank
        source = self.source or Source(self.instance.name, rank)
        if self.source is None and not self._is_free(source):
            self._refuse(source, len(told_by))
            return
        if self._tap is not None:
            for framed in map(told_by.framed, range(len(told_by))):
                assert framed is not None
                self._tap(Message(time.time(), source, *framed))
        if batch is None:
            return
        if rank != source.rank:
            self.metrics.fleet_skipped_batches.add(len(told_by), reason=Skip.FOREIGN_RANK)
            return
        self.source = source
        self.metrics.fleet_batches.add(len(told_by), instance=source.instance)
        self.metrics.fleet_events.add(batch.understood, instance=source.instance)
        # Clocks differ, and a publisher may say anything: of what is no number, 0.0 is what `max` leaves.
        lag = min(max(0.0, time.time() - batch.time), _LONGEST_LAG_S)
        self.metrics.fleet_event_lag.observe(lag, len(told_by), instance=source.instance)
        if batch.events:
            self._sink.apply(source, batch.events)

    def _refuse(self, source: Source, batches: int) -> None:
        """Two caches in one would be a third, which nobody has: names of blocks are each publisher's own."""
        self.metrics.fleet_skipped_batches.add(batches, reason=Skip.TAKEN_RANK)
        what = f"{source.instance} at {self.instance.endpoint}: tells of rank {source.rank}, as another endpoint does"
        log_once(logger, f"rank {self.instance.endpoint}", f"{what}, and is left out; give each its own rank or name")
