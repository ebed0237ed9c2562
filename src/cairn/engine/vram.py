"""This process's part in the VRAM pool: the segment that it donates, and those of its peers that it has mapped."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from cairn.config import Config
from cairn.copy import RowMemory
from cairn.errors import ConfigError
from cairn.index import IndexReader, shared_bytes
from cairn.kv import KVGeometry
from cairn.node import wire
from cairn.node.client import Link
from cairn.node.life import Life, process_token
from cairn.node.segments import path_of
from cairn.observe.log import log_once
from cairn.tier.arena import PAGE
from cairn.tier.dram import round_up
from cairn.tier.vram import Device, Segment, open_device

log = logging.getLogger(__name__)

#: Donations that could not be mapped are remembered, so that no request tries again; up to so many.
_REFUSED = 1024
#: What others are given at least to end the copies that they are at, seconds.
_GRACE_S = 1.0
#: Between two looks whether peers have let go of the segment, at the end, seconds.
_LOOK_S = 0.005


class Source:
    """A donation whose rows can be read here, and written where it is this process's own.

    What was copied out of it is right only if `sound` says so afterwards, and, where its rows were noted from `index`
    and are not pinned, that too. Thread-safe.
    """

    def __init__(self, number: int, segment: Segment, life: Life, *, own: bool) -> None:
        self.number = number
        self.segment = segment
        self.own = own
        self.index = IndexReader(life.index, segment.slots)
        self._life = life
        self._users = 0
        self._over = False
        self._changed = threading.Condition()

    @property
    def readers(self) -> int:
        """How many processes' threads read there now, of those that do without pins."""
        return self._life.readers()

    @contextmanager
    def using(self, *, pinned: bool = True) -> Iterator[RowMemory | None]:
        """A context in which the memory stays mapped, and its owner's; None: it is over. pinned: whether rows are."""
        with self._changed:
            usable = not self._over
            self._users += usable
        if not usable:
            yield None
            return
        if not pinned:
            self._life.enter()
        try:
            yield None if self._life.over() else self.segment.memory
        finally:
            if not pinned:
                self._life.leave()
            with self._changed:
                self._users -= 1
                self._settle()

    def sound(self) -> bool:
        """Whether all that was copied until now was what the directory says: see `Life`."""
        return not self._over and self._life.sound()

    def over(self) -> bool:
        return self._over or self._life.over()

    def retire(self) -> None:
        """Nobody can use it any more; it is unmapped as soon as nobody does. The own segment stays. Idempotent."""
        with self._changed:
            if self.own:
                self._life.end()
            self._over = True
            self._settle()

    def settled(self, timeout: float) -> bool:
        """Waits until nobody uses it after `retire`; False if that was not in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._users == 0, timeout)

    def _settle(self) -> None:
        if self._over and not self._users:
            self._life.close()
            if not self.own:
                self.segment.close()
            self._changed.notify_all()


class SharedVram:
    """Owns the segment, whose size and rows it chooses, and the mappings. Thread-safe.

    Under one session of the node the segment is one donation. A new session means a new one, once nobody copies under
    the old one any more; before that, the old one is ended for whoever still reads it.
    """

    def __init__(self, device: Device, slots: int, stride: int) -> None:
        """Raises StorageError where the device has not that much."""
        _rehearse()
        self._device = device
        self._segment = device.take(slots, stride)
        self._lock = threading.Lock()
        self._own: tuple[Link, Source] | None = None
        self._declined: Link | None = None
        self._mapped: dict[int, Source] = {}
        self._refused: set[int] = set()

    def donated(self, link: Link) -> Source | None:
        """The segment as this session's donation, made if need be; None: the node has not taken it (yet)."""
        with self._lock:
            if self._declined is link:
                return None
            if self._own:
                of, own = self._own
                if of is link and not own.over():
                    return own
                own.retire()
                if not own.settled(0.0):
                    return None
                self._own = None
            own_or_none = self._donate(link)
            if own_or_none:
                self._own = link, own_or_none
            return own_or_none

    def source(self, link: Link, part: wire.VramPart) -> Source | None:
        """Where the rows of a part are, mapped if need be; None: they cannot be reached."""
        number = part.donation
        with self._lock:
            if self._own and self._own[1].number == number:
                return self._own[1]
            found = self._mapped.get(number)
            if found or number in self._refused:
                return found
            found = self._map(part)
            if found is None:
                return None
            self._mapped[number] = found
        # Outside of the lock: for a session that is over it is told at once.
        link.expect(number, lambda _: self._retired(link, number))
        if found.over():
            self._retired(link, number)  # the node's word may have come before
        return found

    def sources(self, link: Link) -> list[Source]:
        """What can be read now under this session, the own segment first. Waits for nobody."""
        own, mapped = self._own, list(self._mapped.values())
        return [own[1], *mapped] if own and own[0] is link else mapped

    def close(self, link: Link | None, timeout: float) -> None:
        """Takes the segment out of the pool, waits until nobody reads it, `timeout` or a second at most, and gives it
        back.
        """
        deadline = time.monotonic() + max(timeout, _GRACE_S)
        while link and link.alive:
            reply = link.call(wire.Withdraw(0, link.welcome.session))
            if not isinstance(reply, wire.Withdrawn) or not reply.pins or time.monotonic() > deadline:
                break
            time.sleep(_LOOK_S)
        with self._lock:
            mapped, self._mapped = self._mapped, {}
            own, self._own = self._own, None
        for source in mapped.values():
            source.retire()
        with self._lock:
            if own:
                own[1].retire()
                own[1].settled(max(0.0, deadline - time.monotonic()))
                # The node may be gone, and then it has told of nobody.
                while own[1].readers and time.monotonic() < deadline:
                    time.sleep(_LOOK_S)
            self._segment.close()

    def _donate(self, link: Link) -> Source | None:
        segment = self._segment
        given = wire.Donate(0, link.welcome.session, segment.slots, segment.stride, segment.handle, process_token())
        reply = link.call(given)
        if not isinstance(reply, wire.Donated):
            return None
        if not reply.donation:
            log_once(log, "declined", "VRAM cannot be shared: the node has no memory to keep account of it")
            self._declined = link
            return None
        life = None
        try:
            life = Life(path_of(reply.life), reply.donation, process_token(), segment.slots)
            life.hold()
        except OSError as error:
            if life:
                life.close()
            log_once(log, "donate", f"VRAM cannot be shared: {error}")
            return None
        return Source(reply.donation, segment, life, own=True)

    def _map(self, part: wire.VramPart) -> Source | None:
        life = None
        try:
            life = Life(path_of(part.life), part.donation, part.owner, part.slots)
            segment = self._device.map(part.handle, part.slots, part.stride)
        except OSError as error:
            log_once(log, "map", f"a peer's VRAM cannot be mapped: {error}")
            if life:
                life.close()
            if len(self._refused) >= _REFUSED:
                self._refused.clear()
            self._refused.add(part.donation)
            return None
        return Source(part.donation, segment, life, own=False)

    def _retired(self, link: Link, number: int) -> None:
        """The node's word: a peer's donation is over."""
        link.forget(number)
        with self._lock:
            source = self._mapped.pop(number, None)
        if source:
            source.retire()


def _rehearse() -> None:
    """Has compiled what reading without a pin takes."""
    reader, none = IndexReader(np.zeros(shared_bytes(1), np.uint8), 1), np.zeros((1, 2), np.uint64)
    reader.has(none)
    reader.unchanged(reader.note(none))


def open_segment(config: Config, geometry: KVGeometry) -> tuple[Device, SharedVram]:
    """The device of `storage.vram`, and a segment of it for blocks of this geometry. Raises ConfigError or
    StorageError.
    """
    stride = round_up(geometry.block_bytes, PAGE)
    slots = min(config.storage.vram.size // stride, wire.MAX_DONATED)
    if slots < 1:
        raise ConfigError(
            f"storage.vram.size={config.storage.vram.size}: must hold at least one KV block of {stride} bytes, or be 0"
        )
    device = open_device(config.storage.vram.device)
    return device, SharedVram(device, slots, stride)
