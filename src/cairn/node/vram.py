"""The VRAM metadata manager: which blocks of a pool are in which process's VRAM. Bytes it never sees.

Every process may donate one segment. Each has an index of its own, so each is prefix-closed by itself: what a process
had is gone in one step when it dies, and takes nobody else's blocks along. A chain is found in at most two places, the
asker's own segment and the peer's that reaches furthest. Who copies at once looks by himself (`cairn.index.shared`),
and tells what he has used.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cairn.index import EvictionPolicy, PrefixIndex, Reservation
from cairn.index.slots import SlotIds
from cairn.kv import Keys
from cairn.node.life import Life
from cairn.node.wire import Donate, VramPart, raw_of


class Donation:
    """One segment, as long as its owner's session lasts. number: its generation; none is used twice."""

    def __init__(self, number: int, given: Donate, life: Path, policy: type[EvictionPolicy]) -> None:
        """Raises OSError where its page cannot be made."""
        self.number = number
        self.given = given
        self.life = Life(life, number, given.owner, given.slots, make=True)
        self.index = PrefixIndex(given.slots, policy, self.life.index)

    @property
    def readers(self) -> int:
        """How many slots are pinned, and how many readers do without."""
        return self.index.pinned + self.life.readers()

    def part(self, rows: SlotIds) -> VramPart:
        given = self.given
        name = self.life.path.name
        return VramPart(self.number, given.slots, given.stride, given.handle, given.owner, name, raw_of(rows))


class VramHold:
    """Slots pinned for a reader, in one or two segments."""

    def __init__(self, pinned: list[tuple[Donation, SlotIds]]) -> None:
        self._pinned = pinned

    @property
    def parts(self) -> list[VramPart]:
        return [donation.part(rows) for donation, rows in self._pinned]

    def release(self) -> None:
        for donation, rows in self._pinned:
            donation.index.unpin(rows)
        self._pinned = []


class VramFound(NamedTuple):
    """A chain's leading blocks in VRAM. held: how many the own segment has; furthest: how far the peer's reaches."""

    keys: Keys
    own: Donation | None
    held: int
    peer: Donation | None
    furthest: int

    @property
    def blocks(self) -> int:
        return max(self.held, self.furthest)

    def pin(self) -> VramHold:
        """Pins them: those in the own segment there, those beyond it in the peer's."""
        pinned, upto = [], 0
        for donation, stop in ((self.own, self.held), (self.peer, self.furthest)):
            if donation and stop > upto:
                rows = donation.index.pin(self.keys[upto:stop])
                pinned.append((donation, rows))
                upto += len(rows)
        return VramHold(pinned)


class VramDirectory:
    """The donations of one pool, by the session that made them. For the node's loop alone.

    retired: told the number of each donation that is over. What a dead process had donated is never handed out: its
    life is looked at each time. own: the donation that counts as the asker's own, which another session of his may have
    made (vLLM's worker for its scheduler); 0: the one that his session has made.
    """

    def __init__(self, policy: type[EvictionPolicy], retired: Callable[[int], None]) -> None:
        self._policy = policy
        self._retired = retired
        self._donations: dict[int, Donation] = {}
        self._dead = 0
        self._evicted = 0

    def donate(self, session: int, number: int, given: Donate, life: Path) -> Donation:
        """Takes a segment in, and what the session had given before out. Raises OSError."""
        self.retire(session)
        donation = self._donations[session] = Donation(number, given, life, self._policy)
        return donation

    def retire(self, session: int) -> Donation | None:
        """Forgets what a session has donated; from now on nobody is handed it, nor believes what he reads there."""
        donation = self._donations.pop(session, None)
        if donation:
            self._evicted += donation.index.evicted
            donation.life.remove()
            self._retired(donation.number)
        return donation

    def find(self, session: int, keys: Keys, own: int = 0) -> "VramFound":
        """Where the leading blocks are: in the own segment, and in the peer's that reaches furthest."""
        mine, peer, furthest = self._own(session, own), None, 0
        held = 0
        for number, donation in list(self._donations.items()):
            there = donation.index.match(keys)
            if not there:
                continue
            if not donation.life.sound():
                self._dead += 1
                self.retire(number)
            elif donation is mine:
                held = there
            elif peer is None or (there, -donation.index.pinned) > (furthest, -peer.index.pinned):
                peer, furthest = donation, there
        return VramFound(keys, mine, held, peer, furthest)

    def used(self, number: int, keys: Keys) -> None:
        """Counts a use of what a donation has of a chain."""
        donation = self._donated(number)
        if donation:
            donation.index.touch(keys)

    def reserve(self, session: int, keys: Keys, own: int = 0) -> Reservation | None:
        """Slots of the own segment; None if there is none, or it cannot take all that it lacks."""
        donation = self._own(session, own)
        if donation is None or len(keys) > donation.index.capacity:
            return None
        reservation = Reservation(donation.index, keys)
        if reservation.first + len(reservation.rows) == len(keys):
            return reservation
        reservation.end()
        return None

    def close(self) -> None:
        for session in list(self._donations):
            self.retire(session)

    def figures(self) -> dict[str, float]:
        """What it says of itself, all segments together."""
        donations = list(self._donations.values())  # others than the loop ask, too
        indexes = [donation.index for donation in donations]
        given = [donation.given for donation in donations]
        return {
            "segments": len(indexes),
            "capacity_bytes": sum(one.slots * one.stride for one in given),
            "capacity_blocks": sum(index.capacity for index in indexes),
            "resident_blocks": sum(len(index) for index in indexes),
            "pinned_blocks": sum(index.pinned for index in indexes),
            "reserved_blocks": sum(index.occupancy().reserved for index in indexes),
            "evicted_blocks_total": self._evicted + sum(index.evicted for index in indexes),
            "dead_segments_total": self._dead,
        }

    def _own(self, session: int, number: int) -> Donation | None:
        return self._donated(number) if number else self._donations.get(session)

    def _donated(self, number: int) -> Donation | None:
        return next((one for one in self._donations.values() if one.number == number), None)
