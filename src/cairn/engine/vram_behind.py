"""What is stored in VRAM goes to DRAM in the background, and nobody waits for it."""

import logging
import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cairn.copy import Copier, DeviceRows
from cairn.engine.turns import Turns
from cairn.errors import StorageError
from cairn.kv import Keys, KVGeometry
from cairn.observe.log import log_once
from cairn.observe.metrics import Metrics
from cairn.observe.reasons import Reason

if TYPE_CHECKING:
    from cairn.engine.node_store import NodeWriting
    from cairn.engine.vram_pool import VramHold, VramRows
    from cairn.engine.vram_store import VramStore

log = logging.getLogger(__name__)

#: Bytes copied at a time: what is committed piece by piece is found piece by piece.
_PIECE_BYTES = 64 << 20
#: Prompts that wait; what is offered beyond that is skipped, and offered again when it is next stored.
_WAITING = 256


class _Offer(NamedTuple):
    """turn: of the first offer whose place it has taken."""

    keys: Keys
    namespace: bytes
    turn: int


class VramBehind:
    """Copies what VRAM has of a chain to those rows that DRAM lacks, oldest offer first, in a thread of its own.

    Slots are pinned while they are copied, not while they wait; what was evicted before its turn is counted. A longer
    offer of a chain takes the place of a shorter one. Thread-safe.
    """

    def __init__(self, store: "VramStore", copier: Copier, geometry: KVGeometry, device: int, metrics: Metrics) -> None:
        self._store = store
        self._copier = copier
        self._geometry = geometry
        self._device = device
        self._metrics = metrics
        self._waiting: OrderedDict[bytes, _Offer] = OrderedDict()
        self._turns = Turns()
        self._stopped = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def offer(self, keys: Keys, namespace: bytes) -> None:
        """Has the blocks of a chain copied, those that DRAM lacks."""
        with self._changed:
            if self._stopped or not len(keys):
                return
            if len(self._waiting) >= _WAITING:
                self._skipped(len(keys), Reason.BACKPRESSURE)
                return
            before = keys[-2].tobytes() if len(keys) > 1 else b""
            shorter, tip = self._waiting.pop(before, None), keys[-1].tobytes()
            replaced = [one for one in (shorter, self._waiting.get(tip)) if one]
            turn = self._turns.begin(min((one.turn for one in replaced), default=None))
            for one in replaced:
                self._turns.end(one.turn)
            self._waiting[tip] = _Offer(keys, namespace, turn)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="cairn-vram-behind", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def drain(self, timeout: float) -> bool:
        """Waits until what was offered before is in DRAM, or was skipped; False if it was not in time."""
        with self._changed:
            latest = self._turns.latest
            return self._changed.wait_for(lambda: self._turns.over(latest), timeout)

    def stop(self) -> None:
        """Ends the thread after the piece that it is at. Idempotent."""
        with self._changed:
            self._stopped = True
            for offer in self._waiting.values():
                self._turns.end(offer.turn)
            self._waiting.clear()
            self._changed.notify_all()
        if self._thread:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopped)
                if self._stopped:
                    return
                _, offer = self._waiting.popitem(last=False)
            try:
                self._move(offer)
            except Exception as error:  # noqa: BLE001 - a bug costs one copy and not all to come: counted, logged
                self._skipped(len(offer.keys), Reason.INTERNAL)
                log_once(log, f"behind {type(error).__name__}", f"a copy from VRAM to DRAM failed: {error!r}")
            with self._changed:
                self._turns.end(offer.turn)
                self._changed.notify_all()

    def _move(self, offer: _Offer) -> None:
        writing = self._store.write_dram(offer.keys, namespace=offer.namespace)
        hold: VramHold | None = None
        done, reason = 0, writing.reason
        try:
            if len(writing.rows):
                hold = self._store.hold_vram(offer.keys)
                reason = Reason.EVICTED
            for part in hold.lead if hold else ():
                done, reason = self._copy(writing, part, done)
        except StorageError as error:
            log_once(log, "behind", f"a copy from VRAM to DRAM failed: {error}")
            reason = Reason.IO_ERROR
        finally:
            writing.end()
            if hold:
                hold.release()
        self._skipped(len(offer.keys) - writing.first - done, reason)

    def _copy(self, writing: "NodeWriting", part: "VramRows", done: int) -> tuple[int, Reason]:
        """Copies what one segment has of the rows from `done` on; returns up to where it got, and why no further."""
        tokens = self._geometry.block_tokens
        step = max(1, _PIECE_BYTES // self._geometry.block_bytes)
        source = part.source
        assert source
        kv = source.segment.as_paged(self._geometry, self._device)
        while not self._stopped:
            first = writing.first + done
            if not part.first <= first < part.stop or done >= len(writing.rows):
                return done, Reason.EVICTED
            rows = part.rows[first - part.first :][: min(step, len(writing.rows) - done)]
            slots = (rows.astype(np.int64)[:, None] * tokens + np.arange(tokens)).reshape(-1)
            started = time.monotonic()
            with writing.access() as arena, source.using() as memory:
                if arena is None or isinstance(arena, DeviceRows):
                    return done, Reason.NODE_AWAY
                if memory is not None:
                    self._copier.gather(kv, slots, arena, writing.rows[done : done + len(rows)])
                if memory is None or not source.sound():
                    return done, Reason.OWNER_GONE
            size = len(rows) * self._geometry.block_bytes
            self._metrics.transferred("dram", "store", size, time.monotonic() - started)
            writing.commit(len(rows))
            if writing.lost:
                return done, Reason.NODE_AWAY
            done += len(rows)
        return done, Reason.CLOSED

    def _skipped(self, blocks: int, reason: Reason) -> None:
        if blocks > 0:
            tokens = blocks * self._geometry.block_tokens
            self._metrics.skipped_tokens.add(tokens, tier="dram", reason=reason)
